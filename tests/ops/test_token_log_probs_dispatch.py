"""token_log_probs on other backends, under the compiler, fake tensors, autocast and subclasses."""

import math
import re
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cross_entropy_calls import DTYPES, hard, layouts, logits, placed
from devices import here
from token_calls import on_other_backends, upstream_of
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.optests import opcheck

from mbperf import token_log_probs
from mbperf.testing import test_near

OPS = torch.ops.mbperf
with_entropy = partial(token_log_probs, return_entropy=True)

on_every_device = pytest.mark.usefixtures("device")


# Over the logits


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (40, 3), (33, 64), (40, 100), (3, 9000), (1, 40_000), (2, 21, 6, 7)])
def test_the_gradient_over_the_logits_is_the_gradient(shape, dtype):
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    g = [each.float() for each in upstream_of(y)]
    statistics = OPS.token_log_probs_forward(x, y, 0.8, -100, None, True)[2]
    for upstream in ({"grad_log_probs": g[0], "grad_entropy": g[1]}, {"grad_log_probs": g[0]}):
        apart, over = OPS.token_log_probs_backward(x, y, statistics, 0.8, -100, **upstream), x.clone()
        OPS.token_log_probs_backward_(over, y, statistics, 0.8, -100, **upstream)
        assert torch.equal(over, apart)


@on_every_device
@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
def test_logits_of_every_layout_are_overwritten(name, x):
    over, y = placed(x).clone(), hard(*x.shape)
    g = upstream_of(y)[1].float()
    statistics = OPS.token_log_probs_forward(over, y, 0.8, -100, None, True)[2]
    apart = OPS.token_log_probs_backward(over, y, statistics, 0.8, -100, grad_entropy=g)
    OPS.token_log_probs_backward_(over, y, statistics, 0.8, -100, grad_entropy=g)
    test_near(over, apart)


# Other backends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (9, 40), (2, 5, 3), (3, 6_000_000)], ids=str)
def test_the_composite_of_other_backends(shape, dtype):
    if shape[-1] > 1000 and dtype != torch.bfloat16:
        pytest.skip("several chunks, of one dtype")
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    if x.dim() == 2:
        x[0, 0] = -math.inf
    g = [each.to(torch.promote_types(dtype, torch.float32)) for each in upstream_of(y)]
    rtol = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for temperature, entropy in ((1.0, True), (0.7, True), (0.7, False), (1.0, False)):
        settings = (temperature, -100, None, entropy)
        composite = on_other_backends(OPS.token_log_probs_forward)(x, y, *settings)
        ours = OPS.token_log_probs_forward(x, y, *settings)
        live = (y != -100).flatten()
        test_near(composite[:2], ours[:2], rtol=1e-5, atol=1e-5)
        test_near(composite[2][:, live], ours[2][:, live], rtol=1e-5, atol=1e-5)
        backward = OPS.token_log_probs_backward
        for wanted in (("log_probs", "entropy"), ("entropy",), ("log_probs",))[0 if entropy else 2 :]:
            upstream = {f"grad_{name}": g[name == "entropy"] for name in wanted}
            args = (y, ours[2], temperature, -100)
            grads = on_other_backends(backward)(x, *args, **upstream), backward(x, *args, **upstream)
            test_near(*grads, rtol=rtol, atol=rtol)
            in_place = x.clone()
            on_other_backends(OPS.token_log_probs_backward_)(in_place, *args, **upstream)
            assert torch.equal(in_place, grads[0])


# The compiler, fake tensors, autocast


@on_every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()

    def step(x, y):
        log_probs, entropy = with_entropy(x * 1, y, temperature=0.9)
        return log_probs.sum() - 0.1 * entropy.mean() + token_log_probs(x, y, out_dtype=torch.float64).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7, 9):
        x, y = logits(rows, 5), hard(rows, 5)
        ours, eager = compiled(x, y), step(x, y)
        test_near(ours, eager)
        test_near(torch.autograd.grad(ours, x), torch.autograd.grad(eager, x))


@on_every_device
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_meta_and_fake_tensors(shape):
    def described(x, y):
        outputs = with_entropy(x, y)
        grad = torch.autograd.grad([o.sum() for o in outputs], x)
        return [(t.shape, t.dtype, t.stride()) for t in (*outputs, *grad)]

    x, y = logits(*shape, dtype=torch.bfloat16), hard(*shape)
    real = described(x, y)
    assert described(x.detach().to("meta").requires_grad_(), y.to("meta")) == real
    with FakeTensorMode() as mode:
        assert described(mode.from_tensor(x), mode.from_tensor(y)) == real


def test_fake_tensors_that_propagate_real_ones():
    x, y = logits(6, 40), hard(6, 40)
    with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake_x, fake_y = mode.from_tensor(x), mode.from_tensor(y)
        for which in (slice(2), slice(1), slice(1, 2)):
            with mode:
                (faked,) = torch.autograd.grad([o.sum() for o in with_entropy(fake_x, fake_y)[which]], fake_x)
            (real,) = torch.autograd.grad([o.sum() for o in with_entropy(x, y)[which]], x)
            test_near(faked.real_tensor, real)


@on_every_device
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_opcheck(shape):
    point = {"atol": 1e-6, "rtol": 1e-5}
    x, y = logits(*shape), hard(*shape)
    opcheck(OPS.token_log_probs.default, (x, y), {"temperature": 0.8}, **point)
    opcheck(OPS.token_log_probs_with_entropy.default, (x, y), {"temperature": 0.8}, **point)
    x = x.detach()
    for entropy in (True, False):
        opcheck(OPS.token_log_probs_forward.default, (x, y, 0.8, -100, None, entropy), **point)
    log_probs, entropies, statistics = OPS.token_log_probs_forward(x, y, 0.8, -100, None, True)
    upstream = {"grad_log_probs": log_probs, "grad_entropy": entropies}
    args = (x, y, statistics, 0.8, -100)
    for given in (upstream, {"grad_entropy": entropies}, {"grad_log_probs": log_probs}):
        opcheck(OPS.token_log_probs_backward.default, args, given, **point)
        opcheck(OPS.token_log_probs_backward_.default, (x.clone(), *args[1:]), given, **point)


def test_opcheck_sees_every_operator():
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mbperf::token_log_probs")}
    source = re.sub(r"\s", "", Path(__file__).read_text())
    assert len(names) == 5
    assert all(f"opcheck(OPS.{name.removeprefix('mbperf::')}.default" in source for name in names)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    x, y = logits(6, 40, dtype=dtype), hard(6, 40)
    with torch.autocast(here(), dtype=torch.bfloat16):
        ours = with_entropy(x, y)
    assert all(map(torch.equal, ours, with_entropy(x, y)))
    with torch.inference_mode():
        assert all(map(torch.equal, ours, with_entropy(x, y)))


class Tagged(torch.Tensor):
    """A subclass that is asked about every function of torch."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.__name__)
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def test_subclasses_are_asked():
    x, y = logits(4, 5).detach(), hard(4, 5)
    test_near(
        token_log_probs(x.as_subclass(Tagged), y, temperature=0.5), token_log_probs(x, y, temperature=0.5)
    )
    assert "token_log_probs" in Tagged.seen
