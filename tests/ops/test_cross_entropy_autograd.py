"""Derivatives of every kind, and what happens between forward and backward."""

import cross_entropy_calls
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import REDUCTIONS, hard, weights
from derivatives import check_backward_twice, functional_transforms
from devices import here
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from mbperf import cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(5,), (4, 5), (3, 70), (2, 5, 3), (2, 70, 3)]


def logits(*shape, dtype=torch.float64):
    return cross_entropy_calls.logits(*shape, dtype=dtype)


def soft(*shape, dtype=torch.float64):
    return cross_entropy_calls.probabilities(*shape, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck_and_gradgradcheck(shape, reduction, smoothing):
    settings = {"reduction": reduction, "label_smoothing": smoothing, "weight": weights(*shape)}
    for target in (hard(*shape), soft(*shape)):
        for extras in ({}, {"z_loss": 0.1}, {"return_lse": True}):

            def loss(x, target=target, extras=extras):
                return cross_entropy(x, target, **settings, **extras)

            assert gradcheck(loss, logits(*shape))
            if shape in ((5,), (4, 5), (2, 5, 3)):
                assert gradgradcheck(loss, logits(*shape))


def test_probabilities_and_their_weight_are_differentiable():
    x, t, w = logits(4, 5), soft(4, 5).requires_grad_(), weights(4, 5).requires_grad_()
    for reduction in REDUCTIONS:
        ours = cross_entropy(x, t, w, reduction=reduction, label_smoothing=0.1).sum()
        theirs = F.cross_entropy(x, t, w, reduction=reduction, label_smoothing=0.1).sum()
        test_near(torch.autograd.grad(ours, (x, t, w)), torch.autograd.grad(theirs, (x, t, w)))
        settings = {"reduction": reduction, "label_smoothing": 0.1}
        assert gradcheck(lambda *leaves, s=settings: cross_entropy(*leaves, **s), (x, t, w))
        assert gradgradcheck(lambda *leaves, s=settings: cross_entropy(*leaves, **s), (x, t, w))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", [hard, soft], ids=["hard", "soft"])
def test_functional_transforms(reduction, target):
    x, t, tangent = logits(4, 5).detach(), target(4, 5), logits(4, 5).detach().flip(0)

    def of(function):
        return lambda x: function(x, t, reduction=reduction)

    for transform in (
        *functional_transforms(x, tangent),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])).sum())(x),
    ):
        test_near(transform(of(cross_entropy)), transform(of(F.cross_entropy)))


def test_vmap_over_targets_and_per_sample_gradients():
    x, y = logits(6, 5).detach(), hard(6, 5).clamp(min=0)
    ours = torch.func.vmap(torch.func.grad(cross_entropy))(x, y)
    test_near(ours, torch.func.vmap(torch.func.grad(F.cross_entropy))(x, y))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "target"), [((4, 5), hard), ((3, 70), hard), ((4, 5), soft)])
def test_vectorised_jacobians_and_hessians(shape, target, reduction):
    # Upstream gradients under vmap: one backward for all rows of the jacobian.
    x, y = logits(*shape).detach(), target(*shape)

    def of(function):
        return lambda x: function(x, y, reduction=reduction)

    for transform in (
        lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True),
        lambda f: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True),
    ):
        test_near(transform(of(cross_entropy)), transform(of(F.cross_entropy)))


def test_forward_mode():
    x, tangent = logits(4, 5), logits(4, 5).detach().flip(0)
    for op in (cross_entropy, F.cross_entropy):
        with forward_ad.dual_level():
            dual = op(forward_ad.make_dual(x, tangent), hard(4, 5))
            derivative = forward_ad.unpack_dual(dual).tangent
        if op is cross_entropy:
            ours = derivative
    assert ours is not None
    test_near(ours, derivative)


@pytest.mark.parametrize("classes", [5, 70, 5000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_gives_the_same_bits(classes, reduction):
    x = logits(3, classes, dtype=torch.float32)
    loss = cross_entropy(x, hard(3, classes), reduction=reduction).sum()
    check_backward_twice(loss, x, (1.0, 0.3))


def test_the_gradient_of_a_leaf_is_not_copied():
    x = logits(300, 1000, dtype=torch.float32)
    loss = cross_entropy(x, hard(300, 1000))
    seen = []
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss.backward()
    assert seen == [x.grad.data_ptr()]


@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upstream_gradient(scale, dtype):
    x = logits(6, 40, dtype=dtype)
    (ours,) = torch.autograd.grad(cross_entropy(x, hard(6, 40), out_dtype=torch.float32) * scale, x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(wide, hard(6, 40)) * scale, wide)
    test_near(ours, exact.to(dtype), atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_scaling_saves_what_float16_cannot_hold(reduction):
    # softmax / N is below 6e-8, the least float16, before it is scaled: as with torch.amp.GradScaler.
    x = logits(512, 8_000, dtype=torch.float16)
    y, scale = hard(512, 8_000), 2.0**16 if reduction == "mean" else 2.0**15
    loss = cross_entropy(x, y, reduction=reduction, out_dtype=torch.float32)
    (ours,) = torch.autograd.grad(loss * scale, x, retain_graph=True)
    wide = x.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(wide, y, reduction=reduction) * scale, wide)
    test_near(ours, exact.half(), rtol=2e-3, atol=1e-7)
    assert torch.equal(torch.autograd.grad(loss * scale, x)[0], ours)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [7, -1, 2**40])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (3, 5000)])
