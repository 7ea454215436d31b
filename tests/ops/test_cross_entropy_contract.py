"""The contract of F.cross_entropy: its errors, sizes, layouts, dtypes, and where we differ on purpose."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import (
    DTYPES,
    REDUCTIONS,
    assert_same_outcome,
    indices,
    layouts,
    logits,
    moved,
    on_the_cpu,
    outcome,
    placed,
    probabilities,
)
from devices import here

from mbperf import cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")


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
        outcome(cross_entropy, x, y, reduction=reduction),
        outcome(on_the_cpu(F.cross_entropy), x, y, reduction=reduction),
    )


IGNORED = [0, 3, 4, -1, -5, -100, 256, 2**40, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("ignore_index", IGNORED)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (3, 5, 4), (3, 300), (3, 5000)], ids=str)
def test_ignore_index_of_any_value(ignore_index, shape):
    C = shape[0 if len(shape) == 1 else 1]
    x, y = logits(*shape), indices(C, *([] if len(shape) == 1 else [shape[0], *shape[2:]]))
    for some in (y[::2] if y.dim() else y, y):  # some of them, then all
        some.fill_(ignore_index)
        for reduction, smoothing in itertools.product(REDUCTIONS, [0.0, 0.1]):
            kwargs = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
            assert_same_outcome(
                outcome(cross_entropy, x, y, **kwargs), outcome(on_the_cpu(F.cross_entropy), x, y, **kwargs)
            )


@pytest.mark.parametrize("ignore_index", [-100, 3, 255, 300, 3 - 256])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (4, 256), (4, 300), (4, 5000)], ids=str)
def test_uint8_targets(shape, ignore_index):
    C, positions = shape[-1], () if len(shape) == 1 else shape[:1]
    x, y = logits(*shape), indices(min(C, 256), *positions).byte()
    if positions:
        y[0], y[1] = min(C, 256) - 1, 3  # 255 is a class, and the sign bit of a byte
    for reduction, smoothing in itertools.product(REDUCTIONS, [0.0, 0.1]):
        kwargs = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
        # torch's smoothing takes ignore_index modulo 256, the rest of it does not: int64 says what is due.
        same = y.long() if ignore_index < 0 else y
        assert_same_outcome(
            outcome(cross_entropy, x, y, **kwargs), outcome(on_the_cpu(F.cross_entropy), x, same, **kwargs)
        )
    strided = torch.stack([y, y.flip(0) if positions else y], -1)[..., 0]
    assert not positions or not strided.is_contiguous()
    assert_same_outcome(outcome(cross_entropy, x, strided), outcome(cross_entropy, x, y))


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (3, 300), (3, 5000)], ids=str)
def test_only_targets_of_weight_zero(shape):
    w = torch.ones(shape[1], device=here())
    w[2] = 0
    x, y = logits(*shape), torch.full((shape[0], *shape[2:]), 2, device=here())
    for reduction in REDUCTIONS:
        ours = outcome(cross_entropy, x, y, weight=w, reduction=reduction)
        assert_same_outcome(ours, outcome(F.cross_entropy, x, y, weight=w, reduction=reduction))
    loss, (grad,) = outcome(cross_entropy, x, y, weight=w)
    assert loss.isnan()
    assert grad.isnan().all()


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


@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_soft_dtypes_are_promoted(input_dtype, target_dtype):
    x, t = logits(3, 5, dtype=input_dtype), probabilities(3, 5, dtype=target_dtype)
    ours, theirs = outcome(cross_entropy, x, t), outcome(F.cross_entropy, x, t)
    assert ours[0].dtype == torch.promote_types(input_dtype, target_dtype)
    assert_same_outcome(ours, theirs, rtol=2e-2, atol=2e-2)
    assert_same_outcome(twice(cross_entropy, x, t), twice(F.cross_entropy, x, t), rtol=5e-2, atol=2e-2)


def twice(function, x, t):
    """The gradient of the squared gradient, with respect to logits and probabilities."""
    t = t.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x, t, label_smoothing=0.1), x, create_graph=True)
    return grad, torch.autograd.grad(grad.square().sum(), (x, t))


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
