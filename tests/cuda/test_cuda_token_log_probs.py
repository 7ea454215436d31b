"""The CUDA kernels of token_log_probs, run on the CPU by csrc/cuda/host_shim, against float64.

Every launch geometry and layout; on no GPU. test_cuda_kernels.py has what these kernels share with the loss.
"""

import math

import pytest
import torch
from host_kernels import (
    CLUSTERS,
    DTYPES,
    FAMILIES,
    LONG,
    NO_CLUSTERS,
    SLACK,
    SUBNORMAL,
    UNIT,
    Kernels,
    assert_near,
    built_library,
    placed,
    planted_library,
    rows_for,
    sweep,
)
from token_calls import set_special_values, upstream_of, usual, values_and_gradient


@pytest.fixture(scope="module")
def kernels():
    return Kernels(built_library())


def batch(shape, dtype=torch.float32, *, ignore=True, shift=0, seed=0):
    """Logits (N, C) or (N, C, d), targets of which every third is ignored."""
    source = torch.Generator().manual_seed(seed)
    x = placed((torch.randn(shape, generator=source, dtype=torch.float64) * 3).to(dtype), shift)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=source)
    if ignore:
        y.view(-1)[1::3] = -100
    return x, y


def check(kernels, x, y, what="", *, temperature=1.0, entropy=True, device=CLUSTERS):
    """Compare values and the gradient for upstream gradients of all outputs; return them."""
    upstream = upstream_of(y)
    settings = {"temperature": temperature, "device": device}
    rows = kernels.token_log_probs(x, y, entropy=entropy, **settings)
    wanted = upstream if entropy else [upstream[0], None]
    grad = kernels.token_log_probs_gradient(x, y, rows.statistics, *wanted, **settings)
    used = upstream if entropy else [upstream[0], torch.zeros_like(upstream[1])]
    exact = values_and_gradient(usual, x, y, used, torch.float64, temperature=temperature)
    slack = SLACK[x.dtype]
    assert_near(rows.log_probs, exact[0], 0, slack, slack, f"log_probs {what}")
    if entropy:
        assert_near(rows.entropy, exact[1], 0, slack, slack, f"entropy {what}")
    # Where shares cancel out, what is left is an error of the size of the upstream gradient.
    size = max(g.abs().max().item() for g in used) / min(temperature, 1)
    least = SUBNORMAL.get(x.dtype, 0.0) + 2 * slack * size
    assert_near(grad, exact[2], UNIT[x.dtype], slack, least, f"gradient {what}")
    return rows, grad


