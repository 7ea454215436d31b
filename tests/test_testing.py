"""test_near must fail when it should; the float64 reference must be F.cross_entropy's answer."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mbperf import testing
from mbperf.testing import TOLERANCES, cross_entropy_float64, test_near

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_near_within_and_beyond_the_tolerance_of_each_dtype(dtype):
    reference = torch.tensor([1.0, -64.0], dtype=dtype)
    rtol, atol = TOLERANCES[dtype]
    step = torch.finfo(dtype).eps
    test_near(reference * (1 + step), reference)
    with pytest.raises(AssertionError, match="2 of 2 values"):
        test_near((reference.double() * (1 + 4 * (rtol + atol))).to(dtype), reference)


@pytest.mark.parametrize("dtype", FLOATS)
def test_near_zero_is_judged_by_atol(dtype):
    zero = torch.zeros(3, dtype=dtype)
    test_near(zero + TOLERANCES[dtype][1] / 2, zero)
    with pytest.raises(AssertionError, match="3 of 3"):
        test_near(zero + TOLERANCES[dtype][1] * 2, zero)


def test_near_takes_given_tolerances():
    a, b = torch.tensor([1.1]), torch.tensor([1.0])
    test_near(a, b, rtol=0.2)
    test_near(a, b, atol=0.2)
    with pytest.raises(AssertionError):
        test_near(a, b, rtol=0.05)
    test_near(torch.tensor([3]), torch.tensor([4]), atol=1)


def test_near_message_says_how_many_how_far_and_where():
    b = torch.ones(4, 5)
    a = b.clone()
    a[2, 3] = 3.0
    b[1, 4] = 0.25
    with pytest.raises(AssertionError) as failure:
        test_near(a, b)
    message = str(failure.value)
    assert "2 of 20 values" in message
    assert "max abs error 2 at [2, 3] (got 3.0, expected 1.0)" in message
    assert "max rel error 3 at [1, 4] (got 1.0, expected 0.25)" in message
    assert "torch.float32" in message


def test_near_nan_only_on_request():
    a = torch.tensor([1.0, math.nan])
    with pytest.raises(AssertionError, match=r"1 of 2 .* at \[1\]"):
        test_near(a, a)
    test_near(a, a, equal_nan=True)
    with pytest.raises(AssertionError):
        test_near(a, torch.tensor([1.0, 2.0]), equal_nan=True)
    with pytest.raises(AssertionError):
        test_near(torch.tensor([1.0, 2.0]), a, equal_nan=True)


def test_near_infinities_only_when_the_same():
    inf = torch.tensor([math.inf, -math.inf])
    test_near(inf, inf)
    for other in (-inf, torch.tensor([1.0, 1.0]), torch.tensor([math.nan, math.nan])):
        with pytest.raises(AssertionError):
            test_near(inf, other)
        with pytest.raises(AssertionError):
            test_near(other, inf)


def test_near_does_not_overflow_at_the_end_of_the_range():
    big = torch.tensor([3e38])
    test_near(big, big)
    with pytest.raises(AssertionError):
        test_near(big, -big)
    huge = torch.tensor([1.7e308], dtype=torch.float64)
    with pytest.raises(AssertionError):
        test_near(huge, -huge)


def test_near_shape_dtype_and_structure_are_part_of_the_value():
    with pytest.raises(AssertionError, match=r"has shape \(3,\), expected \(3, 1\)"):
        test_near(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(AssertionError, match=r"has shape \(\), expected \(1,\)"):
        test_near(torch.tensor(0.0), torch.zeros(1))
    with pytest.raises(AssertionError, match=r"has dtype torch.float32, expected torch.float64"):
        test_near(torch.zeros(3), torch.zeros(3).double())
    test_near(torch.zeros(3), torch.zeros(3).double(), check_dtype=False)
    with pytest.raises(AssertionError):
        test_near({"a": 1}, 1)
    with pytest.raises(AssertionError, match="cannot be compared"):
        test_near(torch.zeros(3), object())


def test_near_across_dtypes_uses_the_coarser_tolerance():
    b = torch.tensor([1.0], dtype=torch.float64)
    test_near((b * 1.008).bfloat16(), b, check_dtype=False)
    with pytest.raises(AssertionError):
        test_near((b * 1.008).float(), b, check_dtype=False)


def test_near_integers_and_bools_are_exact():
    test_near(torch.tensor([1, 2]), torch.tensor([1, 2]))
    for a, b in [([1, 2], [1, 3]), ([True], [False]), ([2**53 + 1], [2**53])]:
        with pytest.raises(AssertionError):
            test_near(torch.tensor(a), torch.tensor(b))


def test_near_numbers_take_the_dtype_opposite_but_are_not_truncated():
    test_near(torch.tensor(0.1), 0.1)
    test_near(torch.tensor(2), 2)
    test_near(1, 1.0)
    test_near(np.float32(0.1), torch.tensor(0.1))
    test_near(np.arange(3), torch.arange(3))
    with pytest.raises(AssertionError, match="dtype"):
        test_near(torch.tensor(2), 2.5)
    with pytest.raises(AssertionError):
        test_near(1.0, 1.0 + 1e-6)


def test_near_walks_structures_and_names_the_entry():
    batch = {"x": [torch.zeros(2), torch.ones(2)], "name": ["a", "b"], "none": None}
    test_near(batch, {"x": (torch.zeros(2), torch.ones(2)), "name": ["a", "b"], "none": None})
    with pytest.raises(AssertionError, match=r"a\['x'\]\[1\] differs in 2 of 2"):
        test_near(batch, batch | {"x": [torch.zeros(2), torch.zeros(2)]})
    with pytest.raises(AssertionError, match=r"a\['name'\]\[1\] is 'b', expected 'c'"):
        test_near(batch, batch | {"name": ["a", "c"]})
    with pytest.raises(AssertionError, match="keys are"):
        test_near(batch, {"x": 1})
    with pytest.raises(AssertionError, match="has 2 entries, expected 1"):
        test_near(batch, batch | {"x": [torch.zeros(2)]})
    with pytest.raises(AssertionError, match=r"a\['none'\] is None"):
        test_near(batch, batch | {"none": 0})


def test_near_empty_tensors_are_near():
    test_near(torch.empty(0, 3), torch.empty(0, 3))


def test_near_leaves_its_inputs_alone():
    a = torch.tensor([1.0], requires_grad=True)
    test_near(a, torch.tensor([1.0]))
    assert a.requires_grad
    assert a.grad is None


def test_near_is_not_collected_by_pytest():
    assert testing.test_near.__test__ is False


SHAPES = [(7,), (5, 7), (1, 1), (4, 3, 2), (2, 4, 3, 5)]


def hard_case(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator) * 3
    n_classes = shape[0] if len(shape) == 1 else shape[1]
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(n_classes, positions, generator=generator)
    weight = torch.rand(n_classes, dtype=torch.float64, generator=generator) + 0.1
    return logits, target, weight


def both(logits, target, upstream_seed=1, **settings):
    """Value and gradients, ours and torch's, with a random upstream gradient."""
    outcomes = []
    for function in (cross_entropy_float64, F.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target, **settings)
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(upstream_seed)).double()
        loss.backward(upstream)
        outcomes.append([loss.detach(), leaf.grad])
    return outcomes


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_torch_on_hard_targets(shape, reduction):
    logits, target, weight = hard_case(shape)
    some_class = int(target.flatten()[0])
    for weighted, ignore_index, smoothing in itertools.product(
        [False, True], [-100, some_class], [0.0, 0.1, 1.0]
    ):
        if shape == (7,) and ignore_index == some_class:
            continue
        ours, theirs = both(
            logits,
            target,
            weight=weight if weighted else None,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )
        # The single-class shape ignores every position: nan, with gradient 0, in both.
        test_near(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_torch_on_soft_targets(shape, reduction):
    logits, _, weight = hard_case(shape)
    target = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for weighted, smoothing in itertools.product([False, True], [0.0, 0.1, 1.0]):
        settings = {"weight": weight if weighted else None, "label_smoothing": smoothing}
        ours, theirs = both(logits, target, reduction=reduction, **settings)
        test_near(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reference_is_differentiable_in_soft_target_and_weight():
    logits, _, weight = hard_case((5, 7))
    target = torch.rand(5, 7, dtype=torch.float64).requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, t, w: cross_entropy_float64(x, t, w, label_smoothing=0.1),
        (logits.requires_grad_(), target, weight),
    )


def test_reference_twice_differentiable():
    logits, target, _ = hard_case((3, 4))
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy_float64(x, target), logits.requires_grad_())


