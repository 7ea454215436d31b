"""softcap of cross_entropy and cross_entropy_with_stats: against cap * tanh(x / cap) in torch's operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import DTYPES, REDUCTIONS, hard, layouts, logits, placed, probabilities, weights
from derivatives import check_backward_twice, functional_transforms
from devices import here
from stats_calls import usual_stats
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from mbperf import cross_entropy, cross_entropy_with_stats
from mbperf.extension import _C
from mbperf.testing import test_near

OPS = torch.ops.mbperf
SHAPES = [(5,), (4, 5), (3, 70), (2, 5, 3), (2, 70, 3)]

on_every_device = pytest.mark.usefixtures("device")


@pytest.fixture
def forced():
    yield _C.set_cross_entropy_path
    _C.set_cross_entropy_path(None)


def capped(x, cap):
    """As models write it."""
    return cap * torch.tanh(x / cap)


def usual(input, target, weight=None, *, softcap, dtype=None, **kwargs):
    """The loss in torch's operators, in float64 unless another dtype is asked for."""
    dtype = dtype or torch.float64
    y = target.to(dtype) if target.is_floating_point() else target
    x = input.to(dtype)
    if not target.is_floating_point():
        ignored = (target == kwargs.get("ignore_index", -100)).reshape(x.select(min(x.dim() - 1, 1), 0).shape)
        x = x.masked_fill(ignored.unsqueeze(min(x.dim() - 1, 1)), 0)
    return F.cross_entropy(capped(x, softcap), y, None if weight is None else weight.to(dtype), **kwargs)


def with_gradient(function, x, *args, **kwargs):
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    upstream = torch.linspace(1, 2, loss.numel()).to(loss).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def check(x, *args, places=8, **kwargs):
    """Loss and gradient are no more than twice as far from float64 as torch's in float32, and some places."""
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = with_gradient(usual, x.double(), *args, **kwargs)
    theirs = with_gradient(usual, x.to(wide), *args, dtype=wide, **kwargs)
    ours = with_gradient(cross_entropy, x, *args, out_dtype=wide, **kwargs)
    assert ours[1].dtype == x.dtype
    eps = torch.finfo(wide).eps, torch.finfo(x.dtype).eps
    for mine, reference, truth, place in zip(ours, theirs, exact, eps, strict=True):
        finite = truth.isfinite()
        assert torch.equal(mine.isfinite(), finite)
        truth = truth[finite]
        largest = truth.abs().max() if truth.numel() else 0
        allowed = 2 * (reference[finite] - truth).abs().max() + places * place * largest + place
        assert ((mine[finite] - truth).abs() <= allowed).all()


def targets_of(shape, dtype):
    """Targets of every kind, and settings beside them."""
    yield hard(*shape), {}
    yield hard(*shape), {"label_smoothing": 0.1}
    yield probabilities(*shape, dtype=dtype), {}


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype, instruction_set):
    width = {"avx512": 16, "avx2": 8, "baseline": 4}[instruction_set]
    for classes in (1, 2, 3, width - 1, width, width + 1, 2 * width + 3, 10, 64, 65, 300, 1000, 4097, 9000):
        for rows in (1, width + 1, 70) if classes < 4000 else (2,):
            for cap in (0.5, 4.0, 30.0):
                x = logits(rows, classes, dtype=dtype).detach() * 2
                check(x, hard(rows, classes), softcap=cap)


@pytest.mark.parametrize("cap", [1e-30, 0.5, 30.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_magnitude_of_a_logit(dtype, cap, instruction_set):
    """To four last places, from subnormal numbers to infinity: the lse of one class is its capped logit."""
    exponents = torch.linspace(-37, 38, 2_000, dtype=torch.float64)
    near = torch.linspace(0.01, 10, 2_000, dtype=torch.float64) * cap  # where tanh bends
    x = torch.cat([10**exponents, near, torch.tensor([0.0, math.inf])]).to(dtype)
    for values in (x, -x):
        y = torch.zeros(len(x), dtype=torch.int64)
        _, lse = cross_entropy(values.unsqueeze(1), y, softcap=cap, return_lse=True)
        exact = cap * torch.tanh(values.double() / cap)
        finfo = torch.finfo(lse.dtype)
        atol = 1e-37 + finfo.smallest_normal * finfo.eps * cap  # of x / cap where it is subnormal
        test_near(lse, exact, rtol=4 * finfo.eps, atol=atol, check_dtype=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (70, 10), (40, 100), (3, 9000), (2, 21, 6, 7), (2, 70, 3)], ids=str)
def test_every_kind_of_target(shape, dtype, reduction):
    x = logits(*shape, dtype=dtype).detach()
    for y, settings in targets_of(shape, dtype):
        for weight in (None, weights(*shape, dtype=dtype)):
            check(x, y, weight, softcap=2.0, reduction=reduction, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(70, 3), (70, 10), (33, 64), (40, 100), (5, 257), (1, 40_000), (2, 21, 6, 7), (2, 70, 3)],
    ids=str,
)
def test_paths_agree(shape, dtype, instruction_set, forced):
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    for name in _C.cross_entropy_paths(x, y):
        forced(name)
        check(x, y, softcap=2.0)


