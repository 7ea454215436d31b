"""Derivatives of every kind, the compiler, autocast, and what happens between forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from devices import generator, here
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing._internal.optests import opcheck

from mbperf import cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")

REDUCTIONS = ["none", "mean", "sum"]
OPS = torch.ops.mbperf
SHAPES = [(5,), (4, 5), (3, 70), (2, 5, 3), (2, 70, 3)]


def logits(*shape, dtype=torch.float64):
    values = torch.randn(*shape, generator=generator(0), dtype=torch.float64)
    return values.to(here(), dtype).requires_grad_()


def hard(*shape):
    dim = 0 if len(shape) == 1 else 1
    y = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]), generator=generator(1))
    if y.numel() > 2:
        y.view(-1)[1] = -100
    return y.to(here())


def soft(*shape, dtype=torch.float64):
    dim = 0 if len(shape) == 1 else 1
    x = torch.randn(*shape, generator=generator(2), dtype=torch.float64)
    return x.softmax(dim).to(here(), dtype)


def weights(*shape):
    classes = shape[0 if len(shape) == 1 else 1]
    return torch.rand(classes, generator=generator(3), dtype=torch.float64).to(here())


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
    assert gradcheck(cross_entropy, (x, t, w))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", [hard, soft], ids=["hard", "soft"])
def test_functional_transforms(reduction, target):
    x, t, tangent = logits(4, 5).detach(), target(4, 5), logits(4, 5).detach().flip(0)

    def of(function):
        return lambda x: function(x, t, reduction=reduction)

    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jacfwd(f)(x),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, tangent])),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, tangent])),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])).sum())(x),
    ):
        test_near(transform(of(cross_entropy)), transform(of(F.cross_entropy)))


def test_vmap_over_targets_and_per_sample_gradients():
    x, y = logits(6, 5).detach(), hard(6, 5).clamp(min=0)
    ours = torch.func.vmap(torch.func.grad(cross_entropy))(x, y)
    test_near(ours, torch.func.vmap(torch.func.grad(F.cross_entropy))(x, y))


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
    for scale in (1.0, 0.3):
        first, second = (
            torch.autograd.grad(loss, x, loss.new_tensor(scale), retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(dynamic, reduction):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: cross_entropy(x * 1, y, reduction=reduction, label_smoothing=0.1).sum(),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for rows in (4, 7, 9):
        x, y = logits(rows, 5, dtype=torch.float32), hard(rows, 5)
        for upstream in (torch.tensor(value, device=here()) for value in (1.0, 0.5)):
            expected = F.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1).sum()
            loss = compiled(x, y)
            test_near(loss, expected)
            test_near(torch.autograd.grad(loss, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_compile_with_inductor_and_extras(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what an older build traced
    torch._dynamo.reset()

    def step(x, y):
        loss, lse = cross_entropy(x * 1, y, z_loss=0.01, out_dtype=torch.float32, return_lse=True)
        return loss + cross_entropy(x * 2, y, inplace=True) + lse.sum()

    x, y = logits(6, 9, dtype=torch.float32), hard(6, 9)
    ours, eager = torch.compile(step, fullgraph=True)(x, y), step(x, y)
    test_near(ours, eager)
    test_near(torch.autograd.grad(ours, x), torch.autograd.grad(eager, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast(dtype):
    for target in (hard(6, 40), soft(6, 40, dtype=torch.float32)):
        for weight in (None, weights(6, 40).to(dtype if dtype == torch.float64 else torch.float32)):
            x = logits(6, 40, dtype=dtype)
            with torch.autocast(here(), dtype=torch.bfloat16):
                ours, theirs = cross_entropy(x, target, weight), F.cross_entropy(x, target, weight)
                with_lse = cross_entropy(x, target, weight, return_lse=True)[0]
            test_near(ours, theirs)
            test_near(with_lse, theirs)
            test_near(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), atol=1e-6)


def test_inference_mode():
    with torch.inference_mode():
        x, y = logits(6, 40, dtype=torch.float32), hard(6, 40)
        test_near(cross_entropy(x, y), F.cross_entropy(x, y))


def test_saved_tensor_hooks_are_honoured():
    x, y = logits(6, 40, dtype=torch.float32), hard(6, 40)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, y, reduction="none").sum(), x)
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(x, y, reduction="none").sum()
    test_near(torch.autograd.grad(loss, x)[0], expected)


SETTINGS = {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.1, "out_dtype": None, "z_loss": 0.01}
POINT = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck_of_the_public_operators(reduction):
    for target in (hard(6, 40), soft(6, 40, dtype=torch.float32)):
        args = (logits(6, 40, dtype=torch.float32), target, None, reduction)
        opcheck(OPS.cross_entropy.default, args, {"z_loss": 0.01}, **POINT)
        opcheck(OPS.cross_entropy_with_lse.default, args, {"label_smoothing": 0.1}, **POINT)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_opcheck_of_the_passes(reduction, shape):
    x, y = logits(*shape, dtype=torch.float32).detach(), hard(*shape)
    settings = tuple({**SETTINGS, "reduction": reduction}.values())
    opcheck(OPS.cross_entropy_forward.default, (x, y, None, *settings), **POINT)
    opcheck(OPS.cross_entropy_forward_softmax.default, (x, y, None, *settings), **POINT)
    loss, row_max, row_sum = OPS.cross_entropy_forward_softmax(x, y, None, *settings)
    saved = (torch.ones_like(loss), x, y, None, row_max, row_sum, reduction, -100, 0.1, 0.01)
    opcheck(OPS.cross_entropy_backward.default, saved, **POINT)
    if reduction:
        opcheck(OPS.cross_entropy_forward_gradient.default, (x, y, None, *settings), **POINT)
        opcheck(OPS.cross_entropy_forward_gradient_.default, (x.clone(), y, None, *settings), **POINT)
        opcheck(OPS.cross_entropy_scale_gradient_.default, (x.clone(), x.new_tensor(2.0), y, -100), **POINT)
