"""kl_div_from_logits against float64 and F.kl_div: values, gradients, layouts, what is not a number."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from derivatives import check_backward_twice
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from mbperf import kl_div_from_logits
from mbperf.measure.memory import printed_by
from mbperf.testing import test_near

ROOT = Path(__file__).parents[2]
REDUCTIONS = ["none", "mean", "sum", "batchmean"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
# The errors of a few last places that a single call may be luckier by than another.
ATOL = {torch.float32: 4e-7, torch.float64: 2e-15, torch.bfloat16: 1e-3, torch.float16: 1e-4}
WIDTH = {"avx512": 16, "avx2": 8, "neon": 4, "baseline": 4}


def logits(*shape, dtype=torch.float32, seed=0, scale=3.0):
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)


def by_torch(student, teacher, *, temperature=1.0, reduction="batchmean"):
    """What is written with torch today; its "none" summed over the classes."""
    log_q, log_p = ((t / temperature).log_softmax(-1) for t in (student, teacher))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "mean" is not the mean
        value = F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    return value.sum(-1) if reduction == "none" else value


def in_float64(student, teacher, *, temperature=1.0, reduction="batchmean"):
    """The definition in elementary steps, with 0 log 0 = 0."""

    def log_probabilities(t):
        scaled = t.to(torch.float64) / temperature
        largest = scaled.detach().amax(-1, keepdim=True)
        shifted = scaled - largest.masked_fill(largest == -math.inf, 0)
        return shifted - shifted.exp().sum(-1, keepdim=True).log()

    log_q, log_p = log_probabilities(student), log_probabilities(teacher)
    p = log_p.exp()
    rows = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
    divisor = {"sum": 1, "mean": student.numel(), "batchmean": student.shape[0] if student.dim() > 1 else 1}
    return rows if reduction == "none" else rows.sum() / divisor[reduction]


def value_and_gradient(function, student, teacher, upstream=None, **settings):
    leaf = student.detach().requires_grad_()
    value = function(leaf, teacher, **settings)
    grad = torch.ones_like(value) if upstream is None else upstream
    return value.detach(), torch.autograd.grad(value, leaf, grad)[0]


def assert_no_worse_than_torch(*batches, **settings):
    """The worst error of value and gradient over these batches, relative to the largest value of each."""
    errors, allowed, scales = torch.zeros(3, 2, dtype=torch.float64)
    for student, teacher in batches:
        exact = value_and_gradient(in_float64, student.double(), teacher.double(), **settings)
        ours = value_and_gradient(kl_div_from_logits, student, teacher, **settings)
        theirs = value_and_gradient(by_torch, student, teacher, **settings)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for k, (mine, reference, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
            largest = ((mine - truth).abs().max(), (reference - truth).abs().max(), truth.abs().max())
            for worst, value in zip((errors, allowed, scales), largest, strict=True):
                worst[k] = torch.maximum(worst[k], value)  # of a NaN: NaN, which no limit allows
    limit = 2 * allowed + ATOL[student.dtype] * scales.clamp(min=1e-30)
    assert (errors <= limit).all(), (settings, errors, allowed, scales)


def pair(*shape, dtype=torch.float32, seed=0):
    return logits(*shape, dtype=dtype, seed=seed), logits(*shape, dtype=dtype, seed=seed + 100)


def sweep(width):
    return sorted({2, 3, width - 1, width, width + 1, 2 * width + 3, 10, 64, 65, 127, 129, 1000})


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_error_against_float64(dtype, temperature, instruction_set):
    width = WIDTH[instruction_set]
    for classes in sweep(width):
        for rows, reduction in ((1, "sum"), (width + 1, "mean"), (70, "none"), (70, "batchmean")):
            batches = [pair(rows, classes, dtype=dtype, seed=seed) for seed in range(2)]
            assert_no_worse_than_torch(*batches, temperature=temperature, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2047, 2048, 2049, 4097, 50257, 66_000])
def test_error_against_float64_of_long_rows(dtype, classes, instruction_set):
    for temperature in (1.0, 0.7):
        for reduction in ("batchmean", "none"):
            assert_no_worse_than_torch(
                pair(2, classes, dtype=dtype), temperature=temperature, reduction=reduction
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000, 70_000])
def test_equal_logits_cost_exactly_nothing(dtype, classes, instruction_set):
    x = logits(3, classes, dtype=dtype)
    for temperature in (1.0, 3.3):
        value, grad = value_and_gradient(
            kl_div_from_logits, x, x.clone(), reduction="none", temperature=temperature
        )
        assert (value == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_divergence_is_below_zero(dtype, instruction_set):
    for classes in (3, 40, 100, 5000):
        x = logits(50, classes, dtype=dtype)
        near = x * (1 + 4 * torch.finfo(dtype).eps)
        value = kl_div_from_logits(near, x, reduction="none", out_dtype=torch.float32)
        assert (value >= 0).all()
        test_near(value, in_float64(near, x, reduction="none"), rtol=1e-3, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_costs_nothing(dtype, instruction_set):
    value, grad = value_and_gradient(kl_div_from_logits, *pair(20, 1, dtype=dtype), reduction="none")
    assert (value == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("classes", [3, 40, 100, 5000, 70_000])
def test_peaked_rows_and_huge_logits(classes, instruction_set):
    x, z = pair(6, classes)
    z[:, 1] += 200.0  # a teacher that is certain
    x[3:, 1] += 150.0  # and a student, of the same
    assert_no_worse_than_torch((x, z), reduction="none")
    offset = [t.round() + 2.0**24 for t in pair(6, classes)]
    exact = value_and_gradient(in_float64, *(t.double() for t in offset), reduction="none")
    ours = value_and_gradient(kl_div_from_logits, *offset, reduction="none")
    test_near(ours, exact, rtol=2e-6, atol=1e-6, check_dtype=False)
    extreme = torch.full((2, classes), -3e38)
    extreme[:, 0] = 3e38
    assert (kl_div_from_logits(extreme, extreme, reduction="none") == 0).all()
    assert (kl_div_from_logits(torch.zeros(2, classes), extreme, reduction="none") > 0).all()


@pytest.mark.parametrize("classes", [3, 40, 100, 2049, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_without_probability_add_nothing(dtype, classes, instruction_set):
    x, z = pair(6, classes, dtype=dtype)
    z[1, 0] = -math.inf  # of the teacher
    x[2, -1] = z[2, -1] = -math.inf  # of both, in the tail
    x[3, 1:] = z[3, 1:] = -math.inf  # all but one class: whole blocks without any
    x[4, 1] = -math.inf  # of the student alone: what the teacher allows is excluded
    ours = value_and_gradient(kl_div_from_logits, x, z, reduction="none", out_dtype=torch.float64)
    exact = value_and_gradient(in_float64, x.double(), z.double(), reduction="none")
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": max(2e-6, torch.finfo(dtype).eps)}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-13}
    test_near(ours[0], exact[0], rtol=1e-5, atol=1e-6)
    assert ours[0][3] == 0
    assert ours[0][4] == math.inf
    test_near(ours[1], exact[1], check_dtype=False, **tolerance)
    assert ours[1].isfinite().all()


def test_a_class_that_both_exclude_is_nan_in_torch_and_not_here():
    x = torch.tensor([[0.0, 1.0, -math.inf]])
    assert by_torch(x, x).isnan()
    assert kl_div_from_logits(x, x) == 0


@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("special", ["nan", "inf", "all -inf"])
def test_what_is_not_a_number_stays_in_its_row(special, side, dtype, classes, instruction_set):
    for place in {0, classes // 2, classes - 1}:
        both = pair(5, classes, dtype=dtype)
        both[side][2, place] = float(special.removeprefix("all "))
        if special.startswith("all"):
            both[side][2] = -math.inf
        value, grad = value_and_gradient(kl_div_from_logits, *both, reduction="none")
        others = [0, 1, 3, 4]
        assert value[2].isnan()
        assert value[others].isfinite().all()
        assert grad[others].isfinite().all()
        assert grad[2].isnan().any()
        assert kl_div_from_logits(*both).isnan()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_unrounded_divergences_of_half_precision(dtype, classes, instruction_set):
    x, z = pair(50, classes, dtype=dtype)
    exact = in_float64(x, z, reduction="none")
    ours = kl_div_from_logits(x, z, reduction="none", out_dtype=torch.float32)
    test_near(ours, exact, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("shape", [(64, 10), (5000, 10), (300, 1000), (700, 70), (1, 128256), (3, 50257)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype, reduction):
    x, z = pair(*shape, dtype=dtype)

    def on_threads(count):
        threads = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            alone = kl_div_from_logits(x, z, reduction=reduction)
            return alone, *value_and_gradient(kl_div_from_logits, x, z, reduction=reduction)
        finally:
            torch.set_num_threads(threads)

    for one, two in zip(on_threads(1), on_threads(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_larger_than_the_cache(dtype, instruction_set):
    # From 12 MiB on they are written past it, from an aligned place on: here rows start at every offset.
    for rows, classes in ((130, 50_257), (6_500, 999)):
        x, z = pair(rows, classes, dtype=dtype)
        (_, grad) = value_and_gradient(kl_div_from_logits, x, z, reduction="sum")
        expected = x.float().softmax(1) - z.float().softmax(1)
        rtol = {torch.float32: 2e-5}.get(dtype, 8e-3)
        test_near(grad, expected.to(dtype), atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("classes", [10, 100, 5000, 40_000])
def test_every_element_of_the_gradient_is_written(classes):
    x, z = pair(70, classes)
    expected = value_and_gradient(by_torch, x, z, reduction="sum")[1]
    # Deterministic mode fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in ("sum", "none"):
            grad = value_and_gradient(kl_div_from_logits, x, z, reduction=reduction)[1]
            test_near(grad, expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


# Shapes and layouts


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 3, 4, 70), (2, 2, 2049)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_shape_and_reduction(shape, reduction):
    x, z = pair(*shape)
    ours = value_and_gradient(kl_div_from_logits, x, z, reduction=reduction)
    theirs = value_and_gradient(by_torch, x, z, reduction=reduction)
    if len(shape) == 1 and reduction == "batchmean":  # F.kl_div takes the classes for a batch
        theirs = tuple(t * shape[0] for t in theirs)
    test_near(ours, theirs)
    assert ours[1].is_contiguous()


def test_the_default_is_the_batch_mean():
    x, z = pair(4, 5, 6)
    test_near(kl_div_from_logits(x, z), in_float64(x, z, reduction="sum").float() / 4)


def test_the_mean_over_positions_is_a_batch_mean_of_flat_logits():
    x, z = pair(4, 5, 6)
    flat = kl_div_from_logits(x.flatten(0, -2), z.flatten(0, -2))
    test_near(flat, kl_div_from_logits(x, z, reduction="none").mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_temperature_is_a_division_of_both_and_no_more(reduction):
    x, z = pair(6, 40, dtype=torch.float64)
    ours = value_and_gradient(kl_div_from_logits, x, z, temperature=4, reduction=reduction)
    theirs = value_and_gradient(by_torch, x, z, temperature=4, reduction=reduction)
    test_near(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 2, 5)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_sum(shape, reduction):
    x = torch.empty(shape)
    ours, theirs = (value_and_gradient(f, x, x, reduction=reduction) for f in (kl_div_from_logits, by_torch))
    test_near(ours, theirs, equal_nan=True)


def layouts():
    """(name, whether it is copied, logits (5, 6, 40))."""
    whole = logits(5, 6, 80)
    yield "contiguous", False, whole[..., :40].contiguous()
    yield "part of wider rows", False, whole[..., 7:47]
    yield "one row for all", False, logits(1, 40).expand(30, 40).view(5, 6, 40)
    yield "every other position", True, logits(5, 13, 40)[:, 1:13:2]
    yield "classes first", True, logits(40, 5, 6).permute(1, 2, 0)
    yield "every other class", True, whole[..., ::2]
    yield "one logit for all classes", True, logits(5, 6, 1).expand(5, 6, 40)


@pytest.mark.parametrize(
    ("name", "copied", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_layouts_and_what_of_them_is_copied(name, copied, x, side, reduction):
    other = logits(5, 6, 40, seed=9)
    both = (x, other) if side == 0 else (other, x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        ours = value_and_gradient(kl_div_from_logits, *both, reduction=reduction)
    test_near(ours, value_and_gradient(by_torch, *both, reduction=reduction))
    sizes = [e.input_shapes[0] for e in seen.events() if e.name in ("aten::copy_", "aten::clone")]
    assert any(torch.Size(size).numel() >= x.numel() for size in sizes) == copied, name


def test_peak_memory_is_the_gradient():
    """In a fresh process, as multiples of the gradient."""

    def gradients(way):
        return printed_by(ROOT / "bench/kl_div_memory.py", way, 512, 8000) / (4 * 512 * 8000)

    assert 1 <= gradients("fused") < 1.5
    assert gradients("torch") > 3  # the figure moves with what is allocated


# Derivatives


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 70), (2, 2100)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(shape, reduction):
    x, z = (t.requires_grad_() for t in pair(*shape, dtype=torch.float64))
    student_alone = x, z.detach()
    for leaves in (student_alone, (x, z)):

        def loss(x, z):
            return kl_div_from_logits(x, z, temperature=1.7, reduction=reduction)

        assert gradcheck(loss, leaves, fast_mode=True)
        if shape != (2, 2100):
            assert gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_teacher_that_requires_grad_gets_its_own(reduction):
    x, z = (t.requires_grad_() for t in pair(4, 50))
    ours, theirs = (
        torch.autograd.grad(f(x, z, temperature=2.0, reduction=reduction).sum(), (x, z))
        for f in (kl_div_from_logits, by_torch)
    )
    test_near(ours, theirs)
    frozen = x.detach()
    (ours,), (theirs,) = (
        torch.autograd.grad(f(frozen, z, reduction=reduction).sum(), (z,))
        for f in (kl_div_from_logits, by_torch)
    )
    test_near(ours, theirs)
    with torch.no_grad():
        assert not kl_div_from_logits(x, z, reduction=reduction).requires_grad


def test_gradients_of_the_teacher_where_it_excludes_classes():
    x, z = pair(3, 6)
    z[0, 2] = x[1, 3] = z[1, 3] = -math.inf
    z.requires_grad_()
    (grad,) = torch.autograd.grad(kl_div_from_logits(x, z), z)
    assert grad.isfinite().all()
    assert grad[0, 2] == grad[1, 3] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_gives_the_same_bits(dtype, reduction):
    x, z = pair(3, 5000, dtype=dtype)
    x.requires_grad_()
    loss = kl_div_from_logits(x, z, reduction=reduction).sum()
    check_backward_twice(loss, x, (1.0, 0.25))


@pytest.mark.parametrize("classes", [10, 300, 5000])
def test_every_position_has_an_upstream_gradient_of_its_own(classes):
    x, z = pair(37, classes)
    upstream = logits(37, seed=5)
    upstream[3] = 0
    ours, theirs = (
        value_and_gradient(f, x, z, upstream, reduction="none") for f in (kl_div_from_logits, by_torch)
    )
    test_near(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_loss_scaling(scale, dtype):
    # Of float16, what rounds to 0 before it is scaled would stay 0: as with torch.amp.GradScaler.
    x, z = pair(256, 3000, dtype=dtype)
    leaf = x.requires_grad_()
    (ours,) = torch.autograd.grad(kl_div_from_logits(leaf, z, out_dtype=torch.float32) * scale, leaf)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(in_float64(wide, z) * scale, wide)
    # A place of float16 below 6e-5 is 6e-8.
    test_near(ours, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else None, atol=6e-8 * max(scale, 1))


def test_logits_changed_in_place_are_noticed_where_they_are_read_again():
    for side in (0, 1):
        leaf, z = pair(4, 5)
        both = leaf.requires_grad_() * 1, z
        loss = kl_div_from_logits(*both, reduction="none").sum()
        both[side].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_functional_transforms(reduction):
    x, z = pair(4, 5, dtype=torch.float64)

    def of(function):
        return lambda x, z: function(x, z, temperature=1.3, reduction=reduction)

    for transform in (
        lambda f: torch.func.jvp(f, (x, z), (z, x)),
        lambda f: torch.func.grad(lambda x, z: f(x, z).sum(), (0, 1))(x, z),
        lambda f: torch.func.jacrev(f)(x, z),
        lambda f: torch.func.jacfwd(f)(x, z),
        lambda f: torch.func.hessian(lambda x: f(x, z).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, z]), torch.stack([z, x])),
        lambda f: torch.func.vmap(f, (0, None))(torch.stack([x, z]), z),
        lambda f: torch.autograd.functional.jacobian(lambda x: f(x, z), x, vectorize=True),
    ):
        test_near(transform(of(kl_div_from_logits)), transform(of(by_torch)))


def test_forward_mode():
    x, z = pair(4, 5)
    with forward_ad.dual_level():
        ours, theirs = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, z), z)).tangent
            for f in (kl_div_from_logits, by_torch)
        )
    assert ours is not None
    test_near(ours, theirs)


# Modes and dtypes


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_without_a_break(dtype, reduction):
    torch.compiler.reset()  # eight recompilations of one function are the limit
    compiled = torch.compile(kl_div_from_logits, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        x, z = pair(rows, 40, dtype=dtype)
        ours, eager = (
            value_and_gradient(f, x, z, temperature=2.0, reduction=reduction)
            for f in (compiled, kl_div_from_logits)
        )
        test_near(ours, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    x, z = pair(6, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_gradient(kl_div_from_logits, x, z)
        kept = kl_div_from_logits(x, z, out_dtype=torch.float16)
    assert value.dtype == (torch.float32 if dtype in HALVES else dtype)
    assert grad.dtype == dtype
    assert kept.dtype == torch.float16
    test_near(value, in_float64(x, z), check_dtype=False, rtol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)], ids=str)
def test_two_dtypes_meet_in_the_wider(dtypes):
    x, z = pair(6, 40)
    x, z = x.to(dtypes[0]), z.to(dtypes[1])
    value, grad = value_and_gradient(kl_div_from_logits, x, z)
    assert value.dtype == torch.promote_types(*dtypes)
    assert grad.dtype == x.dtype
    test_near(value, in_float64(x, z), check_dtype=False, rtol=1e-5)


def test_operators_pass_opcheck():
    ops = torch.ops.mbperf
    x, z = pair(6, 40)
    for reduction in range(4):
        settings = {"temperature": 2.0, "reduction": reduction}
        torch.library.opcheck(ops.kl_div_from_logits, (x.clone().requires_grad_(), z), settings)
    torch.library.opcheck(ops.kl_div_forward, (x, z, 2.0, 0, None))
    torch.library.opcheck(ops.kl_div_forward_gradient, (x, z, 2.0, 3, torch.float64))
    torch.library.opcheck(ops.kl_div_backward, (torch.ones(6), x, z, 2.0, 0))


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor, got list"),
        ({"teacher": None}, TypeError, "teacher must be a tensor, got NoneType"),
        (
            {"student": torch.ones(4, 5, dtype=torch.int64)},
            TypeError,
            "student must be float32, .*, got Long",
        ),
        ({"teacher": torch.ones(4, 5, dtype=torch.complex64)}, TypeError, "teacher must be .*, got Complex"),
        (
            {"teacher": torch.ones(4, 6)},
            ValueError,
            r"teacher must have the shape of student, \[4, 5\], got \[4, 6\]",
        ),
        (
            {"teacher": torch.ones(5)},
            ValueError,
            r"teacher must have the shape of student, \[4, 5\], got \[5\]",
        ),
        ({"student": torch.tensor(1.0)}, ValueError, "student must have a dimension of classes"),
        ({"teacher": torch.ones(4, 5).to_sparse()}, ValueError, "teacher must be a dense tensor"),
        (
            {"teacher": torch.ones(4, 5, device="meta")},
            ValueError,
            "teacher must be on the device of student, cpu, got meta",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be a number > 0, .* got 0"),
        ({"temperature": -1}, ValueError, "temperature must be a number > 0, .* got -1"),
        ({"temperature": math.nan}, ValueError, "temperature must be a number > 0, .* got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a number > 0, .* got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction must be 'none', 'mean', 'sum' or 'batchmean', got 'avg'",
        ),
        ({"out_dtype": torch.int64}, TypeError, "out_dtype must be float32, .*, got Long"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"student": torch.ones(4, 5), "teacher": torch.ones(4, 5), **change}
    with pytest.raises(error, match=f"^kl_div_from_logits: {message}"):
        kl_div_from_logits(**arguments)


def test_a_reduction_that_the_operator_does_not_know():
    with pytest.raises(ValueError, match=r"reduction must be 0 \(none\), .*, got 4"):
        torch.ops.mbperf.kl_div_from_logits(*pair(4, 5), reduction=4)


# The page


def test_the_example_of_the_page_learns():
    page = (ROOT / "docs/kl_div.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    losses = names["losses"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]
