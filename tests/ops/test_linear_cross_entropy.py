"""linear_cross_entropy against cross_entropy(linear(...)): values, gradients, derivatives of every kind."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import assert_same_outcome, outcome, probabilities, weights
from linear_calls import classes, gradients, head, hidden, unfused
from torch import nn
from torch._functorch import config as functorch_config
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mbperf import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from mbperf.testing import test_near

REDUCTIONS = ["none", "mean", "sum"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
torchs_own = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on"
)


def error(values, exact):
    return torch.stack([(v.double() - e).norm() for v, e in zip(values, exact, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunks", ["one", "many", "row by row"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_error_is_at_most_twice_that_of_the_unfused_way(dtype, reduction, chunks, softcap):
    n, h, v = 70, 24, 301
    x, w, b = (t.detach().to(dtype) for t in (hidden(n, h), head(v, h), head(v, seed=7)))
    y, upstream = classes(v, n, ignored=0.4), hidden(n, seed=5).detach() if reduction == "none" else None
    budget = {"one": None, "many": 23 * v * dtype.itemsize, "row by row": 1}[chunks]
    settings = {"reduction": reduction, "softcap": softcap, "label_smoothing": 0.1}

    def run(function, dtype, **extra):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        return gradients(
            function, *leaves[:2], y, linear_bias=leaves[2], upstream=upstream, **settings, **extra
        )

    exact = run(unfused, torch.float64)
    theirs, ours = (
        run(f, dtype, **e) for f, e in ((unfused, {}), (linear_cross_entropy, {"memory_budget": budget}))
    )
    assert [o.dtype for o in ours] == [t.dtype for t in theirs]
    # In float64 the reference is rounded too, and by the very steps of the unfused way: 7 units were seen.
    units = 16 if dtype == torch.float64 else 4
    unit = torch.finfo(dtype).eps * torch.stack([e.norm() for e in exact])
    assert (error(ours, exact) <= 2 * error(theirs, exact) + units * unit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_of_every_dtype(dtype, reduction):
    x, w, y = (t.to(dtype) for t in (hidden(6, 4).detach(), head(9, 4).detach(), probabilities(6, 9)))
    exact = gradients(
        unfused, *(t.double().requires_grad_() for t in (x, w)), y.double(), reduction=reduction
    )
    ours = gradients(linear_cross_entropy, *(t.requires_grad_() for t in (x, w)), y, reduction=reduction)
    rtol = 16 * torch.finfo(dtype).eps
    test_near([t.double() for t in ours], list(exact), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (70, 2, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_gradcheck_and_gradgradcheck(shape, reduction, soft):
    x, w, b = hidden(4, 3), head(*shape, 3), head(*shape)
    y = (
        probabilities(4, *shape, dtype=torch.float64)
        if soft
        else classes(shape[0], 4, *shape[1:], ignored=0.3)
    )
    weight = weights(1, shape[0])
    for extras in ({}, {"z_loss": 0.1, "softcap": 2.0}, {"return_lse": True, "memory_budget": 1}):

        def loss(x, w, b, extras=extras):
            return linear_cross_entropy(
                x, w, y, linear_bias=b, weight=weight, reduction=reduction, label_smoothing=0.1, **extras
            )

        assert gradcheck(loss, (x, w, b), fast_mode=True)
        if shape == (5,):
            assert gradgradcheck(loss, (x, w, b), fast_mode=True)


@torchs_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["", "_chunked", "_chunked_none"])
def test_torchs_samples(dtype, variant, say):
    from torchs_samples import invocations

    torch.manual_seed(0)
    op = next(op for op in invocations.op_db if op.name == "nn.functional.linear_cross_entropy")
    samples = list(
        getattr(invocations, f"sample_inputs_linear_cross_entropy{variant}")(op, "cpu", dtype, True)
    )
    half = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for s in samples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of options it does not obey
            theirs = outcome(unfused, s.input, *s.args, **s.kwargs)
            ours = outcome(linear_cross_entropy, s.input, *s.args, **s.kwargs)
        if dtype == torch.bfloat16:
            wide = [
                t.detach().float().requires_grad_(t.requires_grad) if torch.is_floating_point(t) else t
                for t in (s.input, *s.args)
            ]
            named = {
                k: t.detach().float().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
                for k, t in s.kwargs.items()
            }
            exact = outcome(unfused, *wide, **named)
            for o, t, e in zip(
                (ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True
            ):
                unit = torch.finfo(dtype).eps * e.norm()
                assert (o.float() - e).norm() <= 2 * (t.float() - e).norm() + 2 * unit
        else:
            assert_same_outcome(ours, theirs, **(half if dtype == torch.bfloat16 else {}))
    say(f"sample_inputs_linear_cross_entropy{variant}, {dtype}: {len(samples)} samples agree")
    assert len(samples) >= 10


@torchs_own
def test_torchs_errors(say):
    from torchs_samples import common_modules, invocations

    op = next(op for op in invocations.op_db if op.name == "nn.functional.linear_cross_entropy")
    errors = list(invocations.error_inputs_linear_cross_entropy(op, "cpu"))
    for e in errors:
        with pytest.raises(e.error_type, match=e.error_regex):
            linear_cross_entropy(e.sample_input.input, *e.sample_input.args, **e.sample_input.kwargs)
    info = next(m for m in common_modules.module_db if m.module_cls is nn.LinearCrossEntropyLoss)
    of_module = common_modules.module_error_inputs_torch_nn_LinearCrossEntropyLoss(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    for i in of_module:
        make, call = i.module_error_input.constructor_input, i.module_error_input.forward_input
        with pytest.raises(i.error_type, match=i.error_regex):
            LinearCrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)
    say(f"{len(errors)} error inputs of the function and {len(of_module)} of the module agree")
    assert len(errors) >= 5
    assert len(of_module) >= 5


@torchs_own
def test_torchs_samples_of_the_module(say):
    from torchs_samples import common_modules

    torch.manual_seed(0)
    info = next(m for m in common_modules.module_db if m.module_cls is nn.LinearCrossEntropyLoss)
    inputs = common_modules.module_inputs_torch_nn_LinearCrossEntropyLoss(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
    )
    for i in inputs:
        make, call = i.constructor_input, i.forward_input
        theirs = nn.LinearCrossEntropyLoss(*make.args, **{**make.kwargs, "options": None})
        ours = LinearCrossEntropyLoss(*make.args, **make.kwargs)
        ours.load_state_dict(theirs.state_dict())
        losses = [m(*call.args, **call.kwargs) for m in (ours, theirs)]
        test_near(losses[0], losses[1], equal_nan=True)
        grads = [
            torch.autograd.grad(loss.sum(), (call.args[0], *m.parameters()))
            for loss, m in zip(losses, (ours, theirs), strict=True)
        ]
        test_near(grads[0], grads[1], equal_nan=True)
    say(f"module_inputs_torch_nn_LinearCrossEntropyLoss: {len(inputs)} samples agree")
    assert len(inputs) >= 100


@torchs_own
def test_it_can_stand_in_for_torchs_function(monkeypatch):
    module, x, y = nn.LinearCrossEntropyLoss(6, 9), hidden(4, 6, dtype=torch.float32), classes(9, 4)
    before = module(x, y)
    monkeypatch.setattr(F, "linear_cross_entropy", linear_cross_entropy)
    after = module(x, y)
    test_near(after, before)
    assert after.grad_fn.name() == "LinearCrossEntropyBackward"


@torchs_own
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_options_are_obeyed(rows):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    x, w, y = hidden(10, 6, dtype=torch.float32), head(9, 6, dtype=torch.float32), classes(9, 10)
    with torch.profiler.profile() as profile:
        ours = gradients(linear_cross_entropy, x, w, y, options=options)
    chunks = sum(e.name == "mbperf::cross_entropy_forward_gradient_" for e in profile.events())
    assert chunks == -(-10 // rows)
    test_near(ours, gradients(unfused, x, w, y))


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_read(share, reduction):
    x, w, y = (
        hidden(40, 6, dtype=torch.float32),
        head(9, 6, dtype=torch.float32),
        classes(9, 40, ignored=share),
    )
    ignored = y == -100
    poisoned = x.detach().clone()
    poisoned[ignored] = torch.nan
    poisoned.requires_grad_()
    ours = gradients(linear_cross_entropy, poisoned, w, y, reduction=reduction)
    theirs = gradients(unfused, x, w, y, reduction=reduction)
    test_near(ours[0], theirs[0], equal_nan=True)
    if share < 1:
        test_near(ours[1:], theirs[1:])
    assert (ours[1][ignored] == 0).all()
    assert ours[2].isfinite().all()


def products(run):
    with torch.profiler.profile() as profile:
        run()
    return sum(e.name in ("aten::mm", "aten::addmm") for e in profile.events())


@pytest.mark.parametrize(
    ("frozen", "count"), [((), 3), ((0,), 2), ((1,), 2), ((0, 1), 1)], ids=["none", "input", "weight", "both"]
)
def test_only_the_wanted_products_are_computed(frozen, count):
    leaves = [hidden(8, 6, dtype=torch.float32), head(9, 6, dtype=torch.float32)]
    for i in frozen:
        leaves[i] = leaves[i].detach()
    y = classes(9, 8)

    def run():
        loss = linear_cross_entropy(*leaves, y)
        if loss.requires_grad:
            loss.backward()

    assert products(run) == count
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(*leaves, y)) == 1
    if len(frozen) < 2:
        test_near(gradients(linear_cross_entropy, *leaves, y), gradients(unfused, *leaves, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_gives_the_same(dtype, reduction):
    x, w, y = hidden(8, 6, dtype=dtype), head(9, 6, dtype=dtype), classes(9, 8, ignored=0.2)
    loss = linear_cross_entropy(x, w, y, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_upstream_gradients_of_float16_do_not_vanish():
    x, w, y = hidden(64, 6, dtype=torch.float16), head(4000, 6, dtype=torch.float16), classes(4000, 64)
    scale = 65536.0
    ours = torch.autograd.grad(linear_cross_entropy(x, w, y, out_dtype=torch.float32) * scale, w)[0]
    wide = w.detach().float().requires_grad_()
    exact = torch.autograd.grad(unfused(x.detach().float(), wide, y) * scale, wide)[0]
    test_near(ours.float(), exact, rtol=4e-3, atol=1e-3)


def test_targets_are_checked_before_and_after():
    x, w, y = hidden(8, 6), head(9, 6), classes(9, 8)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        linear_cross_entropy(x, w, y.clone().fill_(9))
    for reduction in REDUCTIONS:
        target = y.clone()
        loss = linear_cross_entropy(x, w, target, reduction=reduction).sum()
        target.data.fill_(1 << 40)
        with pytest.raises(IndexError, match="out of bounds"):
            loss.backward()
    target = y.clone()
    loss = linear_cross_entropy(x, w, target)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_functional_transforms(reduction):
    x, w, y = hidden(4, 3).detach(), head(5, 3).detach(), classes(5, 4, ignored=0.2)

    def of(function):
        return lambda x, w: function(x, w, y, reduction=reduction)

    for transform in (
        lambda f: torch.func.jvp(f, (x, w), (x.flip(0), w.flip(0))),
        lambda f: torch.func.grad(lambda x, w: f(x, w).sum(), (0, 1))(x, w),
        lambda f: torch.func.jacfwd(f, (0, 1))(x, w),
        lambda f: torch.func.hessian(lambda w: f(x, w).sum())(w),
        lambda f: torch.func.vmap(f, (0, None))(torch.stack([x, x.flip(0)]), w),
    ):
        test_near(transform(of(linear_cross_entropy)), transform(of(unfused)))


@pytest.mark.parametrize("extras", [{}, {"reduction": "none"}, {"softcap": 2.0, "z_loss": 0.1}], ids=str)
def test_compile_without_a_break(extras):
    x, w, b = (t.detach().float().requires_grad_() for t in (hidden(8, 6), head(9, 6), head(9)))
    y = classes(9, 8, ignored=0.2)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    test_near(
        gradients(compiled, x, w, y, linear_bias=b, **extras),
        gradients(linear_cross_entropy, x, w, y, linear_bias=b, **extras),
    )


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fake_tensors_that_propagate_real_ones(reduction, dtype, weighted, biased):
    x, w, b = (t.detach().to(dtype).requires_grad_() for t in (hidden(6, 4), head(9, 4), head(9)))
    bias, weight = b if biased else None, weights(1, 9, dtype=dtype) if weighted else None
    known = {"linear_bias": bias, "weight": weight}
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = {name: None if t is None else mode.from_tensor(t) for name, t in known.items()}
        for target in (classes(9, 6), probabilities(6, 9).to(dtype)):
            inputs = [mode.from_tensor(t) for t in (x, w, target)]
            with mode:
                faked = gradients(partial(linear_cross_entropy, reduction=reduction), *inputs, **fake)
            real = gradients(partial(linear_cross_entropy, reduction=reduction), x, w, target, **known)
            test_near([t.real_tensor for t in faked], list(real))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_autocast(soft):
    x, w, y = hidden(8, 6, dtype=torch.float32), head(9, 6, dtype=torch.float32), classes(9, 8, ignored=0.2)
    if soft:
        y = probabilities(8, 9)
    weight = None if soft else weights(1, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (gradients(f, x, w, y, weight=weight) for f in (linear_cross_entropy, unfused))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    test_near(ours, theirs, rtol=1e-2, atol=2e-3)


def test_operators_pass_opcheck():
    x, w, b, y = hidden(6, 4), head(5, 4), head(5), classes(5, 6, ignored=0.2)
    ops = torch.ops.mbperf
    for budget in (None, 1):
        for reduction in range(3):
            torch.library.opcheck(
                ops.linear_cross_entropy, (x, w, y, b, None, reduction), {"memory_budget": budget}
            )
    x, w, b = x.detach(), w.detach(), b.detach()
    settings = (1, -100, 0.1, 0.1, 2.0, 0, -1)
    upstream = torch.ones((), dtype=torch.float64)
    for given in ({"linear_bias": b}, {"linear_bias": b, "weight": weights(1, 5)}):
        torch.library.opcheck(ops.linear_cross_entropy_forward, (x, w, y, *settings, None, True), given)
        torch.library.opcheck(
            ops.linear_cross_entropy_forward_gradient, (x, w, y, *settings, None, [True, False, True]), given
        )
        given = {"grad_loss": upstream, **given}
        torch.library.opcheck(ops.linear_cross_entropy_backward, (x, w, y, *settings, [True] * 3), given)
    torch.library.opcheck(
        ops.linear_cross_entropy_scale_gradients_, ([x.clone()], upstream * 2, y, False, 5, -100)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_little(dtype):
    x, w, y = hidden(200, 32, dtype=dtype), head(700, 32, dtype=dtype), classes(700, 200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gradients(linear_cross_entropy, x, w, y, memory_budget=100_000))
    finally:
        torch.set_num_threads(threads)
    test_near(results[0], results[1])  # the products are torch's, and theirs may differ in the last bit


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_and_degenerate_sizes(shape, reduction):
    n, h, v = shape
    x, w, y = hidden(n, h), head(v, h), classes(max(v, 1), n)
    if v == 0:
        y = y.fill_(-100)
    ours, theirs = (outcome(f, x, w, y, reduction=reduction) for f in (linear_cross_entropy, unfused))
    assert_same_outcome(ours, theirs)


def test_mean_over_zero_weights_is_nan_as_in_torch():
    x, w, y = hidden(4, 3), head(5, 3), classes(5, 4)
    zero = torch.zeros(5, dtype=torch.float64)
    test_near(
        gradients(linear_cross_entropy, x, w, y, weight=zero), gradients(unfused, x, w, y, weight=zero),
        equal_nan=True,
    )  # fmt: skip


def test_extras_are_those_of_cross_entropy():
    x, w, y = hidden(12, 6), head(9, 6), classes(9, 12, ignored=0.3)
    for extras in ({"z_loss": 0.1}, {"z_loss": 0.1, "weight": weights(1, 9)}, {"out_dtype": torch.float32}):
        test_near(
            gradients(lambda x, w, e=extras: linear_cross_entropy(x, w, y, memory_budget=1, **e), x, w),
            gradients(lambda x, w, e=extras: cross_entropy(F.linear(x, w), y, **e), x, w),
        )
    ours = linear_cross_entropy(x, w, y, return_lse=True)
    test_near(ours, cross_entropy(F.linear(x, w), y, return_lse=True))


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"softcap": 0.0}, "softcap must be a number > 0"),
        ({"z_loss": -1.0}, "z_loss must be a number >= 0"),
        ({"memory_budget": -1}, "memory_budget must be a number of bytes >= 0"),
        ({"reduction": "avg"}, "avg is not a valid value for reduction"),
    ],
    ids=str,
)
def test_bad_settings_are_named(extras, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden(4, 3), head(5, 3), classes(5, 4), **extras)


class Transformer(nn.Module):
    """Two causal layers over bytes; the head is left to the loss."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.layers(self.embedding(tokens), mask=mask, is_causal=True)


def test_a_transformer_learns_as_with_the_unfused_way():
    def curve(loss_of):
        torch.manual_seed(0)
        model = Transformer(300, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        tokens = torch.randint(0, 300, (4, 17)).cumsum(1) % 300
        losses = []
        for _ in range(30):
            hidden, target = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            loss = loss_of(hidden, model.head.weight, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    ours = curve(lambda *a: linear_cross_entropy(*a, memory_budget=300 * 4 * 20))
    theirs = curve(unfused)
    assert theirs[-1] < 0.7 * theirs[0]
    test_near(ours, theirs, rtol=1e-4, atol=1e-4)
