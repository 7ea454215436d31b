"""linear_token_log_probs against token_log_probs(linear(...)): values, derivatives, compiler, bad input."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from derivatives import functional_transforms
from linear_calls import classes, head, hidden
from token_calls import on_other_backends, upstream_of, usual
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.optests import opcheck

from mbperf import linear_token_log_probs
from mbperf.testing import test_near

OPS = torch.ops.mbperf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
with_entropy = partial(linear_token_log_probs, return_entropy=True)


def unfused(input, weight, target, *, linear_bias=None, memory_budget=None, **settings):
    """All logits, log_softmax and a sum, in float32 or float64 from the logits on."""
    return usual(F.linear(input, weight, linear_bias), target, **settings)


def run(function, leaves, y, upstream, dtype=None, **settings):
    """Both values, and the gradients of input, weight and bias for upstream gradients of both."""
    x, w, b = (t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves)
    outputs = function(x, w, y, linear_bias=b, **settings)
    grads = [g.to(output.dtype) for g, output in zip(upstream, outputs, strict=True)]
    return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, (x, w, b), grads)


def error(values, exact):
    return torch.stack([(v.double() - e).norm() for v, e in zip(values, exact, strict=True)])


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", ["one", "many", "row by row"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_error_is_at_most_twice_that_of_the_unfused_way(dtype, chunks, temperature, instruction_set):
    n, h, v = 70, 24, 301
    leaves = [t.detach().to(dtype) for t in (hidden(n, h), head(v, h), head(v, seed=7))]
    y = classes(v, n, ignored=0.4)
    upstream = upstream_of(y)
    budget = {"one": None, "many": 23 * v * dtype.itemsize, "row by row": 1}[chunks]
    exact = run(unfused, leaves, y, upstream, torch.float64, temperature=temperature)
    theirs = run(unfused, leaves, y, upstream, temperature=temperature)
    ours = run(with_entropy, leaves, y, upstream, temperature=temperature, memory_budget=budget)
    assert [o.dtype for o in ours] == [t.dtype for t in theirs]
    units = 16 if dtype == torch.float64 else 4
    unit = torch.finfo(dtype).eps * torch.stack([e.norm() for e in exact])
    assert (error(ours, exact) <= 2 * error(theirs, exact) + units * unit).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 0, 3), (2, 1, 3)], ids=str)
def test_hidden_states_of_any_shape(shape):
    x, w, b, y = hidden(*shape, 4), head(9, 4), head(9, seed=7), classes(9, *shape)
    upstream = upstream_of(y)
    ours = run(with_entropy, (x, w, b), y, upstream, temperature=0.8)
    assert ours[0].shape == ours[1].shape == shape
    flat = x.detach().reshape(-1, 4)
    theirs = run(unfused, (flat, w, b), y.reshape(-1), [g.reshape(-1) for g in upstream], temperature=0.8)
    test_near([t.reshape(r.shape) for t, r in zip(ours, theirs, strict=True)], list(theirs))
    alone = linear_token_log_probs(x, w, y, linear_bias=b, temperature=0.8)
    assert torch.equal(alone.reshape(-1), ours[0].reshape(-1)) or shape == ()
    test_near(alone, ours[0])


@pytest.mark.parametrize("shape", [(4, 0, 3), (1, 1, 1), (0, 4, 3), (3, 5, 1)], ids=str)
def test_degenerate_sizes(shape):
    n, h, v = shape
    leaves, y = (hidden(n, h), head(v, h), head(v, seed=7)), classes(v, n)
    upstream = upstream_of(y)
    test_near(run(with_entropy, leaves, y, upstream), run(unfused, leaves, y, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("budget", [None, 1])
def test_ignored_rows_are_never_read(dtype, share, budget):
    leaves = [t.detach().to(dtype) for t in (hidden(40, 6), head(9, 6), head(9, seed=7))]
    y = classes(9, 40, ignored=share)
    upstream = upstream_of(y)
    clean = run(with_entropy, leaves, y, upstream, memory_budget=budget)
    ignored = y == -100
    leaves[0][ignored] = torch.nan
    y[ignored] = 200
    ours = run(with_entropy, leaves, y, upstream, memory_budget=budget, ignore_index=200)
    assert all(map(torch.equal, ours, clean))
    for values in ours[:3]:
        assert (values[ignored] == 0).all()
    if share == 1:
        assert all((values == 0).all() for values in ours)


def test_masked_and_peaked_rows():
    x, w, b = hidden(6, 4).detach(), head(9, 4).detach(), head(9, seed=7).detach()
    b[2] = -math.inf  # a word that a mask excludes
    b[5] = 60.0
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    upstream = upstream_of(y)
    ours, exact = (run(f, (x, w, b), y, upstream) for f in (with_entropy, unfused))
    assert ours[0][2] == -math.inf
    test_near(ours, exact, equal_nan=True)


def test_dtypes_of_the_result():
    for dtype in DTYPES:
        x, w, y = hidden(4, 3, dtype=dtype), head(5, 3, dtype=dtype), classes(5, 4)
        wide = torch.promote_types(dtype, torch.float32)
        assert {t.dtype for t in with_entropy(x, w, y)} == {linear_token_log_probs(x, w, y).dtype} == {wide}
        for out_dtype in DTYPES:
            outputs = with_entropy(x, w, y, out_dtype=out_dtype)
            assert {t.dtype for t in outputs} == {out_dtype}
            grads = torch.autograd.grad([t.sum() for t in outputs], (x, w))
            assert {g.dtype for g in grads} == {dtype}


# What is computed and held


def events_of(call):
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return profile.events()


def products(call):
    return sum(e.name in ("aten::mm", "aten::addmm") for e in events_of(call))


@pytest.mark.parametrize(
    ("frozen", "count"), [((), 4), ((0,), 3), ((1,), 3), ((0, 1), 1)], ids=["none", "input", "weight", "both"]
)
def test_only_the_wanted_products_are_computed(frozen, count):
    leaves, y = [hidden(8, 6, dtype=torch.float32), head(9, 6, dtype=torch.float32)], classes(9, 8)
    for i in frozen:
        leaves[i] = leaves[i].detach()

    def step():
        outputs = with_entropy(*leaves, y)
        if outputs[0].requires_grad:
            (outputs[0] - outputs[1]).sum().backward()

    assert products(step) == count
    with torch.no_grad():
        assert products(lambda: with_entropy(*leaves, y)) == 1


@pytest.mark.parametrize(("budget", "chunks"), [(None, 1), (64 * 200 * 4, 4), (0, 256)], ids=str)
def test_no_more_logits_than_the_budget_are_held(budget, chunks):
    x, w, y = hidden(256, 6, dtype=torch.float32), head(200, 6, dtype=torch.float32), classes(200, 256)
    outputs = with_entropy(x, w, y, memory_budget=budget)

    def step():
        torch.autograd.grad([t.sum() for t in outputs], (x, w), retain_graph=True)

    seen = events_of(step)
    assert sum(e.name == "mbperf::token_log_probs_backward_" for e in seen) == chunks
    largest = max(e.cpu_memory_usage for e in seen if e.name == "aten::empty")
    assert largest <= max(256 * 200 * 4 // chunks, x.nbytes, w.nbytes)


# Derivatives


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_gradcheck_and_gradgradcheck(budget, temperature):
    leaves, y = (hidden(4, 3), head(5, 3), head(5, seed=7)), classes(5, 4, ignored=0.3)
    for pick in (slice(2), slice(1), slice(1, 2)):

        def function(x, w, b, pick=pick):
            return with_entropy(
                x, w, y, linear_bias=b, temperature=temperature, memory_budget=budget
            )[pick]  # fmt: skip

        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


def test_functional_transforms_and_forward_mode():
    x, w, b, y = hidden(4, 3).detach(), head(5, 3).detach(), head(5, seed=7).detach(), classes(5, 4)

    def of(function):
        return lambda x: torch.stack(function(x, w, y, linear_bias=b, temperature=0.8))

    for transform in functional_transforms(x, x.flip(0)):
        test_near(transform(of(with_entropy)), transform(of(unfused)))
    over_weights = torch.stack([w, w.flip(0)])
    test_near(*(torch.func.vmap(lambda w, f=f: f(x, w, y))(over_weights) for f in (with_entropy, unfused)))
    tangents = []
    for function in (with_entropy, unfused):
        with forward_ad.dual_level():
            duals = function(forward_ad.make_dual(x, x.flip(0)), w, y)
            tangents.append([forward_ad.unpack_dual(dual).tangent for dual in duals])
    test_near(*tangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_output_alone_and_backward_twice(dtype):
    x, w, y = hidden(8, 6, dtype=dtype), head(9, 6, dtype=dtype), classes(9, 8, ignored=0.2)
    outputs = with_entropy(x, w, y)
    g = [each.to(output.dtype) for each, output in zip(upstream_of(y), outputs, strict=True)]
    keep = partial(torch.autograd.grad, inputs=(x, w), retain_graph=True)
    alone = [keep(output, grad_outputs=up) for output, up in zip(outputs, g, strict=True)]
    both, again = (keep(outputs, grad_outputs=g) for _ in range(2))
    assert all(map(torch.equal, both, again))
    rtol = 4 * torch.finfo(dtype).eps
    test_near([a + b for a, b in zip(*alone, strict=True)], list(both), rtol=rtol, atol=16 * rtol)
    torch.autograd.backward(outputs, g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(outputs, g)


@pytest.mark.parametrize("bad", [9, -1, 2**40])
def test_targets_are_checked_in_forward_and_again_in_backward(bad):
    x, w, y = hidden(8, 6), head(9, 6), classes(9, 8)
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        linear_token_log_probs(x, w, y.clone().fill_(bad))
    target = y.clone()
    log_probs, entropy = with_entropy(x, w, target)
    target.data[-1] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        (log_probs + entropy).sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_that_were_changed_are_noticed(which):
    changed = [hidden(8, 6) * 1, head(9, 6) * 1, classes(9, 8)]
    log_probs = linear_token_log_probs(*changed)
    changed[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


# Other backends, the compiler, fake tensors, autocast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [-1, 0, 3 * 40 * 4])
def test_the_composite_of_other_backends(dtype, budget):
    x, w, b = (t.detach().to(dtype) for t in (hidden(10, 6), head(40, 6), head(40, seed=7)))
    y, rtol = classes(40, 10, ignored=0.3), 8 * max(torch.finfo(dtype).eps, 1e-7)
    live = y != -100
    for bias in (b, None):
        for entropy in (True, False):
            given = (0.7, -100, budget, None, entropy)
            composite, ours = (
                op(x, w, y, *given, linear_bias=bias)
                for op in (
                    on_other_backends(OPS.linear_token_log_probs_forward),
                    OPS.linear_token_log_probs_forward,
                )
            )
            test_near(composite[:2], ours[:2], rtol=rtol, atol=4 * rtol)
            test_near(composite[2][:, live], ours[2][:, live], rtol=rtol, atol=4 * rtol)
            names = ["grad_log_probs", "grad_entropy"][: 1 + entropy]
            upstream = dict(zip(names, (g.to(ours[0].dtype) for g in upstream_of(y)), strict=False))
            for wanted in ([True, True, bias is not None], [True, False, False], [False, True, False]):
                args = (x, w, y, composite[2], 0.7, -100, budget, wanted)
                grads = [
                    op(*args, linear_bias=bias, **upstream)
                    for op in (
                        on_other_backends(OPS.linear_token_log_probs_backward),
                        OPS.linear_token_log_probs_backward,
                    )
                ]
                test_near(*grads, rtol=rtol, atol=16 * rtol)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()

    def step(x, w, b, y):
        log_probs, entropy = with_entropy(x * 1, w, y, linear_bias=b, temperature=0.9, memory_budget=200)
        alone = linear_token_log_probs(x, w, y, out_dtype=torch.float64)
        return log_probs.sum() - 0.1 * entropy.mean() + alone.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    w, b = (t.detach().float().requires_grad_() for t in (head(9, 6), head(9, seed=7)))
    for shape in ((4,), (7,), (9,)):
        x, y = hidden(*shape, 6, dtype=torch.float32), classes(9, *shape, ignored=0.2)
        ours, eager = (f(x, w, b, y) for f in (compiled, step))
        test_near(ours, eager)
        test_near(torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(eager, (x, w, b)))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
def test_meta_and_fake_tensors(shape):
    def described(x, w, y):
        outputs = with_entropy(x, w, y)
        grads = torch.autograd.grad([o.sum() for o in outputs], (x, w))
        return [(t.shape, t.dtype, t.stride()) for t in (*outputs, *grads)]

    tensors = hidden(*shape, 4, dtype=torch.bfloat16), head(9, 4, dtype=torch.bfloat16), classes(9, *shape)
    real = described(*tensors)
    meta = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors]
    assert described(*meta) == real
    with FakeTensorMode() as mode:
        assert described(*map(mode.from_tensor, tensors)) == real


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_fake_tensors_that_propagate_real_ones(biased):
    x, w, b = (t.detach().float().requires_grad_() for t in (hidden(6, 4), head(9, 4), head(9, seed=7)))
    y = classes(9, 6, ignored=0.2)
    with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = [mode.from_tensor(t) for t in (x, w, b, y)]
        for which in (slice(2), slice(1), slice(1, 2)):

            def gradients(x, w, b, y, which=which):
                outputs = with_entropy(x, w, y, linear_bias=b if biased else None)[which]
                return torch.autograd.grad([o.sum() for o in outputs], (x, w, b)[: 2 + biased])

            with mode:
                faked = gradients(*fakes)
            test_near([t.real_tensor for t in faked], list(gradients(x, w, b, y)))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
def test_opcheck(shape):
    point = {"atol": 1e-6, "rtol": 1e-5}
    x, w, b, y = hidden(*shape, 4), head(9, 4), head(9, seed=7), classes(9, *shape)
    for given in ({"temperature": 0.8}, {"memory_budget": 1}):
        opcheck(OPS.linear_token_log_probs.default, (x, w, y, b), given, **point)
        opcheck(OPS.linear_token_log_probs_with_entropy.default, (x, w, y, b), given, **point)
    x, w, b, y = x.detach().reshape(-1, 4), w.detach(), b.detach(), y.reshape(-1)
    for entropy in (True, False):
        call = (x, w, y, 0.8, -100, -1, None, entropy)
        opcheck(OPS.linear_token_log_probs_forward.default, call, {"linear_bias": b}, **point)
    log_probs, entropies, statistics = OPS.linear_token_log_probs_forward(x, w, y, 0.8, -100, -1, None, True)
    args = (x, w, y, statistics, 0.8, -100, -1, [True, True, False])
    for given in ({"grad_log_probs": log_probs, "grad_entropy": entropies}, {"grad_log_probs": log_probs}):
        opcheck(OPS.linear_token_log_probs_backward.default, args, given, **point)


def test_opcheck_sees_every_operator():
    every = torch._C._dispatch_get_all_op_names()
    names = {n for n in every if n.startswith("mbperf::linear_token_log_probs")}
    source = re.sub(r"\s", "", Path(__file__).read_text())
    assert len(names) == 4
    assert all(f"opcheck(OPS.{name.removeprefix('mbperf::')}.default" in source for name in names)


def test_autocast():
    leaves, y = (hidden(8, 6, dtype=torch.float32), head(9, 6, dtype=torch.float32)), classes(9, 8)
    b = head(9, seed=7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(f, (*leaves, b), y, upstream_of(y)) for f in (with_entropy, unfused))
        alone = linear_token_log_probs(*leaves, y, linear_bias=b)
    assert [t.dtype for t in ours] == [torch.float32] * 5
    assert torch.equal(alone, ours[0])
    halves = [t.detach().bfloat16() for t in (*leaves, b)]
    test_near(ours[:2], with_entropy(*halves[:2], y, linear_bias=halves[2]))
    test_near(ours, theirs, rtol=2e-2, atol=4e-3)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "input must be float32, .* got Long"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must have a dimension of features"),
        ({"input": torch.zeros(4, 3).to_sparse()}, ValueError, "input must be a dense tensor, got Sparse"),
        ({"linear_weight": torch.zeros(5, 2)}, ValueError, r"linear_weight must be .* got \[5, 2\]"),
        ({"linear_weight": torch.zeros(0, 3)}, ValueError, r"linear_weight must be .* V > 0 .* got \[0, 3\]"),
        ({"linear_weight": torch.zeros(5, 1, 3)}, ValueError, r"linear_weight must be of shape \(V, H\)"),
        ({"linear_weight": torch.zeros(5, 3).double()}, TypeError, "linear_weight must have the dtype of"),
        ({"linear_weight": torch.zeros(5, 3, device="meta")}, ValueError, "linear_weight must be on the dev"),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias must be of shape \(V\) .* got \[4\]"),
        ({"linear_bias": torch.zeros(5).half()}, TypeError, "linear_bias must have the dtype of input"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must hold int64 .* shape \[3\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, ValueError, "target must hold int64 .* got Int"),
        ({"target": torch.zeros(4, 5)}, ValueError, "target must hold int64 class indices"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "target must be a dense"),
        ({"temperature": 0.0}, ValueError, "linear_token_log_probs: temperature must be a number between"),
        ({"temperature": math.nan}, ValueError, "temperature must be a number"),
        ({"out_dtype": torch.int32}, TypeError, "linear_token_log_probs: out_dtype must be float32, .* Int"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be a number of bytes >= 0 or None, got -1"),
        ({"memory_budget": "all"}, RuntimeError, "'memory_budget'"),
        ({"target": [0, 1, 2, 3]}, RuntimeError, "'target'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    call = {
        "input": torch.zeros(4, 3),
        "linear_weight": torch.zeros(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        **change,
    }
    for entropy in (True, False):
        with pytest.raises(error, match=message):
            linear_token_log_probs(**call, return_entropy=entropy)
