"""Against float64, on every instruction set and GPU: no worse than torch, special values, any threads."""

import ctypes
import math
import platform

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, generator, here, on

from mbperf import cross_entropy
from mbperf.extension import _C
from mbperf.testing import cross_entropy_float64, test_near

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
# The errors of a few last places that a single call may be luckier by than another.
ATOL = {torch.float32: 4e-7, torch.float64: 2e-15, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.fixture(params=[*_C.instruction_sets(), *(name for name in DEVICES if name != "cpu")])
def instruction_set(request):
    """A device that computes: the CPU with one of its instruction sets, or a GPU."""
    if request.param in DEVICES:
        yield from on(request.param)
        return
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(_C.instruction_sets()[0])


@pytest.fixture
def width(instruction_set):
    """Lanes of a float vector: where tails begin. On a GPU, of a warp."""
    return {"cuda": 32, "avx512": 16, "avx2": 8, "neon": 4, "baseline": 4}[instruction_set]


def sweep(width):
    return sorted({1, 2, 3, width - 1, width, width + 1, 2 * width + 3, 10, 64, 65, 127, 129, 1000})


def batch(rows, classes, dtype, seed=0):
    source = generator(seed)
    x = (torch.randn(rows, classes, generator=source, dtype=torch.float64) * 3).to(dtype)
    return x.to(here()), torch.randint(0, classes, (rows,), generator=source).to(here())


def value_and_gradient(function, x, y, dtype=None, **kwargs):
    leaf = x.to(dtype or x.dtype).detach().clone().requires_grad_()
    value = function(leaf, y, **kwargs)
    upstream = torch.ones_like(value)
    # To the CPU, where the reference is.
    return value.detach().double().cpu(), torch.autograd.grad(value, leaf, upstream)[0].double().cpu()


def assert_no_worse_than_torch(*batches, **kwargs):
    """The worst error of value and gradient over these batches, relative to the largest value of each."""
    errors, allowed, scales = torch.zeros(3, 2, dtype=torch.float64)
    for x, y in batches:
        exact = value_and_gradient(cross_entropy_float64, x, y, torch.float64, **kwargs)
        ours = value_and_gradient(cross_entropy, x, y, **kwargs)
        theirs = value_and_gradient(F.cross_entropy, x, y, **kwargs)
        for k, (mine, reference, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
            largest = ((mine - truth).abs().max(), (reference - truth).abs().max(), truth.abs().max())
            for worst, value in zip((errors, allowed, scales), largest, strict=True):
                worst[k] = torch.maximum(worst[k], value.cpu())  # of a NaN: NaN, which no limit allows
    limit = 2 * allowed + ATOL[x.dtype] * scales.clamp(min=1e-30)
    assert (errors <= limit).all(), (kwargs, errors, allowed, scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_error_against_float64(dtype, reduction, instruction_set, width):
    for classes in sweep(width):
        for rows in (1, width + 1, 70):
            # Several: of one row either side may happen to be exact, and its loss may be next to nothing,
            # while the error is always that of the logarithm of a sum of at least 1.
            batches = [batch(rows, classes, dtype, seed) for seed in range(8)]
            assert_no_worse_than_torch(*batches, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [4095, 4096, 4097, 8193, 50257])
def test_error_against_float64_of_long_rows(dtype, classes, instruction_set):
    for reduction in ("mean", "none"):
        assert_no_worse_than_torch(batch(2, classes, dtype), reduction=reduction)


TARGETS = ["hard", "smoothed", "weighted", "weighted and smoothed", "soft", "soft and weighted"]


def settings_of(kind, classes):
    """The options of one of TARGETS; weights are drawn for every class."""
    options = {"label_smoothing": 0.1} if "smoothed" in kind else {}
    if "weighted" in kind:
        options["weight"] = torch.rand(classes, generator=generator(3)).to(here())
    return options


def assert_long_sums_are_accurate(classes, kind, apart, rows=9):
    """Compare with torch; `apart` lays the logits out with neighbouring positions, not classes, adjacent."""
    x, y = batch(rows, classes, torch.float32)
    target = x.roll(1, 0).softmax(1) if "soft" in kind else y
    x, target = (t.t().contiguous().t() if apart and t.dim() == 2 else t for t in (x, target))
    for reduction in ("none", "mean"):
        assert_no_worse_than_torch((x, target), reduction=reduction, **settings_of(kind, classes))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("classes", [5_000, 40_000, 200_000])
@pytest.mark.parametrize("path", ["rows", "columns", "tiles"])
def test_error_over_many_classes(path, classes, kind, instruction_set):
    if here() == "cpu":
        _C.set_cross_entropy_path(path)
    try:
        assert_long_sums_are_accurate(classes, kind, apart=path == "tiles")
    finally:
        _C.set_cross_entropy_path(None)


@pytest.mark.parametrize("kind", TARGETS)
def test_error_over_as_many_classes_as_a_group_takes(kind, instruction_set, width):
    assert_long_sums_are_accurate(4096 // width, kind, apart=False, rows=70)


@pytest.mark.parametrize("classes", [3, 17, 64, 65, 300, 5000])
def test_error_with_every_setting(classes, instruction_set):
    x, y = batch(9, classes, torch.float32)
    weight = torch.rand(classes, generator=generator(3)).to(here())
    soft = x.roll(1, 0).softmax(1)
    for smoothing in (0.0, 0.1, 1.0):
        assert_no_worse_than_torch((x, y), label_smoothing=smoothing, ignore_index=int(y[0]))
        for target in (y, soft):
            for reduction in ("mean", "none"):
                settings = {"label_smoothing": smoothing, "reduction": reduction}
                ours = value_and_gradient(cross_entropy, x, target, weight=weight, **settings)
                wide = target if target is y else target.double()
                exact = value_and_gradient(
                    F.cross_entropy, x.double(), wide, weight=weight.double(), **settings
                )
                test_near(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_values_in_body_and_tail(special, dtype, smoothing, instruction_set, width):
    for classes in [*sweep(width), 4097]:
        x, y = batch(5, classes, dtype)
        for place in {0, classes // 2, classes - 1}:
            bad = x.clone()
            bad[2, place] = special
            ours = value_and_gradient(cross_entropy, bad, y, reduction="none", label_smoothing=smoothing)
            theirs = value_and_gradient(F.cross_entropy, bad, y, reduction="none", label_smoothing=smoothing)
            for mine, reference in zip(ours, theirs, strict=True):
                test_near(mine, reference, equal_nan=True, rtol=3e-2, atol=3e-2)
            mean = value_and_gradient(cross_entropy, bad, y, label_smoothing=smoothing)[1] * 5
            test_near(mean, ours[1], equal_nan=True, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_rows_of_minus_infinity(classes, instruction_set):
    x, y = batch(3, classes, torch.float32)
    x[1] = -math.inf
    x[2, : classes // 2] = -math.inf
    y[2] = 0
    for smoothing in (0.0, 0.1):
        loss, grad = value_and_gradient(cross_entropy, x, y, reduction="none", label_smoothing=smoothing)
        assert loss[0].isfinite()
        assert loss[1].isnan()
        assert loss[2] == math.inf
        assert grad[0].isfinite().all()
        assert grad[1].isnan().all()
        assert grad[2].isfinite().all()


@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_huge_logits_and_offsets(classes, instruction_set):
    x, y = batch(4, classes, torch.float32)
    offset = x.round() + 2.0**24
    for reduction in ("none", "mean"):
        loss, grad = value_and_gradient(cross_entropy, offset, y, reduction=reduction)
        expected = value_and_gradient(F.cross_entropy, offset.double(), y, reduction=reduction)
        test_near((loss, grad), expected, rtol=1e-6, atol=1e-6)
    extreme = torch.full((2, classes), -3e38, device=here())
    extreme[:, 0] = 3e38
    first = torch.zeros(2, dtype=torch.int64, device=here())
    test_near(cross_entropy(extreme, first, reduction="none"), torch.zeros(2, device=here()))


@pytest.mark.parametrize(
    "shape",
    [
        (64, 10),
        (5000, 10),
        (300, 1000),
        (700, 70),
        (1, 128256),
        (3, 50257),
        (40, 40_000),
        (2, 21, 64, 64),
        (3, 1000, 21),
        (2, 40_000, 3),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype, reduction):
    x = torch.randn(shape, generator=generator(0)).to(dtype).requires_grad_()
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator(1))
    y.view(-1)[1::9] = -100
    weight = torch.rand(shape[1], generator=generator(2)).to(dtype)
    calls = [(y, {}), (y, {"weight": weight, "label_smoothing": 0.1})]
    if x.numel() < 200_000:
        calls.append((x.detach().softmax(1), {"weight": weight}))
    for target, settings in calls:
        one, two = (on_threads(n, x, target, reduction=reduction, **settings) for n in (1, 2))
        for mine, other in zip(one, two, strict=True):
            assert torch.equal(mine, other)


def on_threads(count, x, target, **settings):
    """The loss without a gradient and with it, and the gradient, taken by this many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        loss = cross_entropy(x, target, **settings)
        return cross_entropy(x.detach(), target, **settings), loss, *torch.autograd.grad(loss.sum(), x)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("classes", [10, 100, 5000, 40_000])
def test_every_element_of_the_gradient_is_written(classes, device):
    # Deterministic mode fills torch.empty with NaN; recycled buffers hold what they held: both must not show.
    x, y = batch(70, classes, torch.float32)
    expected = value_and_gradient(F.cross_entropy, x, y)[1]
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in ("mean", "none"):
            grad = value_and_gradient(cross_entropy, x, y, reduction=reduction)[1]
            test_near(grad / (70 if reduction == "none" else 1), expected, rtol=1e-5, atol=1e-7)
    finally:
        torch.use_deterministic_algorithms(False)
    recycled = torch.full_like(x, math.nan, requires_grad=True)
    cross_entropy(recycled, y).backward()
    del recycled
    test_near(value_and_gradient(cross_entropy, x, y)[1], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_half_precision_is_rounded_as_torch_rounds(dtype, classes, instruction_set):
    # Where one class has all the probability, the gradient is the upstream gradient as it stands.
    bits = torch.randint(-(2**31), 2**31, (2000,), generator=generator(0), dtype=torch.int64)
    bits[:500] &= ~0x7FFF  # ties and near ones
    bits[500:700] |= 0x7F800000  # infinities and NaN of every payload
    bits[700:900] &= ~0x7F000000  # subnormal
    bits[900:1200] = bits[900:1200] % 2**28 + (100 << 23)  # about float16's own range
    upstream = bits.to(torch.int32).view(torch.float32).to(here())
    rows = torch.arange(2000, device=here())
    top = torch.randint(0, classes, (2000,), generator=generator(1)).to(here())
    y = (top + 1) % classes
    x = torch.full((2000, classes), -10_000.0, dtype=dtype, device=here())
    x[rows, top] = 0
    loss = cross_entropy(x.requires_grad_(), y, reduction="none", out_dtype=torch.float32)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    test_near(grad[rows, top], upstream.to(dtype), rtol=0, atol=0, equal_nan=True)
    finite = upstream.isfinite()  # else 0 times it comes first
    test_near(grad[rows, y][finite], (-upstream).to(dtype)[finite], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_unrounded_losses_of_half_precision(dtype, classes, instruction_set):
    x, y = batch(50, classes, dtype)
    exact = cross_entropy_float64(x.double(), y, reduction="none")
    ours = cross_entropy(x, y, reduction="none", out_dtype=torch.float32)
    test_near(ours, exact, rtol=3e-7, atol=3e-7, check_dtype=False)
    even = x.new_full((2, classes), -30_000.0)
    offset = cross_entropy(even, y[:2], reduction="none", out_dtype=torch.float32)
    test_near(offset, torch.full_like(offset, math.log(classes)), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_larger_than_the_cache(dtype, instruction_set):
    # From 12 MiB on they are written past it, from an aligned place on: here rows start at every offset.
    for rows, classes in ((130, 50_257), (6_500, 999)):
        x, y = batch(rows, classes, dtype)
        leaf = x.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(leaf, y), leaf)
        expected = x.detach().float().softmax(1)
        expected[torch.arange(rows), y] -= 1
        test_near(grad, (expected / rows).to(dtype), atol=1e-7, rtol={torch.float32: 2e-5}.get(dtype, 8e-3))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"expected one of .*baseline, got sse9"):
        _C.set_instruction_set("sse9")


UNDERFLOW = 0x10  # of fenv.h on x86
FAR_BELOW = [-4.0, -math.inf]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of x86")
@pytest.mark.parametrize("classes", [10, 32, 100, 257])
@pytest.mark.parametrize(
    ("dtype", "lowest"),
    [(dtype, lowest) for dtype in DTYPES for lowest in FAR_BELOW]
    + [(dtype, lowest) for dtype in DTYPES[:2] for lowest in (-90.0, -200.0, -800.0, -1e30)],
)
def test_no_exponential_underflows(dtype, lowest, classes, instruction_set):
    """One that does costs an assist of some 250 cycles on Intel, whatever its vector's other lanes hold.

    Rows that end in part of a vector have lanes of -inf, and so have classes that a mask leaves out.
    """
    if instruction_set in DEVICES:
        pytest.skip("the CPU's flags")
    libm, threads = ctypes.CDLL("libm.so.6"), torch.get_num_threads()
    logits = torch.randn(40, classes).clamp(-4, 4).to(dtype)
    logits[:, 3] = lowest
    torch.set_num_threads(1)  # flags are a thread's own
    try:
        libm.feclearexcept(UNDERFLOW)
        # Without a gradient: one that small is the caller's own.
        cross_entropy(logits, torch.arange(40) % 3)
        assert libm.fetestexcept(UNDERFLOW) == 0
    finally:
        torch.set_num_threads(threads)