# Values and layouts.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_float64_over_the_widths(kernels, dtype, temperature):
    for classes in sweep(dtype):
        for shift in (0, 1) if classes > 10 else (0,):
            x, y = batch((rows_for(classes), classes), dtype, shift=shift)
            check(kernels, x, y, f"{classes} classes, shift {shift}", temperature=temperature)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_without_an_entropy(kernels, family, temperature):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=shape[0] > 1)
    check(kernels, x, y, temperature=temperature, entropy=False, device=device)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_upstream_gradient_of_one_output_alone(kernels, family):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=shape[0] > 1)
    g = upstream_of(y)
    rows = kernels.token_log_probs(x, y, temperature=0.7, device=device)
    for given in ([g[0], None], [None, g[1]]):
        grad = kernels.token_log_probs_gradient(x, y, rows.statistics, *given, temperature=0.7, device=device)
        upstream = [torch.zeros_like(g[0]) if each is None else each for each in given]
        exact = values_and_gradient(usual, x, y, upstream, torch.float64, temperature=0.7)[2]
        assert_near(grad, exact, UNIT[torch.float32], 1e-6, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_in_clusters_and_without(kernels, dtype):
    x, y = batch((2, LONG), dtype, ignore=False, shift=1)
    for device in (CLUSTERS, NO_CLUSTERS):
        check(kernels, x, y, f"{device}", temperature=0.7, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_classes_and_padded_rows(kernels, dtype):
    for shape in [(2, 3, 5), (3, 21, 40), (2, 300, 33), (2, 1000, 4), (1, 257, 70)]:
        x, y = batch(shape, dtype)
        check(kernels, x, y, f"{shape}", temperature=0.7)
        last = x.transpose(1, 2).contiguous().transpose(1, 2)
        check(kernels, last, y, f"{shape}, channels last", temperature=0.7)
    x, y = batch((40, 50), dtype)
    check(kernels, x.t().contiguous().t(), y, "transposed")
    for classes in (10, 65, 300):
        x, y = batch((5, classes + 3), dtype)
        check(kernels, x[:, :classes], y.clamp(max=classes - 1), f"{classes} of a padded row")


# Special rows.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 100, 5000])
def test_peaked_rows(kernels, dtype, classes):
    """One class with nearly all of the probability: the rest counts down to the last place of float32."""
    x = torch.zeros(24, classes, dtype=torch.float64)
    x[:, 1] = torch.linspace(8, 80, 24)
    x, y = placed(x.to(dtype)), torch.arange(24) % 3
    rows = kernels.token_log_probs(x, y)
    zero, one = torch.zeros(24), torch.ones(24)
    grad = kernels.token_log_probs_gradient(x, y, rows.statistics, zero, one).double()
    # Without the difference of nearly equal logarithms that costs log_softmax its places, also in float64.
    z = x.double() - x[:, 1:2].double()
    rest = (classes - 1) * z[:, 0].exp()
    p, log_s = z.exp() / (1 + rest)[:, None], rest.log1p()
    mean = (p * z).sum(1)
    eps = torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
    # The rest is all equal, so that each addition to the sum with the 1 rounds by eps / 2 the same way: of at
    # most 64 classes of a thread, and 16 steps from thread to thread.
    atol = (2 + min(classes, 80) / 2) * eps
    assert_near(rows.log_probs, z[torch.arange(24), y] - log_s, 4 * eps, 0, atol)
    assert_near(rows.entropy, log_s - mean, 64 * eps, 0, atol)
    exact = -p * (z - mean[:, None])
    normal = exact.abs() > 2 * torch.finfo(dtype).tiny
    rtol = 256 * eps + atol if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    assert_near(grad[normal], exact[normal], rtol, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 17, 40, 100, 4097, 9000])
def test_special_values(kernels, dtype, classes):
    x, y = batch((6, classes), dtype, ignore=False)
    set_special_values(x, y)
    rows, grad = check(kernels, x, y, temperature=0.5)
    assert rows.log_probs[0] == rows.entropy[0] == 0
    assert (grad[0] == 0).all()
    assert rows.log_probs[4] == -math.inf
    assert grad[4].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_a_row_without_probability(kernels, family):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=False)
    x[:, : shape[1] // 2] = -math.inf
    y.fill_(shape[1] - 1)
    rows, grad = check(kernels, x, y, temperature=0.7, device=device)
    assert rows.entropy.isfinite().all()
    assert (grad[:, : shape[1] // 2] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_rows_count_for_nothing_whatever_they_hold(kernels, family):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=False)
    y.view(-1)[::2] = -100
    ignored = (y == -100).unsqueeze(1).expand(shape)
    x[ignored] = math.nan
    rows, grad = check(kernels, x, y, device=device)
    assert (rows.log_probs[y == -100] == 0).all()
    assert (rows.entropy[y == -100] == 0).all()
    assert (grad[ignored] == 0).all()


# Statistics that are given, the place of the gradient, threads.


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_more_classes_than_are_here(kernels, family):
    """As ranks have them that share out the classes: the gradient is that of a part of a longer row."""
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=False)
    beside, _ = batch(shape, ignore=False, seed=3)
    whole = torch.cat([x, beside + 1], 1)
    g = upstream_of(y)
    rows = kernels.token_log_probs(whole, y, temperature=0.7, device=device)
    exact = values_and_gradient(usual, whole, y, g, torch.float64, temperature=0.7)[2][:, : shape[1]]
    grad = kernels.token_log_probs_gradient(x, y, rows.statistics, *g, temperature=0.7, device=device)
    assert_near(grad, exact, UNIT[torch.float32], 1e-6, 1e-5)
    known = kernels.cross_entropy(whole, y, reduction="none", gradient=False, device=device)
    upstream = g[0].reshape(-1)
    for smoothing in (0.0, 0.1):
        loss = kernels.cross_entropy(
            x, y, reduction="none", known=known, upstream=upstream, label_smoothing=smoothing, device=device
        )
        p = whole.double().softmax(1)[:, : shape[1]]
        t = torch.zeros_like(p).scatter_(1, y.unsqueeze(1), 1 - smoothing) + smoothing / shape[1]
        assert_near(loss.grad, (p - t) * g[0].unsqueeze(1), UNIT[torch.float32], 1e-6, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place(kernels, family):
    shape, device = FAMILIES[family]
    x, y = batch(shape)
    g = upstream_of(y)
    for temperature, given in ((0.7, g), (1.0, g), (1.0, [g[0], None])):
        settings = {"temperature": temperature, "device": device}
        over = placed(x)
        statistics = kernels.token_log_probs(over, y, **settings).statistics
        apart = kernels.token_log_probs_gradient(over, y, statistics, *given, **settings)
        for order in (1, 2):
            kernels.set_order(order)
            over.copy_(x)
            kernels.token_log_probs_gradient(over, y, statistics, *given, grad=over, **settings)
            kernels.set_order(0)
            assert torch.equal(over, apart)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_depends_on_the_order_of_threads(kernels, family):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=shape[0] > 1)
    results = []
    for order in (0, 1, 2):
        kernels.set_order(order)
        rows, grad = check(kernels, x, y, temperature=0.7, device=device)
        results.append([rows.log_probs, rows.entropy, rows.statistics, grad])
    kernels.set_order(0)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", [-1, "classes", 2**40])
def test_a_target_out_of_range_stops_the_kernel(kernels, family, wrong):
    shape, device = FAMILIES[family]
    x, y = batch(shape, ignore=False)
    rows = kernels.token_log_probs(x, y, device=device)
    y.view(-1)[-1] = shape[1] if wrong == "classes" else wrong
    with pytest.raises(RuntimeError, match="assertion failed: y >= 0"):
        kernels.token_log_probs(x, y, device=device)
    with pytest.raises(RuntimeError, match="assertion failed: y >= 0"):
        kernels.token_log_probs_gradient(x, y, rows.statistics, *upstream_of(y), device=device)


# Errors of the kind that entropies have; each has to be found.
REDUCE, ROW = "reduce.cuh", "cross_entropy/row.cuh"
PLANTED = {
    "a moment that is not rebased": (
        REDUCE,
        "ratio * (softmax->moment() + softmax->s * shift)",
        "ratio * softmax->moment()",
    ),
    "a shift that is not over the temperature": (REDUCE, "shift *= inverse_temperature", "shift *= 1"),
    "0 log 0 taken for NaN": (ROW, "if (e != 0) softmax->moment()", "softmax->moment()"),
    "known statistics merged again": (
        ROW,
        "kTarget != Target::kAny && problem",
        "kTarget > Target::kAny && problem",
    ),
}


def finds_errors(kernels):
    """A few cases of each kernel in bfloat16; raises where one of them is wrong."""
    for shape, device in FAMILIES.values():
        x, y = batch(shape, torch.bfloat16, ignore=False)
        check(kernels, x, y, temperature=0.7, device=device)
        x[:, 0], y[:] = -math.inf, 1
        check(kernels, x, y, device=device)
        whole = kernels.token_log_probs(torch.cat([x, x], 1), y, entropy=False, device=device)
        g = upstream_of(y)[0]
        grad = kernels.token_log_probs_gradient(x, y, whole.statistics, g, None, device=device)
        p = x.double().softmax(1) / 2
        exact = (torch.zeros_like(p).scatter_(1, y.unsqueeze(1), 1) - p) * g.unsqueeze(1)
        assert_near(grad, exact, UNIT[torch.bfloat16], 1e-6, 1e-6)


def test_what_finds_planted_errors_finds_none_in_the_kernels(kernels):
    finds_errors(kernels)


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error, tmp_path):
    library = planted_library(tmp_path, *PLANTED[error])
    with pytest.raises(AssertionError):
        finds_errors(Kernels(library))
