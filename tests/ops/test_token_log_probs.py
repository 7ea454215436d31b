"""token_log_probs: against float64, derivatives of every kind, the compiler, other backends, bad input."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cross_entropy_calls import DTYPES, hard, layouts, logits, placed
from derivatives import functional_transforms
from token_calls import set_special_values, upstream_of, usual, values_and_gradient
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from mbperf import cross_entropy, token_log_probs
from mbperf.extension import _C
from mbperf.testing import test_near

OPS = torch.ops.mbperf
with_entropy = partial(token_log_probs, return_entropy=True)
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


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_against_float64(dtype, temperature, instruction_set):
    """At most twice that of log_softmax in float32 or float64, and a few last places."""
    width = {"avx512": 16, "avx2": 8, "neon": 4, "baseline": 4}[instruction_set]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for classes in (1, 2, 3, width - 1, width, width + 1, 2 * width + 3, 10, 64, 65, 129, 1000, 4097, 9000):
        for rows in (1, width + 1, 70) if classes < 4000 else (2,):
            errors, allowed = torch.zeros(2, 3, dtype=torch.float64)
            for seed in range(4):
                x, y = batch(rows, classes, dtype, seed)
                g = upstream_of(y, seed)
                exact, ours, theirs = (
                    values_and_gradient(function, x, y, g, kind, temperature=temperature)
                    for function, kind in ((usual, torch.float64), (with_entropy, None), (usual, None))
                )
                for k, (truth, mine, reference) in enumerate(zip(exact, ours, theirs, strict=True)):
                    # Of float64 itself the reference is off by some as well.
                    places = 16 if dtype == torch.float64 else 4
                    last_places = places * (eps if k < 2 else torch.finfo(dtype).eps) * truth.abs().max()
                    errors[k] = torch.maximum(errors[k], (mine.double() - truth).abs().max())
                    limit = 2 * (reference.double() - truth).abs().max() + last_places + eps
                    allowed[k] = torch.maximum(allowed[k], limit)
            assert (errors <= allowed).all(), (rows, classes, errors, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 3), (70, 10), (33, 64), (40, 100), (5, 257), (1, 40_000), (2, 21, 6, 7)]
)
def test_paths_agree(shape, dtype, instruction_set, forced):
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    g = upstream_of(y)
    rtol = 16 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    for temperature in (1.0, 1.6):
        exact = values_and_gradient(usual, x, y, g, torch.float64, temperature=temperature)
        for name in _C.cross_entropy_paths(x, y):
            forced(name)
            ours = values_and_gradient(with_entropy, x, y, g, temperature=temperature)
            test_near(ours, exact, rtol=rtol, atol=rtol, check_dtype=False)
            alone = token_log_probs(x, y, temperature=temperature)
            test_near(alone, exact[0], rtol=rtol, atol=rtol, check_dtype=False)


@on_every_device
@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_layout(name, x):
    y = hard(*x.shape)
    g = upstream_of(y)
    leaf = placed(x).requires_grad_()
    outputs = with_entropy(leaf, y, temperature=1.3)
    (grad,) = torch.autograd.grad(outputs, leaf, [each.float() for each in g])
    assert grad.is_contiguous()
    exact = values_and_gradient(usual, leaf, y, g, torch.float64, temperature=1.3)
    test_near((*outputs, grad), exact, rtol=2e-5, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_peaked_rows(dtype, classes, instruction_set):
    """One class with nearly all of the probability: the rest counts down to the last place of float32."""
    x = torch.zeros(24, classes, dtype=torch.float64)
    x[:, 1] = torch.linspace(8, 80, 24)
    x, y = x.to(dtype), torch.arange(24) % 3
    g = [torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64)]
    log_probs, entropy, grad = values_and_gradient(with_entropy, x, y, g)
    # Without the difference of nearly equal logarithms that costs log_softmax its places, also in float64.
    z = x.double() - x[:, 1:2].double()
    rest = (classes - 1) * z[:, 0].exp()
    p, log_s = z.exp() / (1 + rest)[:, None], rest.log1p()
    mean = (p * z).sum(1)
    eps = torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
    # log(1 + rest) is off by the rounding of its argument. As the rest is all equal, each addition to the
    # lane with the 1, of classes / 2 at most, rounds by eps / 2 the same way; the mean is off by last places.
    atol = (2 + classes / 4) * eps
    test_near(log_probs, z[torch.arange(24), y] - log_s, rtol=4 * eps, atol=atol, check_dtype=False)
    test_near(entropy, log_s - mean, rtol=64 * eps, atol=atol, check_dtype=False)
    exact = -p * (z - mean[:, None])
    normal = exact.abs() > 2 * torch.finfo(dtype).tiny
    rtol = 256 * eps + atol if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    test_near(grad[normal], exact[normal], rtol=rtol, atol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 17, 40, 100, 4097, 9000])
def test_special_values(dtype, classes, instruction_set):
    x, y = batch(6, classes, dtype)
    set_special_values(x, y)
    g = upstream_of(y)
    ours = values_and_gradient(with_entropy, x, y, g, temperature=0.5)
    exact = values_and_gradient(usual, x, y, g, torch.float64, temperature=0.5)
    # A gradient of NaN reaches every class of its row, as torch's does.
    test_near(ours, exact, rtol=2e-2, atol=2e-2, check_dtype=False, equal_nan=True)
    assert ours[0][0] == ours[1][0] == 0
    assert (ours[2][0] == 0).all()
    assert ours[0][4] == -math.inf
    assert ours[2][4].isfinite().all()


@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_huge_logits_and_offsets(classes, instruction_set):
    x, y = batch(4, classes, torch.float32)
    offset = x.round() + 2.0**24
    g = upstream_of(y)
    exact = values_and_gradient(usual, offset, y, g, torch.float64)
    test_near(values_and_gradient(with_entropy, offset, y, g), exact, rtol=2e-6, atol=2e-6, check_dtype=False)
    extreme = torch.full((2, classes), -3e38)
    extreme[:, 0] = 3e38
    for temperature in (1e-30, 0.01, 1.0):
        ours = with_entropy(extreme, torch.zeros(2, dtype=torch.int64), temperature=temperature)
        test_near(ours, (torch.zeros(2), torch.zeros(2)), rtol=0, atol=0)
    even = with_entropy(extreme, torch.zeros(2, dtype=torch.int64), temperature=1e30)[1]
    test_near(even, usual(extreme.double(), torch.zeros(2, dtype=torch.int64), 1e30)[1].float(), rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 3, 40, 100, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ignored_row_is_never_read(classes, dtype, instruction_set):
    x, y = batch(40, classes, dtype)
    g = upstream_of(y)
    clean = values_and_gradient(with_entropy, x, y, g)
    live = torch.arange(40) % 3 > 0
    x[~live] = math.nan
    y[~live] = 255
    with_holes = values_and_gradient(with_entropy, x, y, g, ignore_index=255)
    for mine, whole in zip(with_holes, clean, strict=True):
        assert torch.equal(mine[live], whole[live])
        assert (mine[~live] == 0).all()


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_an_entropy_it_is_minus_the_loss(shape, dtype):
    x, y = logits(*shape, dtype=dtype), hard(*shape)
    wide = torch.promote_types(dtype, torch.float32)
    ours, loss = token_log_probs(x, y), cross_entropy(x, y, reduction="none", out_dtype=wide)
    assert torch.equal(ours, -loss)
    upstream = upstream_of(ours)[0].to(wide)
    (mine,), (other,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(loss, x, -upstream)
    assert torch.equal(mine, other)


@on_every_device
def test_dtypes_of_the_result():
    for dtype in DTYPES:
        x, y = logits(4, 5, dtype=dtype), hard(4, 5)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {t.dtype for t in with_entropy(x, y)} == {token_log_probs(x, y).dtype} == {wide}
        for out_dtype in DTYPES:
            outputs = with_entropy(x, y, out_dtype=out_dtype)
            assert {t.dtype for t in outputs} == {out_dtype}
            assert torch.autograd.grad([t.sum() for t in outputs], x)[0].dtype == dtype


def test_shapes_of_targets():
    for target in (torch.tensor(3), torch.tensor([3])):
        log_prob, entropy = with_entropy(logits(5), target)
        assert log_prob.shape == entropy.shape == ()
    test_near(token_log_probs(logits(1), torch.tensor([0])), torch.zeros(()))
    byte = torch.tensor([1, 200, 0], dtype=torch.uint8)
    ours = token_log_probs(logits(3, 5), byte, ignore_index=200)
    assert torch.equal(ours, token_log_probs(logits(3, 5), byte.long(), ignore_index=200))
    for empty in (torch.zeros(0, 5), torch.zeros(0, 5, 3), torch.zeros(2, 5, 0)):
        y = torch.zeros(empty.shape[:1] + empty.shape[2:], dtype=torch.int64)
        x = empty.requires_grad_()
        outputs = with_entropy(x, y)
        assert [t.shape for t in outputs] == [y.shape] * 2
        assert torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    "shape",
    [(64, 10), (5000, 10), (700, 70), (300, 1000), (1, 128_256), (3, 50_257), (2, 21, 64, 64)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    x, y = logits(*shape, dtype=dtype).detach(), hard(*shape)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(values_and_gradient(with_entropy, x, y, upstream_of(y), temperature=0.9))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


# Derivatives


@on_every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_gradcheck_and_gradgradcheck(shape, temperature):
    x, y = logits(*shape, dtype=torch.float64), hard(*shape)
    for function in (
        lambda x: with_entropy(x, y, temperature=temperature),
        lambda x: with_entropy(x, y, temperature=temperature)[1],
        lambda x: token_log_probs(x, y, temperature=temperature),
    ):
        assert gradcheck(function, x)
        if x.numel() < 40:
            assert gradgradcheck(function, x)


@on_every_device
def test_functional_transforms():
    x, y = logits(4, 5, dtype=torch.float64).detach(), hard(4, 5)
    tangent = x.flip(0)

    def of(function):
        return lambda x: torch.stack(function(x, y, temperature=0.8))

    for transform in (
        *functional_transforms(x, tangent),
        lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True),
    ):
        test_near(transform(of(with_entropy)), transform(of(usual)))


@on_every_device
def test_forward_mode():
    x, y = logits(4, 5, dtype=torch.float64).detach(), hard(4, 5)
    tangents = []
    for function in (with_entropy, usual):
        with forward_ad.dual_level():
            duals = function(forward_ad.make_dual(x, x.flip(0)), y)
            tangents.append([forward_ad.unpack_dual(dual).tangent for dual in duals])
    test_near(*tangents)


@on_every_device
@pytest.mark.parametrize("shape", [(4, 5), (3, 70), (3, 5000)], ids=str)
def test_each_output_alone_and_backward_twice(shape):
    x, y = logits(*shape), hard(*shape)
    outputs = with_entropy(x, y)
    g = [each.float() for each in upstream_of(y)]
    alone = [torch.autograd.grad(o, x, up, retain_graph=True)[0] for o, up in zip(outputs, g, strict=True)]
    both, again = (torch.autograd.grad(outputs, x, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(both, again)
    test_near(alone[0] + alone[1], both, rtol=1e-4, atol=1e-6)
    torch.autograd.backward(outputs, g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(outputs, g)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_targets_are_checked_in_forward_and_again_in_backward(bad):
    x, y = logits(4, 5), hard(4, 5)
    log_probs, entropy = with_entropy(x, y)
    y.data[-1] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        (log_probs + entropy).sum().backward()
    assert x.grad is None
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        token_log_probs(x, y)


@on_every_device
def test_logits_that_were_changed_are_noticed():
    x, y = logits(4, 5), hard(4, 5)
    hidden = x * 1
    log_probs = token_log_probs(hidden, y)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


# What is kept, and what is copied


def test_the_logits_are_not_copied_for_a_temperature():
    x, y = logits(300, 1000), hard(300, 1000)

    def call():
        torch.autograd.grad([t.sum() for t in with_entropy(x, y, temperature=0.5)], x)

    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        call()
    sizes = [e.cpu_memory_usage for e in seen.events() if e.cpu_memory_usage > 0]
    assert [size for size in sizes if size >= x.nbytes // 4] in ([], [x.nbytes])  # the gradient alone
    assert not [e for e in seen.events() if e.name == "aten::copy_" and e.input_shapes[0] == [300, 1000]]


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "logits must be float32, .* got Long"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must have a dimension of classes"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must hold int64 .* shape \[3\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, ValueError, "target must hold int64 .* got Int"),
        ({"target": torch.zeros(4, 5)}, ValueError, "target must hold int64 class indices"),
        ({"logits": torch.zeros(4, 5).to_sparse()}, ValueError, "must be dense tensors, got Sparse"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "device of logits, cpu"),
        ({"temperature": 0.0}, ValueError, "temperature must be a number between 1e-30 and 1e30, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a number"),
        ({"temperature": math.nan}, ValueError, "temperature must be a number"),
        ({"temperature": math.inf}, ValueError, "temperature must be a number"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be float32, .* got Int"),
        ({"temperature": "hot"}, RuntimeError, "'temperature'"),
        ({"target": [0, 1, 2, 3]}, RuntimeError, "'target'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    call = {"logits": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.int64)} | change
    for entropy in (True, False):
        with pytest.raises(error, match=message):
            token_log_probs(**call, return_entropy=entropy)


# The page


def test_the_policy_of_the_page_learns():
    page = (Path(__file__).parents[2] / "docs/token_log_probs.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    names: dict = {}
    exec(code, names)
    assert names["rewards"][0] < 0.2 < 0.8 < names["rewards"][-1]
    assert names["entropies"][-1] < names["entropies"][0]
    test_near(names["from_states"], names["from_logits"])
