"""The contract of F.cross_entropy: torch's own samples, its errors, and where we differ on purpose."""

import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from devices import generator, here
from torch import nn
from torchs_samples import common_modules, invocations

import mbperf
from mbperf import CrossEntropyLoss, cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


def outcome(function, *args, **kwargs):
    """The value and the gradients of a call, or the type and first line of what it raised."""
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    try:
        value = function(*args, **kwargs)
        grads = torch.autograd.grad(value.sum(), leaves) if leaves else ()
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return value, grads


def assert_same_outcome(ours, theirs, **tolerances):
    assert isinstance(ours[0], type) == isinstance(theirs[0], type), (ours, theirs)
    if isinstance(theirs[0], type):
        assert ours == theirs
        return
    test_near(ours[0], theirs[0], equal_nan=True, **tolerances)
    for mine, reference in zip(ours[1], theirs[1], strict=True):
        test_near(mine, reference, equal_nan=True, **tolerances)


def samples_of(sample_inputs, dtype):
    torch.manual_seed(0)
    op = next(op for op in invocations.op_db if op.name == "nn.functional.cross_entropy")
    return list(sample_inputs(op, here(), dtype, requires_grad=True))


def assert_same_on(samples, dtype):
    for s in samples:
        ours = outcome(cross_entropy, s.input, *s.args, **s.kwargs)
        theirs = outcome(F.cross_entropy, s.input, *s.args, **s.kwargs)
        if dtype in (torch.bfloat16, torch.float16) and not isinstance(theirs[0], type):
            # torch rounds every step in half precision; its dtypes count, its values in float32.
            wide = outcome(
                F.cross_entropy,
                *widened([s.input, *s.args]),
                **dict(zip(s.kwargs, widened(s.kwargs.values()), strict=True)),
            )
            theirs = (
                wide[0].to(theirs[0].dtype),
                [w.to(t.dtype) for w, t in zip(wide[1], theirs[1], strict=True)],
            )
            assert_same_outcome(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        else:
            assert_same_outcome(ours, theirs)


def widened(values):
    return [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples_of_cross_entropy(dtype):
    samples = samples_of(invocations.sample_inputs_cross_entropy, dtype)
    assert_same_on(samples, dtype)
    print(f"sample_inputs_cross_entropy, {dtype}: {len(samples)} samples agree")
    assert len(samples) >= 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples_of_nll_loss(dtype):
    samples = samples_of(invocations.sample_inputs_nll_loss, dtype)
    assert_same_on(samples, dtype)
    print(f"sample_inputs_nll_loss, {dtype}: {len(samples)} samples agree")
    assert len(samples) >= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_samples_of_the_module(dtype):
    torch.manual_seed(0)
    info = next(m for m in common_modules.module_db if m.module_cls is nn.CrossEntropyLoss)
    inputs = common_modules.module_inputs_torch_nn_CrossEntropyLoss(
        info, device=here(), dtype=dtype, requires_grad=True, training=True
    )
    for i in inputs:
        make, call = i.constructor_input, i.forward_input
        ours = outcome(CrossEntropyLoss(*make.args, **make.kwargs), *call.args, **call.kwargs)
        theirs = outcome(nn.CrossEntropyLoss(*make.args, **make.kwargs), *call.args, **call.kwargs)
        # Sums of terms of both signs (the generator's weights are negative too) cancel in float32.
        assert_same_outcome(ours, theirs, **({"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}))
    print(f"module_inputs_torch_nn_CrossEntropyLoss, {dtype}: {len(inputs)} samples agree")
    assert len(inputs) >= 100


def test_torchs_error_samples_of_the_module():
    info = next(m for m in common_modules.module_db if m.module_cls is nn.CrossEntropyLoss)
    inputs = common_modules.module_error_inputs_torch_nn_CrossEntropyLoss(
        info, device=here(), dtype=torch.float32, requires_grad=False, training=False
    )
    for i in inputs:
        make, call = i.module_error_input.constructor_input, i.module_error_input.forward_input
        with pytest.raises(i.error_type, match=i.error_regex):
            CrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)
    print(f"module_error_inputs_torch_nn_CrossEntropyLoss: {len(inputs)} samples agree")
    assert inputs


def logits(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).mul_(3)
    return values.to(here(), dtype).requires_grad_()


def indices(classes, *shape, seed=1):
    return torch.randint(0, classes, shape, generator=generator(seed)).to(here())


def probabilities(*shape, dtype=torch.float32, seed=2):
    dim = 0 if len(shape) == 1 else 1
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).softmax(dim)
    return values.to(here(), dtype)


def moved(function):
    """The function, with the tensors of its calls on the device of this test."""

    def place(value):
        return value.to(here()) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    def call(*args, **kwargs):
        return function(*map(place, args), **{name: place(value) for name, value in kwargs.items()})

    return call


BAD_CALLS = {
    "reduction": lambda f: f(logits(3, 5), indices(5, 3), reduction="avg"),
    "batch": lambda f: f(logits(4, 5), indices(5, 3)),
    "column of targets": lambda f: f(logits(3, 5), indices(5, 3, 1)),
    "target above": lambda f: f(logits(3, 5), torch.tensor([0, 5, 1])),
    "target below": lambda f: f(logits(3, 5), torch.tensor([0, -5, 1])),
    "target above, smoothed": lambda f: f(logits(3, 5), torch.tensor([0, 5, 1]), label_smoothing=0.1),
    "target above, K-dim": lambda f: f(logits(2, 5, 3), torch.full((2, 3), 9)),
    "int32 target": lambda f: f(logits(3, 5), indices(5, 3).int()),
    "bool target": lambda f: f(logits(3, 5), torch.tensor([True, False, True])),
    "uint8 target, K-dim": lambda f: f(logits(3, 5, 4), indices(5, 3, 4).byte()),
    "list target": lambda f: f(logits(3, 5), [0, 1, 2]),
    "integer logits": lambda f: f(torch.ones(3, 5).long(), indices(5, 3)),
    "complex logits": lambda f: f(torch.ones(3, 5, dtype=torch.cfloat), indices(5, 3)),
    "scalar logits": lambda f: f(torch.tensor(1.0), torch.tensor(0)),
    "smoothing": lambda f: f(logits(3, 5), indices(5, 3), label_smoothing=1.5),
    "weight length": lambda f: f(logits(3, 5), indices(5, 3), weight=torch.ones(4)),
    "weight shape": lambda f: f(logits(3, 5), indices(5, 3), weight=torch.ones(5, 1)),
    "weight dtype": lambda f: f(logits(3, 5), indices(5, 3), weight=torch.ones(5).double()),
    "half and float weight": lambda f: f(logits(3, 5, dtype=torch.half), indices(5, 3), weight=torch.ones(5)),
    "weight requires grad": lambda f: f(
        logits(3, 5), indices(5, 3), weight=torch.ones(5, requires_grad=True)
    ),
    "soft weight length": lambda f: f(logits(3, 5), probabilities(3, 5), weight=torch.ones(4)),
    "soft and ignored": lambda f: f(logits(3, 5), probabilities(3, 5), ignore_index=2),
    "soft shape": lambda f: f(logits(3, 5), probabilities(3, 4)),
    "K-dim target shape": lambda f: f(logits(3, 5, 4, 4), indices(5, 3, 4, 5)),
    "1-D, two targets": lambda f: f(logits(5), torch.tensor([2, 3])),
    "no classes": lambda f: f(torch.zeros(3, 0), torch.zeros(3).long()),
    "meta logits": lambda f: f(torch.zeros(3, 5, device="meta"), indices(5, 3)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_are_torchs(name):
    if here() == "cuda" and name.startswith(("target above", "target below", "no classes")):
        pytest.skip("a wrong target ends the process's use of the GPU; test_cuda_device.py has it in another")
    ours, theirs = (
        outcome(lambda: BAD_CALLS[name](moved(cross_entropy))),
        outcome(lambda: BAD_CALLS[name](moved(F.cross_entropy))),
    )
    assert isinstance(theirs[0], type), "torch accepts this"
    assert ours == theirs


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: (logits(0, 5), torch.zeros(0).long()),
        lambda: (logits(0, 0), torch.zeros(0).long()),
        lambda: (logits(3, 5, 1, 0), torch.zeros(3, 1, 0).long()),
        lambda: (logits(0, 5), torch.zeros(0, 5)),
        lambda: (logits(3, 1), torch.zeros(3).long()),
        lambda: (logits(5), torch.tensor(2)),
        lambda: (logits(5), torch.tensor(2).byte()),
        lambda: (logits(5), probabilities(5)),
        lambda: (logits(5), torch.tensor(-100)),
        lambda: (logits(4, 5), indices(5, 4).byte()),
        lambda: (logits(4, 5), torch.full((4,), -100)),
        lambda: (logits(2, 5, 3), torch.full((2, 3), -100)),
    ],
)
def test_degenerate_sizes(make, reduction):
    x, y = (tensor.to(here()) for tensor in make())
    assert_same_outcome(
        outcome(cross_entropy, x, y, reduction=reduction), outcome(F.cross_entropy, x, y, reduction=reduction)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_target_in_a_vector_for_one_dimensional_logits(reduction):
    one, zero_dim = torch.tensor([2], device=here()), torch.tensor(2, device=here())
    x = logits(5)  # F.cross_entropy takes it too, but torch 2.13 fails in backward
    test_near(cross_entropy(x, one, reduction=reduction),
              F.cross_entropy(x, one, reduction=reduction))  # fmt: skip
    assert_same_outcome(
        outcome(cross_entropy, x, one, reduction=reduction),
        outcome(F.cross_entropy, x, zero_dim, reduction=reduction),
    )


def layouts():
    """The same logits (4, 6, 5, 7) or (12, 6) in every memory layout a user may bring."""
    yield "contiguous", logits(4, 6, 5, 7).detach()
    yield "channels_last", logits(4, 6, 5, 7).detach().contiguous(memory_format=torch.channels_last)
    yield "transposed pixels", logits(4, 6, 7, 5).detach().transpose(2, 3)
    yield "batch last", logits(6, 5, 7, 4).detach().permute(3, 0, 1, 2)
    yield "sliced pixels", logits(4, 6, 5, 14).detach()[..., ::2]
    yield "expanded pixels", logits(4, 6, 1, 7).detach().expand(4, 6, 5, 7)
    yield "one pixel", logits(4, 6, 1, 1).detach()
    yield "rows", logits(12, 6).detach()
    yield "transposed", logits(6, 12).detach().t()
    yield "sliced rows", logits(24, 6).detach()[::2]
    yield "sliced classes", logits(12, 12).detach()[:, ::2]
    yield "narrowed classes", logits(12, 9).detach()[:, 1:7]
    yield "expanded rows", logits(1, 6).detach().expand(12, 6)
    yield "expanded classes", logits(12, 1).detach().expand(12, 6)
    yield "wide, transposed", logits(130, 70).detach().t()
    yield "wide, channels_last", logits(2, 130, 3, 5).detach().contiguous(memory_format=torch.channels_last)
    yield "wide, pixels", logits(2, 130, 3, 5).detach()
    yield "wide, sliced classes", logits(7, 300).detach()[:, ::2]


def placed(x):
    """The tensor, strides and all, on the device of this test."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(here())
    return memory.as_strided(x.size(), x.stride(), x.storage_offset())


@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_layouts(name, x, soft):
    C, x = x.shape[1], placed(x)
    y = probabilities(*x.shape) if soft else indices(C, x.shape[0], *x.shape[2:])
    if not soft:
        y.view(-1)[::5] = 3
    settings = itertools.product(
        REDUCTIONS, [None, torch.rand(C).to(here())], [0.0, 0.1], [-100] if soft else [-100, 3]
    )
    for reduction, weight, smoothing, ignore_index in settings:
        kwargs = {
            "reduction": reduction, "weight": weight, "label_smoothing": smoothing,
            "ignore_index": ignore_index,
        }  # fmt: skip
        before = x.clone()
        leaf = x.detach().requires_grad_()  # keeps the strides
        ours = outcome(cross_entropy, leaf, y, **kwargs)
        assert_same_outcome(ours, outcome(F.cross_entropy, leaf, y, **kwargs), atol=2e-5, rtol=1e-5)
        assert torch.equal(x, before)
        if "expanded" not in name:
            assert ours[1][0].is_contiguous()


def test_expanded_targets_and_weights():
    x = logits(8, 5)
    y = torch.tensor([3], device=here()).expand(8)
    w = torch.tensor([0.5], device=here()).expand(5)
    assert_same_outcome(outcome(cross_entropy, x, y, weight=w), outcome(F.cross_entropy, x, y, weight=w))


def test_soft_dtypes_are_promoted():
    for input_dtype, target_dtype in itertools.product(DTYPES, DTYPES):
        x, t = logits(3, 5, dtype=input_dtype), probabilities(3, 5, dtype=target_dtype)
        ours, theirs = outcome(cross_entropy, x, t), outcome(F.cross_entropy, x, t)
        assert_same_outcome(ours, theirs, rtol=2e-2, atol=2e-2)


def test_legacy_arguments():
    x, y = logits(4, 5), indices(5, 4)
    for size_average, reduce in itertools.product([None, True, False], repeat=2):
        kwargs = {"size_average": size_average, "reduce": reduce}
        with warnings.catch_warnings(record=True) as ours_warned:
            ours = outcome(cross_entropy, x, y, **kwargs)
        with warnings.catch_warnings(record=True) as theirs_warned:
            theirs = outcome(F.cross_entropy, x, y, **kwargs)
        assert_same_outcome(ours, theirs)
        assert [str(w.message) for w in ours_warned] == [str(w.message) for w in theirs_warned]


def test_it_can_stand_in_for_f_cross_entropy(monkeypatch):
    x, y = logits(4, 5), indices(5, 4)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(x, y)
    calls = []

    @functools.wraps(cross_entropy)
    def counted(*args, **kwargs):
        calls.append(args)
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", counted)
    test_near(nn.CrossEntropyLoss(label_smoothing=0.1)(x, y), expected)
    assert len(calls) == 1


def test_tensor_subclasses_are_heard():
    class Logged(torch.Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = logits(4, 5).detach().as_subclass(Logged)
    loss = cross_entropy(x, indices(5, 4))
    assert mbperf.cross_entropy in Logged.seen
    test_near(loss.as_subclass(torch.Tensor), F.cross_entropy(x.as_subclass(torch.Tensor), indices(5, 4)))


# Where we differ on purpose.


@pytest.mark.parametrize("classes", [3, 10, 65, 200, 5000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_position_is_never_read(classes, reduction):
    x = logits(5, classes).detach()
    clean = x.clone()
    x[2] = float("nan")
    y = indices(classes, 5)
    y[2] = -100
    x.requires_grad_()
    loss = cross_entropy(x, y, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(grad[2], torch.zeros_like(grad[2]))
    clean.requires_grad_()
    expected = F.cross_entropy(clean, y, reduction=reduction)
    test_near(loss, expected)
    test_near(grad, torch.autograd.grad(expected.sum(), clean)[0])


def test_half_precision_losses_are_accumulated_in_float32():
    x, y = torch.zeros(40_000, 10, dtype=torch.float16, device=here()), indices(10, 40_000)
    assert F.cross_entropy(x, y).isinf() or here() != "cpu"
    test_near(cross_entropy(x, y), torch.tensor(10.0, device=here()).log().half())
    x = logits(4096, 1000, dtype=torch.bfloat16).detach()
    exact = F.cross_entropy(x.double(), indices(1000, 4096))
    test_near(cross_entropy(x, indices(1000, 4096)), exact.bfloat16())
    test_near(cross_entropy(x, indices(1000, 4096), out_dtype=torch.float32), exact.float())


# Extras.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [7, 130, 5000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_z_loss(classes, reduction, weighted, soft):
    x = logits(6, classes, dtype=torch.float64)
    y = probabilities(6, classes, dtype=torch.float64) if soft else indices(classes, 6)
    if not soft:
        y[4] = -100
    weight = torch.rand(classes, dtype=torch.float64).to(here()) if weighted else None
    live = torch.ones(6, device=here()) if soft else (y != -100).double()
    squares = x.logsumexp(1).square() * live
    penalty = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / live.sum()}[reduction]
    expected = F.cross_entropy(x, y, weight=weight, reduction=reduction) + 0.01 * penalty
    loss = cross_entropy(x, y, weight=weight, reduction=reduction, z_loss=0.01)
    test_near(loss, expected)
    upstream = torch.rand_like(expected)
    test_near(torch.autograd.grad(loss, x, upstream), torch.autograd.grad(expected, x, upstream))


@pytest.mark.parametrize("shape", [(5,), (4, 9), (3, 9, 5), (2, 200, 3, 3), (3, 5000)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_return_lse(shape, reduction):
    x = logits(*shape, dtype=torch.float64)
    dim = 0 if len(shape) == 1 else 1
    y = indices(shape[dim], *shape[:dim], *shape[dim + 1 :])
    loss, lse = cross_entropy(x, y, reduction=reduction, return_lse=True)
    expected = F.cross_entropy(x, y, reduction=reduction), x.logsumexp(dim)
    test_near((loss, lse), expected)
    upstream = torch.rand_like(loss), torch.rand_like(lse)
    test_near(torch.autograd.grad((loss, lse), x, upstream), torch.autograd.grad(expected, x, upstream))
    with torch.no_grad():
        test_near(cross_entropy(x, y, reduction=reduction, return_lse=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_out_dtype(dtype, out_dtype, reduction):
    x, y = logits(4, 30, dtype=dtype), indices(30, 4)
    loss = cross_entropy(x, y, reduction=reduction, out_dtype=out_dtype)
    assert loss.dtype == out_dtype
    loss.sum().backward()
    assert x.grad.dtype == dtype


def test_extras_refuse_nonsense():
    x, y = logits(4, 5), indices(5, 4)
    with pytest.raises(ValueError, match="z_loss must be a number >= 0, got -1"):
        cross_entropy(x, y, z_loss=-1.0)
    with pytest.raises(ValueError, match="z_loss must be a number >= 0, got nan"):
        cross_entropy(x, y, z_loss=float("nan"))
    with pytest.raises(TypeError, match="out_dtype must be float32, float64, bfloat16 or float16, got Long"):
        cross_entropy(x, y, out_dtype=torch.long)
