"""cross_entropy_with_stats: against float64 and argmax, on every path; what it shares with cross_entropy."""

import math

import pytest
import torch
from cross_entropy_calls import (
    DTYPES,
    REDUCTIONS,
    hard,
    layouts,
    logits,
    placed,
    probabilities,
    weights,
)
from derivatives import check_backward_twice, functional_transforms
from devices import here
from stats_calls import usual_stats
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
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


def batch(rows, classes, dtype, seed=0, spread=3.0):
    source = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, classes, generator=source, dtype=torch.float64) * spread).to(dtype)
    return x, torch.randint(0, classes, (rows,), generator=source)


def wide_eps(dtype):
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def check_stats(stats, x, y, *, equal_nan=False, places=32, **kwargs):
    """Entropy and probability near those of float64; exactly the class of argmax."""
    entropy, predicted, probability = usual_stats(x, y, **kwargs)
    atol = places * wide_eps(x.dtype) * max(1.0, math.log(x.shape[0 if x.dim() == 1 else 1]))
    assert torch.equal(stats.predicted, predicted)
    near = {"rtol": atol, "atol": atol, "check_dtype": False, "equal_nan": equal_nan}
    test_near(stats.entropy, entropy, **near)
    test_near(stats.probability, probability, **near)


def targets_of(shape, dtype):
    """Targets of every kind, and settings beside them."""
    yield hard(*shape), {}
    yield hard(*shape), {"label_smoothing": 0.1}
    yield probabilities(*shape, dtype=dtype), {}


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_of_every_number_of_classes(dtype, instruction_set):
    width = {"avx512": 16, "avx2": 8, "baseline": 4}[instruction_set]
    for classes in (1, 2, 3, width - 1, width, width + 1, 2 * width + 3, 10, 64, 65, 129, 1000, 4097, 9000):
        for rows in (1, width + 1, 70) if classes < 4000 else (2,):
            x, y = batch(rows, classes, dtype)
            check_stats(cross_entropy_with_stats(x, y), x, y)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (70, 10), (40, 100), (3, 9000), (2, 21, 6, 7), (2, 70, 3)], ids=str)
def test_loss_and_gradient_are_those_of_cross_entropy(shape, dtype, reduction, instruction_set):
    x = logits(*shape, dtype=dtype)
    for y, settings in targets_of(shape, dtype):
        for weight in (None, weights(*shape, dtype=dtype)):
            kwargs = {"weight": weight, "reduction": reduction, "z_loss": 0.01, **settings}
            ours, plain = cross_entropy_with_stats(x, y, **kwargs), cross_entropy(x, y, **kwargs)
            check_stats(ours, x, y)
            upstream = torch.linspace(1, 2, plain.numel()).to(plain).reshape(plain.shape)
            grads = [torch.autograd.grad(loss, x, upstream)[0] for loss in (ours.loss, plain)]
            if y.shape != x.shape and not settings:  # the same path
                assert torch.equal(ours.loss, plain)
                assert torch.equal(*grads)
            test_near(ours.loss, plain)
            test_near(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 3), (70, 10), (33, 64), (40, 100), (5, 257), (1, 40_000), (2, 21, 6, 7), (2, 70, 3)]
)
def test_paths_agree(shape, dtype, instruction_set, forced):
    x = logits(*shape, dtype=dtype)
    for y, settings in targets_of(shape, dtype):
        plain = cross_entropy(x, y, **settings)
        (expected,) = torch.autograd.grad(plain, x)
        for name in _C.cross_entropy_paths(x.detach(), y):
            forced(name)
            stats = cross_entropy_with_stats(x, y, **settings)
            check_stats(stats, x, y)
            test_near(stats.loss, plain)
            test_near(torch.autograd.grad(stats.loss, x)[0], expected)
        forced(None)


@on_every_device
@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_layout(name, x):
    x = placed(x)
    for y, settings in targets_of(x.shape, x.dtype):
        leaf = x.detach().requires_grad_()
        stats = cross_entropy_with_stats(leaf, y, **settings)
        check_stats(stats, leaf, y)
        test_near(stats.loss, cross_entropy(leaf, y, **settings))
        assert torch.autograd.grad(stats.loss, leaf)[0].is_contiguous()


# The predicted class


def every_layout_of_rows(x):
    """Rows (N, C) as they are, with classes apart, transposed, and as pixels."""
    yield x
    yield torch.stack([x, x.flip(1)], 2)[..., 0]
    yield x.t().contiguous().t()
    yield x.t().contiguous().unsqueeze(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 40, 100, 257, 4097, 9000])
def test_ties(dtype, classes, instruction_set):
    """The first of equal ones, wherever they are: also 0 and -0."""
    source = torch.Generator().manual_seed(classes)
    x = torch.randint(-2, 2, (40, classes), generator=source).to(dtype)
    x[0] = 0
    x[1] = -0.0
    x[2, ::2], x[2, 1::2] = -0.0, 0.0
    x[3] = -5
    x[3, classes // 2 :] = 7
    for rows in every_layout_of_rows(x):
        y = torch.zeros(rows.select(1, 0).shape, dtype=torch.int64)
        assert torch.equal(cross_entropy_with_stats(rows, y).predicted, rows.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 40, 100, 4097, 9000])
