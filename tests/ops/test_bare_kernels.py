"""The CPU's kernels without torch against float64, the same cases on every instruction set, also of ARM64.

Nothing may read or write past an array's end (a fault), before its beginning, or into the gaps between rows.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from bare_kernels import (
    DTYPES,
    LAYOUTS,
    PATHS,
    CrossEntropyCase,
    GatherCase,
    KlDivCase,
    ScanCase,
    SoftcapCase,
    accumulated,
    processors,
    run,
    why_not,
)

from mbperf.testing import cross_entropy_float64, test_near

HALVES = DTYPES[2:]
# Around every width of a vector, few, middling and many classes, around the blocks of long rows.
CLASSES = [
    *range(1, 6),
    *range(7, 12),
    15,
    16,
    17,
    19,
    35,
    64,
    65,
    127,
    129,
    257,
    1000,
    2049,
    4095,
    4097,
    8193,
]
SHAPES = [(1, 37), (2, 19), (7, 6)]  # outer x inner: rows, maps, several maps to a vector


@pytest.fixture(params=processors(), ids=str)
def processor(request):
    """This processor with one of its instruction sets, or an emulated one."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param


def tolerance(dtype):
    return (32 if dtype.itemsize > 2 else 4) * torch.finfo(dtype).eps


def drawn(*shape, dtype, seed, spread=3.0):
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=source, dtype=torch.float64) * spread).to(dtype)


def classes_of(x, seed):
    return torch.randint(0, x.shape[-1], x.shape[:-1], generator=torch.Generator().manual_seed(seed))


# Cross entropy and log-probabilities


def settings_of(kind, x, target):
    """The settings of one of KINDS for logits x and hard targets."""
    classes, real = x.shape[-1], accumulated(x.dtype)
    weight = drawn(classes, dtype=real, seed=3).abs()
    upstream = drawn(*x.shape[:-1], dtype=real, seed=4)
    soft = drawn(*x.shape, dtype=torch.float64, seed=5).softmax(-1).to(x.dtype)
    ignored = int(target.flatten()[0])
    return {
        "hard": {"target": target, "streaming": True},
        "hard, in two passes": {
            "target": target, "ignore_index": ignored, "upstream": upstream, "two_passes": True,
        },
        "smoothed": {
            "target": target, "ignore_index": ignored, "label_smoothing": 0.1, "weight": weight,
            "z_loss": 1e-2,
        },
        "smoothed, in two passes": {
            "target": target, "label_smoothing": 0.1, "upstream": upstream, "two_passes": True,
        },
        "soft": {"target": soft, "weight": weight, "label_smoothing": 0.1, "streaming": True},
        "soft, in two passes": {"target": soft, "upstream": upstream, "two_passes": True},
        "with an entropy": {
            "target": target, "ignore_index": ignored, "temperature": 0.7, "upstream": upstream,
            "entropy_upstream": drawn(*x.shape[:-1], dtype=real, seed=6), "two_passes": True,
        },
    }[kind]  # fmt: skip


KINDS = [
    "hard", "hard, in two passes", "smoothed", "smoothed, in two passes", "soft", "soft, in two passes",
    "with an entropy",
]  # fmt: skip


def case_of(classes, kind, layout, shape, dtype):
    outer, inner = (1, 2) if classes > 1000 else shape
    if layout in ("rows", "apart"):
        outer, inner = 1, outer * inner
    x = drawn(outer, inner, classes, dtype=dtype, seed=classes)
    return CrossEntropyCase(x=x, layout=layout, **settings_of(kind, x, classes_of(x, seed=classes)))


def reference(case):
    """Loss, entropy and gradient of a case in float64."""
    x = case.x.double().flatten(0, 1).requires_grad_()
    target = case.target.flatten(0, 1)
    if case.temperature:
        log_p = (x / case.temperature).log_softmax(1)
        live = target != case.ignore_index
        loss = log_p.gather(1, target.where(live, 0)[:, None])[:, 0].where(live, 0)
        entropy = -(log_p.exp() * log_p).sum(1).where(live, 0)
    else:
        loss = cross_entropy_float64(
            x, target, case.weight, case.ignore_index, "none", label_smoothing=case.label_smoothing
        )
        live = (
            torch.ones(len(x), dtype=torch.bool)
            if target.is_floating_point()
            else target != case.ignore_index
        )
        loss = loss + (case.z_loss * x.logsumexp(1) ** 2).where(live, 0)
        entropy = torch.zeros(len(x), dtype=torch.float64)
    shares = [(loss, case.upstream), (entropy, case.entropy_upstream)]
    total = sum((t if up is None else t * up.flatten().double()).sum() for t, up in shares)
    (grad,) = torch.autograd.grad(total, x)
    grad = grad.where(live[:, None], 0)
    return [t.detach().view(*case.x.shape[:2], *t.shape[1:]) for t in (loss, entropy, grad)]