def test_reference_of_an_ignored_row_does_not_read_it():
    logits = torch.tensor([[0.0, 1.0], [math.nan, math.inf]], requires_grad=True)
    loss = cross_entropy_float64(logits, torch.tensor([1, -100]))
    loss.backward()
    test_near(loss, F.cross_entropy(logits[:1].detach().double(), torch.tensor([1])))
    assert logits.grad[1].tolist() == [0.0, 0.0]
    assert logits.grad[0].isfinite().all()


@pytest.mark.parametrize("case", ["ignored", "empty", "zero weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_equals_torch_where_nothing_counts(case, reduction):
    logits, target, weight = hard_case((4, 3))
    settings = {}
    if case == "ignored":
        target = torch.full_like(target, -100)
    elif case == "empty":
        logits, target = logits[:0], target[:0]
    else:
        settings["weight"] = torch.zeros_like(weight)
    ours, theirs = both(logits, target, reduction=reduction, **settings)
    test_near(ours, theirs, equal_nan=True)


def test_reference_with_minus_infinity_and_huge_logits():
    inf = math.inf
    rows = [
        ([0.0, -inf, 1.0], 0, 0.0, True),
        ([0.0, -inf, 1.0], 1, 0.0, False),
        ([0.0, -inf, 1.0], 0, 0.1, False),
        ([-inf, -inf, -inf], 0, 0.0, False),
        ([inf, 0.0, 0.0], 1, 0.0, False),
        ([3e38, -3e38, 0.0], 0, 0.0, True),
        ([2.0**24 + 1, 2.0**24, 2.0**24], 1, 0.0, True),
    ]
    for row, label, smoothing, finite in rows:
        logits, target = torch.tensor([row], dtype=torch.float64), torch.tensor([label])
        ours, theirs = both(logits, target, label_smoothing=smoothing)
        test_near(ours[0], theirs[0], rtol=1e-12, equal_nan=True)
        assert ours[0].isfinite().item() is finite


def test_reference_keeps_small_differences_on_a_large_offset():
    near_max = torch.tensor([[1e15 + 1, 1e15]], dtype=torch.float64)
    small = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    assert cross_entropy_float64(near_max, target).item() == cross_entropy_float64(small, target).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_takes_any_floating_dtype_and_byte_targets(dtype):
    logits, target, _ = hard_case((5, 7))
    leaf = logits.to(dtype).requires_grad_()
    loss = cross_entropy_float64(leaf, target.to(torch.uint8))
    loss.backward()
    assert loss.dtype is torch.float64
    assert leaf.grad.dtype is dtype
    test_near(loss, F.cross_entropy(logits.to(dtype).double(), target))


def test_reference_accepts_a_target_of_one_for_one_dimensional_logits():
    logits, target, _ = hard_case((7,))
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy_float64(logits, target.reshape(1), reduction=reduction)
        assert loss.shape == ()
        test_near(loss, F.cross_entropy(logits, target))


def test_reference_refuses_bad_arguments():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'avg'"):
        cross_entropy_float64(logits, torch.tensor([0, 1]), reduction="avg")
    for label in (5, -1):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            cross_entropy_float64(logits, torch.tensor([0, label]))
