"""The CUDA kernels of cross entropy, run on the CPU by csrc/cuda/host_shim, against float64.

Every launch geometry, layout and setting; on no GPU. What a chip adds, its memory model and its speed, is not
tested here.
"""

import ctypes
import math
import mmap

import pytest
import torch
from host_kernels import (
    CLUSTERS,
    DTYPES,
    FAMILIES,
    LONG,
    NO_CLUSTERS,
    PROBLEM,
    SLACK,
    SUBNORMAL,
    UNIT,
    VECTOR,
    Device,
    Kernels,
    Strides,
    assert_near,
    built_library,
    placed,
    planted_library,
    rows_for,
    sweep,
)

from mbperf.testing import cross_entropy_float64, test_near

NORESERVE = 0x4000  # of Linux, which mmap names from Python 3.13 on

SETTINGS = {
    "mean": {"ignore": True},
    "sum": {"reduction": "sum", "weighted": True},
    "none": {"reduction": "none", "ignore": True, "z_loss": 0.01, "upstream": True},
    "weighted mean": {"weighted": True, "z_loss": 0.01, "ignore": True},
    "smooth": {"label_smoothing": 0.1, "ignore": True},
    "smooth weighted": {"label_smoothing": 0.1, "weighted": True, "reduction": "none", "upstream": True},
    "soft": {"soft": True},
    "soft smooth weighted": {"soft": True, "label_smoothing": 0.2, "weighted": True, "reduction": "sum"},
}


@pytest.fixture(scope="module")
def kernels():
    return Kernels(built_library())


class Case:
    """Arguments of one call: drawn once, so that the kernels and the reference get the same."""

    def __init__(
        self,
        shape,
        dtype,
        *,
        ignore=False,
        weighted=False,
        soft=False,
        upstream=False,
        shift=0,
        seed=0,
        **settings,
    ):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        classes = shape[1]
        self.x = placed((draw(*shape) * 3).to(dtype), shift)
        if soft:
            self.target = placed(draw(*shape).softmax(1).to(dtype), shift)
        else:
            self.target = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
        if ignore:
            self.target.view(-1)[1::3] = -100  # the first counts, so that a single row does
        self.weight = (
            torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype) if weighted else None
        )
        positions = self.x.numel() // classes
        self.upstream = draw(positions).float() if upstream else None
        self.shift, self.settings = shift, settings

    def run(self, kernels, **options):
        options = {"grad_shift": self.shift, "upstream": self.upstream, **self.settings, **options}
        return kernels.cross_entropy(self.x, self.target, self.weight, **options)

    def reference(self):
        """Loss, gradient and lse in float64; an ignored row counts for nothing."""
        settings = dict(self.settings)
        z_loss, reduction = settings.pop("z_loss", 0.0), settings.get("reduction", "mean")
        leaf = self.x.detach().to(torch.float64, copy=True).requires_grad_()
        loss = cross_entropy_float64(leaf, self.target, self.weight, **settings)
        soft = self.target.is_floating_point()
        live = torch.ones_like(leaf[:, 0], dtype=torch.bool) if soft else self.target != -100
        lse = leaf.masked_fill(~live.unsqueeze(1), 0).logsumexp(1)
        z = torch.where(live, z_loss * lse.square(), 0)
        if z_loss:
            loss = loss + (z if reduction == "none" else z.sum() / (live.sum() if reduction == "mean" else 1))
        flat = loss.reshape(-1)
        flat.backward(torch.ones_like(flat) if self.upstream is None else self.upstream.double())
        return flat.detach(), leaf.grad, torch.where(live, lse, 0).detach().reshape(-1)


def check(kernels, case, what="", **options):
    dtype = case.x.dtype
    result = case.run(kernels, **options)
    loss, grad, lse = case.reference()
    slack = SLACK[dtype]
    assert_near(result.loss.reshape(-1), loss, 0, slack, 1e-7 if slack > 1e-7 else 1e-15, f"loss {what}")
    if not case.x.isposinf().any():  # there torch's logsumexp says inf, and a softmax over its row nan
        assert_near(result.row_max + result.row_sum.log(), lse, 0, slack, slack, f"lse {what}")
    # Where shares cancel out, what is left is an error of the size of the upstream gradient.
    upstream = 0.0 if case.upstream is None else case.upstream.abs().max().item()
    least = SUBNORMAL.get(dtype, 0.0) + slack * upstream
    assert_near(result.grad, grad, UNIT[dtype], slack, least, f"gradient {what}")
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_against_float64_over_the_widths(kernels, dtype, name):
    for classes in sweep(dtype):
        for shift in (0, 1) if classes > 10 else (0,):
            case = Case((rows_for(classes), classes), dtype, shift=shift, **SETTINGS[name])
            check(kernels, case, f"{name}, {classes} classes, shift {shift}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mean", "smooth weighted"])