@cache
def cross_entropy_cases(dtype):
    """Cases and what is right for each: every kind at every number of classes and in every layout."""
    combinations = [
        (classes, kind, LAYOUTS[(i + k) % 4], SHAPES[(i + k) % 3])
        for i, classes in enumerate(CLASSES)
        for k, kind in enumerate(KINDS)
    ]
    combinations += [
        (classes, kind, layout, SHAPES[k % 3])
        for classes in (3, 10, 66)
        for k, kind in enumerate(KINDS)
        for layout in LAYOUTS
    ]
    combinations += [(50_257, "smoothed", "rows", (1, 2)), (140_001, "hard", "rows", (1, 1))]
    cases = [case_of(*combination, dtype) for combination in dict.fromkeys(combinations)]
    return cases, [reference(case) for case in cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(processor, dtype):
    cases, right = cross_entropy_cases(dtype)
    met = set()
    for case, (loss, entropy, grad), passes in zip(cases, right, run(processor, cases), strict=True):
        assert {"rows", "columns"} <= {one.path for one in passes}
        for one in passes:
            met.add(one.path)
            fine, coarse = tolerance(accumulated(dtype)), tolerance(dtype)
            try:
                test_near(one.loss.double(), loss, rtol=fine, atol=fine)
                test_near(one.grad.double(), grad, rtol=coarse, atol=coarse)
                if case.temperature:
                    test_near(one.entropy.double(), entropy, rtol=fine, atol=fine)
                if not case.two_passes and not case.temperature:
                    total = torch.tensor(one.total, dtype=torch.float64)
                    test_near(total, loss.sum(), rtol=fine, atol=fine * loss.numel())
            except AssertionError as error:
                raise AssertionError(f"{one.path}, {case.layout}, {tuple(case.x.shape)}, {case}") from error
    assert met == set(PATHS)


SPECIALS = [math.nan, math.inf, -math.inf]


@cache
def special_cases(dtype):
    cases, right = [], []
    for classes in (1, 3, 7, 10, 17, 64, 100, 257, 4097):
        for special in SPECIALS:
            for place in {0, classes // 2, classes - 1}:
                for smoothing in (0.0, 0.1):
                    x = drawn(1, 5, classes, dtype=dtype, seed=classes)
                    x[0, 2, place] = special
                    target = classes_of(x, seed=1)
                    cases.append(CrossEntropyCase(x=x, target=target, label_smoothing=smoothing))
                    leaf = x[0].double().requires_grad_()
                    loss = F.cross_entropy(leaf, target[0], reduction="none", label_smoothing=smoothing)
                    right.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    return cases, right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_body_and_tail(processor, dtype):
    cases, right = special_cases(dtype)
    for case, (loss, grad), passes in zip(cases, right, run(processor, cases), strict=True):
        for one in passes:
            near = {"equal_nan": True, "rtol": tolerance(dtype), "atol": tolerance(dtype)}
            try:
                test_near(one.loss[0].double(), loss, **near)
                test_near(one.grad[0].double(), grad, **near)
            except AssertionError as error:
                raise AssertionError(f"{one.path}: {case}") from error


# Statistics, soft cap


@cache
def stats_cases(dtype):
    """Cases of every kind without an entropy of its own, and what is right: loss, gradient and statistics."""
    cases, right = [], []
    for i, classes in enumerate(CLASSES):
        for k, kind in enumerate(KINDS[:-1]):
            case = case_of(classes, kind, LAYOUTS[(i + k) % 4], SHAPES[(i + k) % 3], dtype)
            if classes > 2:
                case.x[..., classes // 2] = case.x[..., 1]  # ties, some of them of the largest
            case = replace(case, stats=True, two_passes=False)  # a second pass has no statistics
            loss, _, grad = reference(case)
            p = case.x.double().softmax(2)
            probability, predicted = p.max(2)
            entropy = torch.special.entr(p).sum(2)
            if not case.target.is_floating_point():
                ignored = case.target == case.ignore_index
                entropy, probability = (t.masked_fill(ignored, 0) for t in (entropy, probability))
                predicted = predicted.masked_fill(ignored, -1)
            cases.append(case)
            right.append((loss, grad, entropy, predicted, probability))
    return cases, right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(processor, dtype):
    cases, right = stats_cases(dtype)
    met = set()
    for case, (loss, grad, *stats), passes in zip(cases, right, run(processor, cases), strict=True):
        for one in passes:
            met.add(one.path)
            fine, coarse = tolerance(accumulated(dtype)), tolerance(dtype)
            entropy, predicted, probability = stats
            try:
                test_near(one.loss.double(), loss, rtol=fine, atol=fine)
                test_near(one.grad.double(), grad, rtol=coarse, atol=coarse)
                test_near(one.entropy.double(), entropy, rtol=fine, atol=fine)
                test_near(one.probability.double(), probability, rtol=fine, atol=fine)
                assert (one.predicted == predicted).all()
            except AssertionError as error:
                raise AssertionError(f"{one.path}, {case.layout}, {tuple(case.x.shape)}, {case}") from error
    assert met == set(PATHS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(processor, dtype):
    """Each element for itself, also of infinity and beside a NaN whose upstream gradient is 0."""
    cases = []
    for n in (1, 3, 8, 15, 16, 17, 63, 64, 65, 200, 1001):
        for k, cap in enumerate((30.0, 0.5, 1e4)):
            x, upstream = drawn(n, dtype=dtype, seed=n, spread=20.0), drawn(n, dtype=torch.float64, seed=k)
            x[n // 2] = (math.inf, -math.inf, math.nan)[k]
            upstream[n // 2] = 0
            stride = (1, 2)[(n + k) % 2]
            cases.append(SoftcapCase(x=x, upstream=upstream, cap=cap, stride=stride, streaming=k == 0))
    fine, coarse = tolerance(accumulated(dtype)), tolerance(dtype)
    for case, (y, dx) in zip(cases, run(processor, cases), strict=True):
        t = (case.x.double() / case.cap).tanh()
        slope = (1 - t * t).where(case.upstream != 0, 0)
        try:
            test_near(y.double(), case.cap * t, rtol=fine, atol=fine, equal_nan=True)
            test_near(dx.double(), case.upstream * slope, rtol=coarse, atol=coarse)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_widened_as_torch_widens_it(processor, dtype):
    """The largest logit of a row is handed out; its other classes are smaller or the same."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    cases = []
    for classes, step in ((1, 1), (3, 13), (10, 13), (33, 13)):
        x = bits[::step].view(1, -1, 1).repeat(1, 1, classes)
        cases.append(CrossEntropyCase(x=x, target=torch.zeros(x.shape[:2], dtype=torch.int64)))
    for case, passes in zip(cases, run(processor, cases), strict=True):
        halves = case.x[0, :, 0]
        number = ~halves.isnan()
        for one in passes:
            test_near(one.row_max[0][number].double(), halves[number].double(), rtol=0, atol=0)
            assert one.loss[0][~number].isnan().all(), one.path  # a NaN need not be the largest


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floats_are_rounded_to_halves_as_torch_rounds(processor, dtype):
    """Where one class has all the probability, the gradient is the upstream gradient as it stands."""
    source = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2000,), generator=source, dtype=torch.int64)
    bits[:500] &= ~0x7FFF  # ties and near ones
    bits[500:700] |= 0x7F800000  # infinities and NaN of every payload
    bits[700:900] &= ~0x7F000000  # subnormal
    bits[900:1200] = bits[900:1200] % 2**28 + (100 << 23)  # about float16's own range
    upstream = bits.to(torch.int32).view(torch.float32).view(1, -1)
    cases = []
    for classes, step in ((3, 1), (10, 3), (40, 3), (100, 3), (5000, 40)):
        rows = slice(None, None, step)
        top = torch.randint(0, classes, upstream[:, rows].shape, generator=source)
        x = torch.full((*top.shape, classes), -10_000.0, dtype=dtype).scatter(2, top[..., None], 0.0)
        cases += [
            CrossEntropyCase(x=x, target=(top + 1) % classes, upstream=upstream[:, rows], two_passes=both)
            for both in (False, True)
        ]
    for case, passes in zip(cases, run(processor, cases), strict=True):
        top, y = case.x.float().argmax(2, keepdim=True), case.target[..., None]
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        for one in passes:
            test_near(one.grad.gather(2, top)[..., 0], case.upstream.to(dtype), **exact)
            finite = case.upstream.isfinite()  # else 0 times it comes first
            test_near(one.grad.gather(2, y)[..., 0][finite], (-case.upstream).to(dtype)[finite], **exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_exponential_underflows(processor, dtype):
    """As for the choice of paths in test_cross_entropy_numerics.py, here along each."""
    far_below = [-4.0, -math.inf, *([] if dtype in HALVES else [-90.0, -200.0, -800.0, -1e30])]
    cases = []
    for lowest in far_below:
        for classes in (10, 32, 100, 257):
            x = drawn(1, 40, classes, dtype=dtype, seed=classes, spread=1.0).clamp(-4, 4)
            x[..., 3] = lowest
            target = (torch.arange(40) % 3).view(1, -1)
            cases.append(CrossEntropyCase(x=x, target=target, two_passes=True))
    for case, passes in zip(cases, run(processor, cases), strict=True):
        assert not [one.path for one in passes if one.underflowed], (case.x.shape, case.x[0, 0, 3])


# KL divergence


def kl_reference(case):
    """Loss and gradient in float64."""
    student = case.student.double().requires_grad_()
    log_q, log_p = ((t / case.temperature).log_softmax(1) for t in (student, case.teacher.double()))
    p = log_p.exp()
    loss = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)
    upstream = torch.ones_like(loss) if case.upstream is None else case.upstream.double()
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@cache
def kl_div_cases(dtype):
    cases = []
    for i, classes in enumerate(CLASSES):
        rows = 2 if classes > 1000 else (37, 16, 1)[i % 3]
        student, teacher = (drawn(rows, classes, dtype=dtype, seed=seed) for seed in (classes, 7))
        cases.append(KlDivCase(student=student, teacher=teacher, streaming=True))
        if classes > 1:
            teacher = teacher.index_fill(1, torch.tensor([classes // 2]), -math.inf)
        upstream = drawn(rows, dtype=accumulated(dtype), seed=8)
        cases.append(
            KlDivCase(student=student, teacher=teacher, temperature=2.5, pitch=classes + 3, upstream=upstream)
        )
    return cases, [kl_reference(case) for case in cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_div(processor, dtype):
    cases, right = kl_div_cases(dtype)
    met = set()
    for case, (loss, grad), passes in zip(cases, right, run(processor, cases), strict=True):
        for one in passes:
            met.add(one.path)
            fine, coarse = tolerance(accumulated(dtype)), tolerance(dtype)
            try:
                test_near(one.loss.double(), loss, rtol=fine, atol=fine)
                test_near(one.grad.double(), grad, rtol=coarse, atol=coarse)
            except AssertionError as error:
                raise AssertionError(f"{one.path}: {case}") from error
    assert met == {"rows", "tiles", "columns"}


# Gather and targets


def test_gather(processor):
    cases = []
    for n in (1, 3, 63, 64, 65, 128, 200, 301):
        for values in (
            torch.randint(0, 256, (3 * n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8),
            drawn(3 * n, dtype=torch.float32, seed=n, spread=100.0),
        ):
            mean, scale = drawn(3, dtype=torch.float32, seed=1), drawn(3, dtype=torch.float32, seed=2)
            for dtype in (torch.float32, *HALVES):
                cases += [
                    GatherCase(x=values, dtype=dtype, mean=mean[:1], scale=scale[:1], run=3 * n),
                    GatherCase(x=values, dtype=dtype, mean=mean, scale=scale, run=n),
                    GatherCase(x=values, dtype=dtype, mean=mean, scale=scale, run=1),
                ]
    for case, got in zip(cases, run(processor, cases), strict=True):
        channel = torch.arange(case.x.numel()) // case.run % case.mean.numel()
        right = ((case.x.float() - case.mean[channel]) * case.scale[channel]).to(case.dtype)
        test_near(got, right, rtol=0, atol=0)


def test_targets_out_of_bounds_are_found(processor):
    target = classes_of(torch.empty(700, 10), seed=0)
    target[::9] = -100
    cases = [ScanCase(target=target, classes=10, ignore_index=-100)]
    for wrong, place in ((10, 0), (-1, 255), (2**40, 256), (-(2**63), 699)):
        cases.append(
            ScanCase(target=target.index_fill(0, torch.tensor([place]), wrong), classes=10, ignore_index=-100)
        )
    found, *bad = run(processor, cases)
    assert found == (-1, int((target != -100).sum()))
    assert [place for place, _ in bad] == [0, 255, 256, 699]