def test_targets_are_checked_again_in_backward(reduction, bad, shape):
    if here() == "cuda":
        pytest.skip("a wrong target ends the process's use of the GPU; test_cuda_device.py has it in another")
    x, y = logits(*shape, dtype=torch.float32), hard(*shape).clamp(min=0)
    bad = bad if bad != 7 else shape[1]
    loss = cross_entropy(x, y, reduction=reduction).sum()
    y.data.view(-1)[-1] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_changed_in_place_is_noticed(reduction):
    x, y = logits(4, 5, dtype=torch.float32), hard(4, 5)
    loss = cross_entropy(x, y, reduction=reduction).sum()
    y.zero_()  # not behind the version counter's back, as through .data
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_under_activation_checkpointing(use_reentrant, reduction):
    x, y = logits(6, 40, dtype=torch.float32), hard(6, 40)

    def loss(x):
        return cross_entropy(x * 2, y, reduction=reduction).sum()

    recomputed = checkpoint(loss, x, use_reentrant=use_reentrant)
    test_near(torch.autograd.backward(recomputed) or x.grad, torch.autograd.grad(loss(x), x)[0])


def test_an_input_changed_in_place_is_noticed_where_it_is_read_again():
    x = logits(4, 5, dtype=torch.float32) * 1
    y = hard(4, 5)
    loss = cross_entropy(x, y, reduction="none").sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    leaf = logits(4, 5, dtype=torch.float32)
    x = leaf * 1
    loss = cross_entropy(x, y)  # like F.cross_entropy, which does not read the logits again
    x.zero_()
    loss.backward()
    test_near(leaf.grad, torch.autograd.grad(F.cross_entropy(leaf, y), leaf)[0])


@pytest.mark.parametrize("classes", [5, 70, 5000, 40_000])
@pytest.mark.parametrize("target", [hard, lambda *s: soft(*s, dtype=torch.float32)], ids=["hard", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_inplace(classes, target, smoothing):
    leaf = logits(3, classes, dtype=torch.float32)
    settings = {"label_smoothing": smoothing}
    expected = F.cross_entropy(leaf, target(3, classes), **settings)
    hidden = leaf * 1
    pointer, version = hidden.data_ptr(), hidden._version
    loss = cross_entropy(hidden, target(3, classes), inplace=True, **settings)
    assert hidden._version > version
    test_near(loss, expected)
    grads = []
    hidden.register_hook(lambda grad: grads.append(grad.data_ptr()))
    (ours,) = torch.autograd.grad(loss, leaf)
    assert grads == [pointer]
    test_near(ours, torch.autograd.grad(expected, leaf)[0])


def test_inplace_does_not_lie():
    leaf, y = logits(4, 5, dtype=torch.float32), hard(4, 5)
    with pytest.raises(RuntimeError, match="inplace=True would overwrite input, a leaf that requires grad"):
        cross_entropy(leaf, y, inplace=True)
    hidden = leaf * 1
    square = hidden * hidden  # saves hidden for its backward
    loss = cross_entropy(hidden, y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square.sum()).backward()
    hidden = leaf * 1
    loss = cross_entropy(hidden, y, inplace=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True has overwritten them"):
        torch.autograd.grad(loss, leaf)
    plain = leaf.detach().clone()
    before = plain.clone()
    cross_entropy(plain, y, inplace=True)
    assert torch.equal(plain, before)  # no gradient is wanted, so none is written


def test_inplace_refuses_probabilities_in_the_same_memory():
    hidden = logits(4, 5, dtype=torch.float32) * 1
    with pytest.raises(RuntimeError, match="inplace=True would overwrite target"):
        cross_entropy(hidden, hidden.detach(), inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True would overwrite weight"):
        cross_entropy(hidden, hard(4, 5), weight=hidden.detach()[0], inplace=True)