def test_long_rows_in_clusters_and_without(kernels, dtype, name):
    case = Case((2, LONG), dtype, shift=1, **{**SETTINGS[name], "ignore": False})
    for device in (CLUSTERS, NO_CLUSTERS):
        check(kernels, case, f"{device}", device=device)


BUSY = (1, True)  # a chip that two rows fill


def check_forward(kernels, case, what):
    """Loss and lse of a call without a gradient, alike in every order of the threads."""
    loss, _, lse = case.reference()
    results = []
    for order in (0, 1):
        kernels.set_order(order)
        results.append(case.run(kernels, gradient=False, device=BUSY))
    kernels.set_order(0)
    one, two = results
    slack = SLACK[case.x.dtype]
    assert_near(one.loss.reshape(-1), loss, 0, slack, 1e-7 if slack > 1e-7 else 1e-15, f"loss {what}")
    if not case.x.isposinf().any():  # there torch's logsumexp says inf, and a softmax over its row nan
        assert_near(one.row_max + one.row_sum.log(), lse, 0, slack, slack, f"lse {what}")
    for name in ("rows", "row_max", "row_sum"):
        bits = [getattr(result, name).view(torch.uint8) for result in (one, two)]
        assert torch.equal(*bits), (name, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_long_rows_without_a_gradient_are_streamed(kernels, dtype, name):
    """Of one piece, of whole pieces and of pieces with a rest, from any place within 16 bytes."""
    piece = 512 * 4 * VECTOR[dtype]
    for classes, shift in [(piece - 5, 0), (piece, 1), (piece + 1, 0), (2 * piece + 700, 1)]:
        case = Case((2, classes), dtype, shift=shift, **SETTINGS[name])
        check_forward(kernels, case, f"{name}, {classes} classes, shift {shift}")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_special_values_in_streamed_rows(kernels, special):
    for smoothing in (0.0, 0.1):
        case = Case((3, 9_000), torch.float32, reduction="none", label_smoothing=smoothing)
        case.x[1] = -math.inf
        for place in (0, 4_500, 8_999):
            kept = case.x[2, place].item()
            case.x[2, place] = special
            check_forward(kernels, case, f"{special} at {place}")
            case.x[2, place] = kept


def test_an_ignored_row_is_not_streamed(kernels):
    case = Case((4, 9_000), torch.float32, **SETTINGS["mean"])
    case.x[case.target == -100] = math.nan
    check_forward(kernels, case, "ignored rows of nan")


@pytest.mark.parametrize("wrong", [-1, 9_000, 2**40])
def test_a_target_out_of_range_stops_a_streamed_row(kernels, wrong):
    case = Case((4, 9_000), torch.float32, reduction="sum")
    case.target[3] = wrong
    with pytest.raises(RuntimeError, match="assertion failed: y >= 0"):
        case.run(kernels, gradient=False, device=BUSY)


@pytest.mark.parametrize("multiprocessors", [1, 4, 16, 132])
def test_a_chip_that_would_stand_idle_shares_a_row_among_more_blocks(kernels, multiprocessors):
    for classes in (20_000, 40_003):
        check(kernels, Case((1, classes), torch.bfloat16), f"{classes}", device=(multiprocessors, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [30, 100, 300, 1500])
def test_rows_that_start_anywhere(kernels, dtype, classes):
    for shift in range(1, VECTOR[dtype]):
        case = Case((3, classes), dtype, shift=shift)
        check(kernels, case, f"shift {shift}")
        check(kernels, case, f"shift {shift}, gradient elsewhere", grad_shift=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("classes", [10, 65, 300])
def test_rows_of_a_padded_tensor(kernels, classes, name):
    for pad in (1, 8):
        case = Case((5, classes + pad), torch.bfloat16, **SETTINGS[name])
        case.x = case.x[:, :classes]
        if case.target.is_floating_point():
            case.target = case.target[:, :classes]
        elif case.target.max() >= classes:
            case.target = torch.where(case.target >= classes, classes - 1, case.target)
        case.weight = None if case.weight is None else case.weight[:classes].contiguous()
        check(kernels, case, f"{name}, pad {pad}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_strided_classes(kernels, dtype, name):
    for shape in [(2, 3, 5), (3, 21, 40), (2, 300, 33), (2, 1000, 4), (1, 257, 70)]:
        case = Case(shape, dtype, **SETTINGS[name])
        check(kernels, case, f"{name}, {shape}")
        case.x = case.x.transpose(1, 2).contiguous().transpose(1, 2)  # channels last; the gradient is not
        check(kernels, case, f"{name}, {shape}, channels last")
    transposed = Case((40, 50), dtype, **SETTINGS[name])
    transposed.x = transposed.x.t().contiguous().t()
    check(kernels, transposed, f"{name}, transposed")


@pytest.mark.parametrize("name", ["sum", "smooth", "soft"])
def test_sums_over_many_strided_classes_keep_their_digits(kernels, name):
    """Each thread adds up an eighth of the classes: in one float each the lse would be off by 2.5e-6."""
    settings = {**SETTINGS[name], "reduction": "none", "weighted": False, "ignore": False}
    case = Case((1, 40_000, 16), torch.float32, **settings)
    result, (loss, _, lse) = case.run(kernels), case.reference()
    found = result.row_max.double() + result.row_sum.double().log()
    assert_near(found, lse, 0, 0, 6e-7, "lse")
    assert_near(result.loss.reshape(-1), loss, 0, 0, 4e-6, "loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_depends_on_the_order_of_threads(kernels, family):
    shape, device = FAMILIES[family]
    for name in ("mean", "soft smooth weighted"):
        case, results = Case(shape, torch.float32, **SETTINGS[name]), []
        for order in (0, 1, 2, 0):
            kernels.set_order(order)
            results.append(case.run(kernels, device=device).bits())
        kernels.set_order(0)
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two), (family, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_and_from_known_statistics(kernels, family):
    shape, device = FAMILIES[family]
    for name in ("none", "smooth weighted", "soft"):
        case = Case(shape, torch.float32, **SETTINGS[name])
        once = case.run(kernels, device=device)
        again = case.run(kernels, device=device, known=once)
        test_near(again.grad, once.grad, rtol=1e-6, atol=1e-9)
        kernels.set_order(1)
        case.run(kernels, device=device, inplace=True)
        kernels.set_order(0)
        assert torch.equal(case.x, once.grad), (family, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_special_values_in_body_and_tail(kernels, family, special):
    shape, device = FAMILIES[family]
    for smoothing in (0.0, 0.1):
        case = Case(shape, torch.float32, reduction="none", label_smoothing=smoothing)
        rows = case.x.movedim(1, -1)
        for place in {0, shape[1] // 2, shape[1] - 1}:
            kept = rows[-1, ..., place].clone()
            rows[-1, ..., place] = special
            check(kernels, case, f"{special} at {place}", device=device)
            rows[-1, ..., place] = kept


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_minus_infinity_and_huge_logits(kernels, family):
    shape, device = FAMILIES[family]
    for smoothing in (0.0, 0.1):
        case = Case(shape, torch.float32, reduction="none", label_smoothing=smoothing)
        case.x[0] = -math.inf
        result = case.run(kernels, device=device)
        first = slice(0, case.x[0].numel() // shape[1])
        assert result.rows[first].isnan().all()
        assert result.grad[0].isnan().all()
        assert result.rows[first.stop :].isfinite().all()
        half = Case(shape, torch.float32, reduction="none", label_smoothing=smoothing)
        half.x[:, : shape[1] // 2] = -math.inf
        half.target.zero_()
        result = half.run(kernels, device=device)
        assert (result.rows == math.inf).all()
        assert result.grad.isfinite().all()
    offset = Case(shape, torch.float32, reduction="none")
    offset.x.copy_(offset.x.round() + 2.0**24)
    check(kernels, offset, "offset", device=device)
    extreme = Case(shape, torch.float32, reduction="none")
    extreme.x.fill_(-3e38)
    extreme.x[:, 0] = 3e38
    extreme.target.zero_()
    assert (extreme.run(kernels, device=device).rows == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_rows_count_for_nothing_whatever_they_hold(kernels, family):
    shape, device = FAMILIES[family]
    for name in ("mean", "smooth", "none"):
        case = Case(shape, torch.float32, **SETTINGS[name])
        ignored = (case.target == -100).unsqueeze(1).expand(shape)
        case.x[ignored] = math.nan
        result = case.run(kernels, device=device)
        assert (result.grad[ignored] == 0).all()
        assert result.grad.isfinite().all()
        assert (result.rows[(case.target == -100).reshape(-1)] == 0).all()
    case.target.fill_(-100)
    case.upstream = None
    result = case.run(kernels, device=device, reduction="mean")
    assert result.loss.isnan()
    assert (result.grad == 0).all()
    assert case.run(kernels, device=device, reduction="sum").loss == 0


def test_only_targets_of_no_weight(kernels):
    case = Case((5, 10), torch.float32)
    case.weight = torch.zeros(10)
    result = case.run(kernels)
    assert result.loss.isnan()
    assert result.grad.isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", [-1, "classes", 2**40])
def test_a_target_out_of_range_stops_the_kernel(kernels, family, wrong):
    shape, device = FAMILIES[family]
    case = Case(shape, torch.float32, reduction="sum")
    case.target.view(-1)[-1] = shape[1] if wrong == "classes" else wrong
    with pytest.raises(RuntimeError, match="assertion failed: y >= 0"):
        case.run(kernels, device=device)
    with pytest.raises(RuntimeError, match="assertion failed: y >= 0"):
        case.run(kernels, device=device, reduction="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_blocks(kernels, dtype):
    case = Case((20_001, 2), dtype, weighted=True, ignore=True, z_loss=0.01)
    check(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_scales_unless_it_is_one(kernels, dtype):
    for n, shift in [(1, 0), (7, 1), (5000, 3)]:
        grad = placed(torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype), shift)
        kept = grad.clone()
        for upstream_dtype in DTYPES:
            kernels.scale_(grad, torch.ones((), dtype=upstream_dtype), None, 1)
            assert torch.equal(grad, kept)
        kernels.scale_(grad, torch.full((), 0.75, dtype=torch.bfloat16), None, 1)
        assert torch.equal(grad, kept * 0.75)
    target = torch.tensor([0, -100, 5])
    kernels.scale_(grad, torch.ones(()), target, 6)
    with pytest.raises(RuntimeError, match="assertion failed"):
        kernels.scale_(grad, torch.ones(()), target, 5)


def far_apart(shape, strides, dtype=torch.bfloat16):
    """A tensor over address space that is never filled: only what is touched takes memory."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    region = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(region, dtype=dtype, count=elements).as_strided(shape, strides)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 10), (2**30 + 8, 1)),
        ((3, 100), (2**30 + 8, 1)),
        ((3, 1000), (2**30 + 8, 1)),
        ((3, 9000), (2**30 + 8, 1)),
        ((3, 300), (2**30 + 1, 1)),
        ((5, 40), (1, 2**26 + 1)),
        ((2, 3, 40), (2**31 + 1, 40, 1)),
        ((2, 40, 17), (17, 2**26 + 1, 1)),
    ],
)
def test_offsets_beyond_32_bits(kernels, shape, strides):
    case = Case(shape, torch.bfloat16)
    near = case.x
    case.x = far_apart(shape, strides).copy_(near)
    grad = far_apart(shape, strides)
    result = case.run(kernels, grad=grad)
    expected = Case(shape, torch.bfloat16).reference()[1]
    assert_near(result.grad, expected, UNIT[torch.bfloat16], 1e-6)
    assert torch.equal(case.x, near)


@pytest.mark.parametrize("positions", [2**31, 2**40])
def test_more_blocks_than_a_grid_has_are_refused(kernels, positions):
    """Else 32 bits would hold another number of blocks, and rows would be left out."""
    p = PROBLEM[torch.float32](input=8, input_strides=Strides(0, 0, 1), positions=positions, inner=positions,
                               classes=100, grad=4, grad_strides=Strides(0, 100, 1), target=8)  # fmt: skip
    device = Device(4, True)
    assert kernels.lib.mbperf_rows(0, ctypes.byref(p), ctypes.byref(device)) == 1


# Errors of the kind that indexing and reductions have, one a kernel's part; each has to be found.
HELD, ONLINE = "cross_entropy/held_kernels.cuh", "cross_entropy/online_kernels.cuh"
REDUCE = "reduce.cuh"
PLANTED = {
    "the last vector of an unaligned row forgotten": (
        HELD,
        "(head + classes + E - 1) / E",
        "(classes + E - 1) / E",
    ),
    "the rest of a streamed row forgotten": (
        HELD,
        "begin < whole.end; begin += kPiece",
        "begin + kPiece <= whole.end; begin += kPiece",
    ),
    "a barrier left out": (REDUCE, "slots[warp] = softmax;\n    __syncthreads();", "slots[warp] = softmax;"),
    "a cluster's ranks mixed up": (REDUCE, "slots + cluster_rank() * kWarps + warp", "slots + warp"),
    "one step between lanes left out": (REDUCE, "step > 0; step /= 2", "step > 1; step /= 2"),
    "a staged row walked past its end": (ONLINE, "return c < classes ? c", "return c <= classes ? c"),
}


def finds_errors(kernels):
    """A few cases of each kernel; raises where one of them is wrong."""
    for order in (0, 1):
        kernels.set_order(order)
        for shape, device in FAMILIES.values():
            for shift in (0, 3):
                check(kernels, Case(shape, torch.bfloat16, shift=shift, **SETTINGS["smooth"]), device=device)
        check(kernels, Case((2, 45_001), torch.bfloat16, shift=3))
    check_forward(kernels, Case((2, 20_001), torch.bfloat16, shift=3), "streamed")


def test_what_finds_planted_errors_finds_none_in_the_kernels(kernels):
    finds_errors(kernels)
    kernels.set_order(0)


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error, tmp_path):
    library = planted_library(tmp_path, *PLANTED[error])
    with pytest.raises((AssertionError, RuntimeError)):
        finds_errors(Kernels(library))