def test_special_values(dtype, classes, instruction_set):
    x, _ = batch(24, classes, dtype)
    x[0, :-1] = -math.inf  # one class is left
    x[1] = -math.inf
    x[2, classes // 2 :] = math.nan
    x[3, classes // 3] = math.inf
    x[4, -1], x[4, 0] = math.nan, math.inf
    x[5, classes // 2], x[5, -1] = -math.inf, math.inf
    x[6] = torch.linspace(3e38, -3e38, classes).to(dtype).nan_to_num()
    x[7] = -math.nan
    for rows in every_layout_of_rows(x):
        y = torch.zeros(rows.select(1, 0).shape, dtype=torch.int64)
        for settings in ({}, {"label_smoothing": 0.1}):
            stats = cross_entropy_with_stats(rows, y, **settings)
            assert torch.equal(stats.predicted, rows.argmax(1))
            check_stats(stats, rows, y, equal_nan=True)


@pytest.mark.parametrize("classes", [1, 3, 40, 100, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ignored_row_is_never_read(classes, dtype, instruction_set):
    x, y = batch(40, classes, dtype)
    clean = cross_entropy_with_stats(x, y, reduction="none")
    live = torch.arange(40) % 3 > 0
    x[~live] = math.nan
    y[~live] = 255
    for rows in every_layout_of_rows(x):
        holes = cross_entropy_with_stats(rows, y.view(rows.select(1, 0).shape), ignore_index=255)
        test_near(holes.loss, clean.loss[live].mean(), rtol=1e-2, check_dtype=False)
        assert torch.equal(holes.predicted.flatten()[live], clean.predicted[live])
        test_near(holes.entropy.flatten()[live], clean.entropy[live], atol=1e-6)
        for row, value in zip(holes[1:], (0, -1, 0), strict=True):
            assert (row.flatten()[~live] == value).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_peaked_rows(dtype, classes, instruction_set):
    """As the rest of the probability vanishes, so does the entropy, to the last place of float32."""
    x = torch.zeros(24, classes, dtype=torch.float64)
    x[:, 1] = torch.linspace(8, 80, 24)
    stats = cross_entropy_with_stats(x.to(dtype), torch.arange(24) % 3)
    z = -x[:, 1].to(dtype).double()
    rest = (classes - 1) * z.exp()
    exact = rest.log1p() - rest * z / (1 + rest)
    eps = wide_eps(dtype)
    # log(1 + rest) is off by the rounding of its argument.
    test_near(stats.entropy, exact, rtol=64 * eps, atol=(2 + classes / 4) * eps, check_dtype=False)
    assert (stats.entropy >= 0).all()
    assert (stats.predicted == 1).all()


@pytest.mark.parametrize(
    "shape",
    [(64, 10), (5000, 10), (700, 70), (300, 1000), (1, 128_256), (3, 50_257), (2, 21, 64, 64)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    x, y = logits(*shape, dtype=dtype), hard(*shape)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        stats = cross_entropy_with_stats(x, y)
        results.append((*stats, *torch.autograd.grad(stats.loss, x)))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@on_every_device
def test_dtypes_and_shapes_of_the_result():
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        x, y = logits(4, 5, 3, dtype=dtype), hard(4, 5, 3)
        for out_dtype in (None, *DTYPES):
            stats = cross_entropy_with_stats(x, y, out_dtype=out_dtype)
            assert [t.dtype for t in stats] == [out_dtype or dtype, wide, torch.int64, wide]
            assert [t.shape for t in stats] == [(), *[(4, 3)] * 3]
            assert [t.requires_grad for t in stats] == [True, False, False, False]
    one = cross_entropy_with_stats(logits(5), hard(5))
    assert [t.shape for t in one] == [()] * 4
    for empty in (torch.zeros(0, 5), torch.zeros(0, 5, 3), torch.zeros(2, 5, 0)):
        y = torch.zeros(empty.shape[:1] + empty.shape[2:], dtype=torch.int64)
        assert [t.shape for t in cross_entropy_with_stats(empty, y, reduction="sum")] == [(), *[y.shape] * 3]


# Derivatives


@on_every_device
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_and_gradgradcheck(shape, reduction):
    x = logits(*shape, dtype=torch.float64)
    for y, settings in targets_of(shape, torch.float64):

        def loss(x, y=y, settings=settings):
            return cross_entropy_with_stats(x, y, reduction=reduction, **settings).loss

        assert gradcheck(loss, x)
        if x.numel() < 40:
            assert gradgradcheck(loss, x)


@on_every_device
def test_functional_transforms():
    x, y = logits(4, 5, dtype=torch.float64).detach(), hard(4, 5)
    transforms = functional_transforms(x, x.flip(0))
    for transform in transforms:
        test_near(
            transform(lambda x: cross_entropy_with_stats(x, y).loss), transform(lambda x: cross_entropy(x, y))
        )
    batch = torch.stack([x, x.flip(0)])
    over_batch = torch.func.vmap(lambda x: cross_entropy_with_stats(x, y))(batch)
    for index, member in enumerate(batch):
        for together, alone in zip(over_batch, cross_entropy_with_stats(member, y), strict=True):
            test_near(together[index], alone)
    _, tangents = torch.func.jvp(lambda x: cross_entropy_with_stats(x, y)[1::2], (x,), (x,))
    assert all((tangent == 0).all() for tangent in tangents)


@on_every_device
def test_forward_mode():
    x, y = logits(4, 5, dtype=torch.float64).detach(), hard(4, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.flip(0))
        stats, loss = cross_entropy_with_stats(dual, y), cross_entropy(dual, y)
        tangents = [forward_ad.unpack_dual(each).tangent for each in (*stats, loss)]
    test_near(tangents[0], tangents[-1])
    assert tangents[1:-1] == [None] * 3


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_backward_twice(reduction, dtype):
    x, y = logits(6, 40, dtype=dtype), hard(6, 40)
    check_backward_twice(cross_entropy_with_stats(x, y, reduction=reduction).loss, x, (1.0, 3.0))


def test_targets_are_checked_in_forward_and_again_in_backward():
    x, y = logits(4, 5), hard(4, 5)
    loss = cross_entropy_with_stats(x, y).loss
    y.data[-1] = 5
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        loss.backward()
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        cross_entropy_with_stats(x, y)


def test_nothing_as_large_as_the_logits_beside_the_gradient():
    x, y = logits(300, 1000), hard(300, 1000)

    def call():
        torch.autograd.grad(cross_entropy_with_stats(x, y).loss, x)

    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        call()
    sizes = [e.cpu_memory_usage for e in seen.events() if e.cpu_memory_usage >= x.nbytes // 4]
    assert sizes in ([], [x.nbytes])
    passes = [e.name for e in seen.events() if e.name.startswith("mbperf::")]
    assert passes.count("mbperf::cross_entropy_forward_stats") == 1
    assert "mbperf::cross_entropy_backward" not in passes


# Other backends, the compiler, fake tensors, autocast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (9, 40), (2, 5, 3), (3, 6_000_000)], ids=str)
def test_the_composite_of_other_backends(shape, dtype, monkeypatch):
    if shape[-1] > 1000 and dtype != torch.bfloat16:
        pytest.skip("several chunks, of one dtype")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    x = logits(*shape, dtype=dtype).detach()
    for y, settings in targets_of(shape, dtype) if shape[-1] < 1000 else [(hard(*shape), {})]:
        for wants_gradient in (True, False):
            args = x, y, 1, -100, settings.get("label_smoothing", 0.0), None, 0.01, 0.0, wants_gradient
            composite = OPS.cross_entropy_forward_stats.default.redispatch(keys, *args)
            ours = OPS.cross_entropy_forward_stats(*args)
            live = (usual_stats(x, y)[1] >= 0).flatten()
            for k, (mine, reference) in enumerate(zip(composite, ours, strict=True)):
                if k in (2, 3):  # row_max and row_sum, which say nothing of a row that was ignored
                    mine, reference = mine[live], reference[live]
                test_near(mine, reference, rtol=max(1e-4, 2 * torch.finfo(dtype).eps), atol=1e-5)


@on_every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()

    def step(x, y):
        stats = cross_entropy_with_stats(x * 1, y, label_smoothing=0.1)
        return stats.loss + 0 * stats.entropy.sum(), stats.predicted == y, stats.probability

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7, 9):
        x, y = logits(rows, 5), hard(rows, 5)
        ours, eager = compiled(x, y), step(x, y)
        test_near(ours, eager)
        test_near(torch.autograd.grad(ours[0], x), torch.autograd.grad(eager[0], x))


@on_every_device
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_meta_and_fake_tensors(shape, reduction):
    def described(x, y):
        stats = cross_entropy_with_stats(x, y, reduction=reduction)
        grads = torch.autograd.grad(stats.loss.sum(), x)
        return [(t.shape, t.dtype, t.stride()) for t in (*stats, *grads)]

    x, y = logits(*shape, dtype=torch.bfloat16), hard(*shape)
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
            ours, plain = cross_entropy_with_stats(x, y, **settings), cross_entropy(x, y, **settings)
        assert ours.loss.dtype == plain.dtype == torch.float32
        test_near(ours.loss, plain)
        check_stats(ours, x, y)
    with torch.inference_mode():
        check_stats(cross_entropy_with_stats(x, y), x, y)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"input batch_size \(4\) to match target",
        ),
        ({"target": torch.zeros(4, dtype=torch.int32)}, RuntimeError, "target dtype to be Long or Byte"),
        ({"target": [0, 1, 2, 3]}, TypeError, "'target'"),
        ({"input": None}, TypeError, "'input'"),
        ({"input": None, "z_loss": 0.1}, TypeError, "input must be a tensor, got None"),
        ({"target": None, "softcap": 30.0}, TypeError, "target must be a tensor, got None"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight tensor should be defined either for all 5 classes"),
        ({"reduction": "avg"}, ValueError, "avg is not a valid value for reduction"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a number >= 0"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be float32"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    call = {"input": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        cross_entropy_with_stats(**call)
