"""The lesson with the fused loss and batch dropped in: same curve, same weights, same accuracy."""

import pytest
import torch
import torch.nn.functional as F

import mbperf
from mbperf.lesson import Dataset, collate, fit, get_dls, get_model
from mbperf.testing import test_near

EPOCHS, BS = 5, 64
BATCHES = EPOCHS * (782 + 79)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(digits, loss_func, collate_fn, dtype):
    """Five epochs of the lesson; returns the loss of every batch, the weights, and what fit returns."""
    x_train, y_train, x_valid, y_valid = digits
    torch.manual_seed(0)
    model, opt = get_model()
    model.to(dtype)
    train_ds, valid_ds = Dataset(x_train.to(dtype), y_train), Dataset(x_valid.to(dtype), y_valid)
    curve = []

    def recorded(pred, yb):
        loss = loss_func(pred, yb)
        curve.append(loss.detach())
        return loss

    outcome = fit(EPOCHS, model, recorded, opt, *get_dls(train_ds, valid_ds, BS, collate_fn=collate_fn))
    return torch.stack(curve), [p.detach() for p in model.parameters()], outcome


# float32 curves that differ in a last bit part once a hidden unit within rounding of 0 falls on different
# sides of ReLU: seen in three of nine runs (three instruction sets, three learning rates), from the second
# epoch on. In float64 it was not seen (largest difference over all five epochs: 8e-15), so there the whole
# curve is compared.
@pytest.mark.parametrize(("dtype", "n_batches"), [(torch.float32, 200), (torch.float64, BATCHES)])
def test_the_fused_ops_train_the_lesson_along_the_same_curve(dtype, n_batches, digits):
    curve, weights, (loss, acc) = train(digits, mbperf.cross_entropy, mbperf.collate, dtype)
    expected_curve, expected_weights, expected = train(digits, F.cross_entropy, collate, dtype)
    assert len(curve) == BATCHES
    assert curve.dtype is dtype
    assert acc > 0.95
    assert expected[1] > 0.95
    test_near(curve[:n_batches], expected_curve[:n_batches])
    if n_batches == BATCHES:
        test_near(weights, expected_weights)
        test_near((loss, acc), expected)