@on_every_device
@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_layout(name, x):
    x = placed(x)
    for y, settings in targets_of(x.shape, x.dtype):
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(leaf, y, softcap=2.0, **settings)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.is_contiguous()
        exact = usual(leaf, y, softcap=2.0, **settings)
        near = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
        test_near(loss, exact, **near)
        test_near(grad, torch.autograd.grad(exact, leaf)[0], **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 40, 100, 300, 5000])
def test_special_values(dtype, classes, instruction_set):
    """An infinite logit is the cap, with no gradient; a NaN reaches its row alone."""
    x = logits(6, classes, dtype=dtype).detach()
    x[0, 0], x[1, -1] = math.inf, -math.inf
    x[2] = -math.inf
    x[3, classes // 2] = math.nan
    y = torch.zeros(6, dtype=torch.int64)
    ours, exact = (with_gradient(f, x, y, softcap=2.0, reduction="none") for f in (cross_entropy, usual))
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    test_near(ours, exact, rtol=tolerance, atol=tolerance, check_dtype=False, equal_nan=True)
    assert ours[1][0, 0] == ours[1][1, -1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 40, 100, 300, 5000])
def test_an_ignored_row_is_never_read(classes, dtype, instruction_set):
    x, y = logits(40, classes, dtype=dtype).detach(), hard(40, classes).clamp_min_(0)
    live = torch.arange(40) % 3 > 0
    clean = with_gradient(cross_entropy, x, y, softcap=2.0, reduction="none")
    x[~live] = math.nan
    y[~live] = 255 + 5000
    for rows in (x, x.t().contiguous().t()):
        loss, grad = with_gradient(
            cross_entropy, rows, y, softcap=2.0, reduction="none", ignore_index=255 + 5000
        )
        test_near(loss[live], clean[0][live])
        test_near(grad[live], clean[1][live])
        assert (loss[~live] == 0).all()
        assert (grad[~live] == 0).all()


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (70, 10), (40, 100), (2, 9000), (2, 21, 6, 7)], ids=str)
def test_beside_statistics_and_other_options(shape, dtype):
    x, y = logits(*shape, dtype=dtype), hard(*shape)
    wide = torch.promote_types(dtype, torch.float32)
    options = {"softcap": 2.0, "z_loss": 0.01, "out_dtype": wide}
    loss, lse = cross_entropy(x, y, return_lse=True, **options)
    stats = cross_entropy_with_stats(x, y, **options)
    test_near(stats.loss, loss)
    of_lse = torch.autograd.grad(lse.sum(), x, retain_graph=True)[0]
    leaf = x.detach().double().requires_grad_()
    live = usual_stats(x, y)[1] >= 0
    exact = capped(leaf, 2.0).logsumexp(0 if len(shape) == 1 else 1) * live
    eps = torch.finfo(wide).eps
    test_near(lse, exact, rtol=16 * eps, atol=16 * eps, check_dtype=False)
    tolerance = max(64 * eps, 2 * torch.finfo(dtype).eps)
    test_near(of_lse, torch.autograd.grad(exact.sum(), leaf)[0], rtol=tolerance, atol=tolerance,
              check_dtype=False)  # fmt: skip
    entropy, predicted, probability = usual_stats(capped(x.detach().to(wide), 2.0), y)
    test_near(stats.entropy, entropy, rtol=64 * eps, atol=64 * eps, check_dtype=False)
    test_near(stats.probability, probability, rtol=64 * eps, atol=64 * eps, check_dtype=False)
    # The cap takes two logits that differ by their last place to one value, here or in torch.
    assert (stats.predicted == predicted).double().mean() > 0.9


