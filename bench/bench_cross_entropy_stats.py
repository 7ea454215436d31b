"""A loss beside entropies and predictions: fused, by softmax, by log_softmax; against the memory limit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FORWARD_BACKWARD, NO_GRAD, SHORT, STATS, StatsCase
from torch import Tensor

import mbperf
from mbperf.measure.group import Group
from mbperf.measure.traffic import cross_entropy_stats_traffic

Way = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def fused(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return mbperf.cross_entropy_with_stats(logits, target)


def softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss, and what is logged of it by operators of its own."""
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():
        p = logits.float().softmax(-1)
        return loss, torch.special.entr(p).sum(-1), logits.argmax(-1), p.amax(-1)


def log_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """One log_softmax for all, in float32."""
    log_p = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_p, target).to(logits.dtype)
    with torch.no_grad():
        largest = log_p.max(-1)
        return loss, -(log_p.exp() * log_p).sum(-1), largest.indices, largest.values.exp()


def step(case: StatsCase, way: Way) -> Callable[..., tuple[Tensor, ...]]:
    """The function that is timed."""

    def no_grad(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return way(logits, target)

    def forward_backward(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, *stats = way(logits, target)
        return loss, *stats, *torch.autograd.grad(loss, logits)

    return no_grad if case.step == NO_GRAD else forward_backward


def make_inputs(case: StatsCase) -> tuple[Tensor, ...]:
    rows, classes = case.shape
    logits = torch.randn(case.shape).mul_(2).to(case.dtype)
    # One class ahead of all others: of two that are equal in log_softmax alone either may be the largest.
    logits[torch.arange(rows), torch.randint(0, classes, (rows,))] = 12
    return logits.requires_grad_(case.step != NO_GRAD), torch.randint(0, classes, (rows,))


def expected(case: StatsCase, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    z = logits.detach().double() - logits.detach().double().amax(1, keepdim=True)
    p = z.exp() / z.exp().sum(1, keepdim=True)
    log_p = z - z.exp().sum(1, keepdim=True).log()
    rows = torch.arange(len(target))
    outputs = -log_p[rows, target].mean(), -(p * log_p).sum(1), (z == 0).double().argmax(1), p.amax(1)
    if case.step == NO_GRAD:
        return outputs
    grad = p.clone()
    grad[rows, target] -= 1
    return *outputs, grad / len(target)


def group(case: StatsCase) -> Group:
    rows, classes = case.shape
    facts: dict[str, Any] = {"N": rows, "C": classes, "dtype": SHORT[case.dtype], "pass": case.step}
    return Group(
        op="cross_entropy_with_stats",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={
            "fused": step(case, fused),
            "torch": step(case, softmax),
            "log_softmax": step(case, log_softmax),
        },
        optional={"compiled": lambda: step(case, torch.compile(softmax, dynamic=False))},
        expected=partial(expected, case),
        traffic=cross_entropy_stats_traffic(
            rows, classes, case.dtype.itemsize, backward=case.step == FORWARD_BACKWARD
        ),
        floors={"torch": case.floor} if case.floor else {},
        facts={**facts, "why": case.why},
        input_sets=2 if rows * classes > 1_000_000 else None,
        weight=0.5,
    )


@pytest.mark.race([group(case) for case in STATS])
def test_cross_entropy_with_stats(race):
    race()
