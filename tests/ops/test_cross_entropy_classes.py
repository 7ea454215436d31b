"""Numbers of classes up to 600 on every instruction set; ranges of positions that threads take."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from devices import generator

from mbperf import cross_entropy

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GUARD = 96  # elements in front of the logits and behind them: more than a vector of any dtype


@functools.cache
def batch(classes, dtype):
    """Logits, targets of which some are ignored, and the loss and gradient of float64."""
    rows = 33 + classes % 40  # more than a group of any width, hardly ever a multiple of one
    source = generator(classes)
    x = (torch.randn(rows, classes, generator=source, dtype=torch.float64) * 3).to(dtype)
    y = torch.randint(0, classes, (rows,), generator=source)
    y[1::7] = -100
    leaf = x.double().requires_grad_()
    loss = F.cross_entropy(leaf, y, reduction="sum")
    return x, y, loss.detach(), torch.autograd.grad(loss, leaf)[0]


def numbers_of_classes(most):
    """Every one up to 140, then every remainder of a vector, and where another kernel takes over."""
    some = {*range(1, 141), *range(141, 601, 7), 255, 256, 257, 511, 512, 513}
    return sorted(classes for classes in some if classes <= most)


def rows_apart(rows, classes):
    return classes, 1


def columns_apart(rows, classes):
    return 1, rows


def both_apart(rows, classes):
    return 2 * classes, 2


def in_place(x, strides, target, **settings):
    """Loss and gradient, which must lie where the logits lay: a write outside shows, as all around is NaN."""
    memory = torch.full((2 * x.numel() + 2 * GUARD,), math.nan, dtype=x.dtype)
    logits = torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage(), GUARD, x.shape, strides)
    logits.copy_(x.clone().requires_grad_())
    loss = cross_entropy(logits, target, reduction="sum", inplace=True, out_dtype=torch.float64, **settings)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert memory.isnan().sum() == memory.numel() - x.numel()
    return loss, grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("strides", "most"), [(rows_apart, 600), (columns_apart, 140), (both_apart, 70)])
def test_numbers_of_classes(strides, most, dtype, instruction_set):
    tolerance = TOLERANCE[dtype]
    for classes in numbers_of_classes(most):
        x, y, expected_loss, expected_grad = batch(classes, dtype)
        loss, grad = in_place(x, strides(*x.shape), y)
        assert abs(loss - expected_loss) <= tolerance * expected_loss, classes
        assert (grad - expected_grad).abs().max() <= tolerance, classes


@pytest.mark.parametrize("inner", [1, 2, 3, 4, 5, 8, 15, 16, 17, 40, 63])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_maps_of_few_positions(inner, dtype, instruction_set):
    tolerance = 4 * TOLERANCE[dtype]  # also of a smoothed target
    for images, classes in ((1, 3), (2, 64), (7, 21), (37, 1), (37, 2), (37, 21), (37, 65), (300, 3)):
        source = generator(classes)
        x = (torch.randn(images, classes, inner, generator=source, dtype=torch.float64) * 3).to(dtype)
        y = torch.randint(0, classes, (images, inner), generator=source)
        y.view(-1)[::7] = -100
        for target, smoothing in ((y, 0.0), (y, 0.1), (x.roll(1, 0).softmax(1), 0.0)):
            leaf, wide = x.double().requires_grad_(), target if target is y else target.double()
            expected = F.cross_entropy(leaf, wide, reduction="sum", label_smoothing=smoothing)
            (expected_grad,) = torch.autograd.grad(expected, leaf)
            loss, grad = in_place(x, x.stride(), target, label_smoothing=smoothing)
            assert abs(loss - expected) <= tolerance * expected, (images, classes)
            assert (grad - expected_grad).abs().max() <= tolerance, (images, classes)
            leaf = x.clone().requires_grad_()
            losses = cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
            assert (grad - expected_grad).abs().max() <= tolerance, (images, classes)


@pytest.mark.parametrize("shape", [(3, 5000, 21), (2, 40_000, 3), (9, 70, 1000), (1, 3000, 40), (2, 65, 17)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_few_and_many_positions_of_strided_classes(shape, reduction, instruction_set):
    source = generator(0)
    x = torch.randn(shape, generator=source)
    y = torch.randint(0, shape[1], (shape[0], shape[2]), generator=source)
    y.view(-1)[::5] = -100
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    loss, expected = (
        f(leaf, y, reduction=reduction) for f, leaf in ((cross_entropy, ours), (F.cross_entropy, theirs))
    )
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    grads = [
        torch.autograd.grad(value.sum(), leaf)[0].double()
        for value, leaf in ((loss, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("places", [(3,), (70_000,), (3, 70_000), (70_000, 199_999), (199_999,)], ids=str)
def test_the_first_of_many_targets_that_is_out_of_bounds_is_named(places):
    x, y = torch.zeros(200_000, 2, requires_grad=True), torch.zeros(200_000, dtype=torch.int64)
    for place in places:
        y[place] = 2 + place
    with pytest.raises(IndexError, match=f"Target {2 + places[0]} is out of bounds"):
        cross_entropy(x, y)


def test_weights_of_many_targets():
    source = generator(0)
    x, weight = torch.randn(200_003, 3, generator=source), torch.rand(3, generator=source)
    y = torch.randint(0, 3, (200_003,), generator=source)
    y[::3] = -100
    for smoothing in (0.0, 0.1):
        ours = cross_entropy(x.double(), y, weight.double(), label_smoothing=smoothing)
        theirs = F.cross_entropy(x.double(), y, weight.double(), label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
