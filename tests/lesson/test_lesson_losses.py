"""Each step of the lesson's cross entropy against the next, against torch, and against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from mbperf.lesson import losses
from mbperf.lesson.losses import accuracy, logsumexp, nll
from mbperf.testing import cross_entropy_float64, test_near

STEPS = [losses.log_softmax_ratio, losses.log_softmax_difference, losses.log_softmax_stable]


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 10, generator=generator) * 3, torch.randint(10, (64,), generator=generator)


@pytest.mark.parametrize("log_softmax", STEPS)
def test_every_log_softmax_is_torchs(log_softmax, case):
    pred, target = case
    test_near(log_softmax(pred), F.log_softmax(pred, -1))
    test_near(nll(log_softmax(pred), target), F.cross_entropy(pred, target))
    test_near(nll(log_softmax(pred.double()), target), cross_entropy_float64(pred, target))


@pytest.mark.parametrize("log_softmax", STEPS)
def test_every_log_softmax_has_torchs_gradient(log_softmax, case):
    pred, target = case
    ours, theirs = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    nll(log_softmax(ours), target).backward()
    F.cross_entropy(theirs, target).backward()
    test_near(ours.grad, theirs.grad)


@pytest.mark.parametrize("log_softmax", STEPS[:2])
def test_the_first_two_overflow(log_softmax):
    assert not log_softmax(torch.tensor([[1000.0, 0.0]])).isfinite().all()


def test_the_third_and_logsumexp_do_not_overflow():
    big = torch.tensor([[1000.0, 0.0], [-1000.0, -1000.0]])
    # x - logsumexp(x) cancels: the error is half an ulp of 1000, 3.1e-5, however small the result.
    test_near(losses.log_softmax_stable(big), F.log_softmax(big, -1), atol=3.1e-5)
    test_near(logsumexp(big), big.logsumexp(-1))
    test_near(logsumexp(big)[1], -1000 + math.log(2))


def test_the_final_log_softmax_is_the_stable_one():
    assert losses.log_softmax is losses.log_softmax_stable


def test_nll_is_torchs(case):
    pred, target = case
    test_near(nll(pred, target), F.nll_loss(pred, target))


def test_accuracy_counts_rows():
    out = torch.eye(4)
    test_near(accuracy(out, torch.arange(4)), 1.0)
    test_near(accuracy(out, torch.tensor([0, 1, 3, 2])), 0.5)
    test_near(accuracy(out, torch.tensor([1, 2, 3, 0])), 0.0)