@pytest.mark.parametrize(
    "shape", [(64, 10), (5000, 10), (300, 1000), (1, 128_256), (3, 50_257), (2, 21, 64, 64)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(with_gradient(cross_entropy, x, y, softcap=2.0))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


# Derivatives


@on_every_device
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_and_gradgradcheck(shape, reduction):
    x = logits(*shape, dtype=torch.float64)
    for y, settings in targets_of(shape, torch.float64):

        def loss(x, y=y, settings=settings):
            return cross_entropy(x, y, reduction=reduction, softcap=3.0, **settings)

        def both(x, y=y, settings=settings):
            return cross_entropy(x, y, reduction=reduction, softcap=3.0, return_lse=True, **settings)

        for function in (loss, both):
            assert gradcheck(function, x)
            if x.numel() < 40:
                assert gradgradcheck(function, x)


@on_every_device
def test_functional_transforms():
    x, y = logits(4, 5, dtype=torch.float64).detach(), hard(4, 5)
    for transform in functional_transforms(x, x.flip(0)):
        ours = transform(lambda x: cross_entropy(x, y, softcap=2.0))
        test_near(ours, transform(lambda x: F.cross_entropy(capped(x, 2.0), y)))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_backward_twice(reduction, dtype):
    x, y = logits(6, 40, dtype=dtype), hard(6, 40)
    check_backward_twice(cross_entropy(x, y, reduction=reduction, softcap=2.0), x, (1.0, 3.0))


def test_a_scaled_loss_keeps_what_float16_cannot_hold():
    x, y = logits(40, 1000, dtype=torch.float16), hard(40, 1000)
    (grad,) = torch.autograd.grad(cross_entropy(x, y, softcap=2.0, out_dtype=torch.float32) * 65536, x)
    leaf = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(usual(leaf, y, softcap=2.0) * 65536, leaf)
    test_near(grad, exact, rtol=2e-3, atol=1e-6, check_dtype=False)


def test_nothing_as_large_as_the_logits_beside_the_gradient():
    x, y = logits(300, 5000), hard(300, 5000)

    def call():
        torch.autograd.grad(cross_entropy(x, y, softcap=2.0), x)

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert [e.cpu_memory_usage for e in seen.events() if e.cpu_memory_usage >= x.nbytes // 4] in (
        [],
        [x.nbytes],
    )
    passes = [e.name for e in seen.events() if e.name.startswith("mbperf::")]
    assert passes.count("mbperf::cross_entropy_forward_softcap") == 1
    assert "mbperf::cross_entropy_backward_softcap" not in passes


# Other backends, the compiler, fake tensors, autocast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (9, 40), (2, 5, 3)], ids=str)
def test_the_composite_of_other_backends(shape, dtype):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    x = logits(*shape, dtype=dtype).detach()
    tolerance = {"rtol": max(1e-5, 2 * torch.finfo(dtype).eps), "atol": max(1e-6, torch.finfo(dtype).eps)}
    for y, settings in targets_of(shape, dtype):
        w = {"weight": weights(*shape, dtype=dtype)}
        args = x, y, 1, -100, settings.get("label_smoothing", 0.0), None, 0.01, 2.0, True
        composite = OPS.cross_entropy_forward_softcap.default.redispatch(keys, *args, **w)
        ours = OPS.cross_entropy_forward_softcap(*args, **w)
        test_near(composite[:2], ours[:2], **tolerance)
        saved = (torch.full_like(ours[0], 0.5), *args[:2], *ours[2:], 1, -100, args[4], 0.01, 2.0)
        grad = OPS.cross_entropy_backward_softcap.default.redispatch(keys, *saved, **w)
        test_near(grad, OPS.cross_entropy_backward_softcap(*saved, **w), **tolerance)


@on_every_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile(dynamic, dtype):
    torch._dynamo.reset()

    def step(x, y):
        return cross_entropy(x * 1, y, softcap=2.0) + cross_entropy(x, y, softcap=3.0, reduction="none").sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7, 9):
        x, y = logits(rows, 5, dtype=dtype), hard(rows, 5)
        ours, eager = compiled(x, y), step(x, y)
        test_near(ours, eager)
        test_near(torch.autograd.grad(ours, x), torch.autograd.grad(eager, x))


@on_every_device
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_and_fake_tensors(reduction):
    def described(x, y):
        loss = cross_entropy(x, y, reduction=reduction, softcap=2.0)
        return [(t.shape, t.dtype, t.stride()) for t in (loss, *torch.autograd.grad(loss.sum(), x))]

    x, y = logits(2, 5, 3, dtype=torch.bfloat16), hard(2, 5, 3)
    real = described(x, y)
    assert described(x.detach().to("meta").requires_grad_(), y.to("meta")) == real
    with FakeTensorMode() as mode:
        assert described(mode.from_tensor(x), mode.from_tensor(y)) == real


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    x = logits(6, 40, dtype=dtype)
    for y, settings in targets_of((6, 40), dtype):
        with torch.autocast(here(), dtype=torch.bfloat16):
            loss = cross_entropy(x, y, softcap=2.0, **settings)
            with_lse = cross_entropy(x, y, softcap=2.0, return_lse=True, **settings)
            hidden = cross_entropy(x * 1, y, softcap=2.0, inplace=True, **settings)
        assert loss.dtype == torch.float32
        test_near(loss, usual(x, y, softcap=2.0, **settings), rtol=1e-5, check_dtype=False)
        test_near([with_lse[0], hidden], [loss, loss])


def test_nothing_is_overwritten():
    x, y = logits(6, 40), hard(6, 40)
    hidden = x * 1
    before = hidden.detach().clone()
    loss = cross_entropy(hidden, y, softcap=2.0, inplace=True)
    assert torch.equal(hidden, before)
    test_near(torch.autograd.grad(loss, x)[0], torch.autograd.grad(usual(x, y, softcap=2.0), x)[0], rtol=1e-5)


# Bad input


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.nan, math.inf, 1e-31])
@pytest.mark.parametrize("autocast", [False, True])
def test_bad_caps_are_named(softcap, autocast):
    x, y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for function in (cross_entropy, cross_entropy_with_stats):
            with pytest.raises(ValueError, match="softcap must be a number between 1e-30 and 1e30 or None"):
                function(x, y, softcap=softcap)
            with pytest.raises(RuntimeError, match="'softcap'"):
                function(x, y, softcap="high")
