"""The loss of soft-capped logits: fused, by tanh and F.cross_entropy, against the memory limit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SHORT, SOFTCAP, SoftcapCase
from torch import Tensor

import mbperf
from mbperf.measure.group import Group
from mbperf.measure.traffic import cross_entropy_traffic

CAP = 30.0


def fused(logits: Tensor, target: Tensor) -> Tensor:
    return mbperf.cross_entropy(logits, target, softcap=CAP)


def by_torch(logits: Tensor, target: Tensor) -> Tensor:
    """As the models write it, in the dtype of the logits."""
    return F.cross_entropy(CAP * torch.tanh(logits / CAP), target)


def apart(logits: Tensor, target: Tensor) -> Tensor:
    """The cap by torch, the loss fused."""
    return mbperf.cross_entropy(CAP * torch.tanh(logits / CAP), target)


def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward, as they are timed."""

    def forward_backward(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(logits, target)
        return value, *torch.autograd.grad(value, logits)

    return forward_backward


def make_inputs(case: SoftcapCase) -> tuple[Tensor, ...]:
    rows, classes = case.shape
    logits = torch.randn(case.shape).mul_(8).to(case.dtype)
    return logits.requires_grad_(), torch.randint(0, classes, (rows,))


def expected(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    t = (logits.detach().double() / CAP).tanh()
    rows = torch.arange(len(target))
    p = (CAP * (t - t.amax(1, keepdim=True))).exp()
    p /= p.sum(1, keepdim=True)
    loss = -p[rows, target].log().mean()
    p[rows, target] -= 1
    return loss, p * (1 - t * t) / len(target)


def group(case: SoftcapCase) -> Group:
    rows, classes = case.shape
    facts: dict[str, Any] = {"N": rows, "C": classes, "dtype": SHORT[case.dtype], "cap": CAP}
    return Group(
        op="softcap",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={"fused": step(fused), "torch": step(by_torch), "apart": step(apart)},
        optional={"compiled": lambda: step(torch.compile(by_torch, dynamic=False))},
        expected=expected,
        traffic=cross_entropy_traffic(rows, classes, case.dtype.itemsize, backward=True),
        floors={"torch": case.floor} if case.floor else {},
        facts={**facts, "why": case.why},
        input_sets=2 if rows * classes > 1_000_000 else None,
        weight=0.5,
    )


@pytest.mark.race([group(case) for case in SOFTCAP])
def test_softcap(race):
    race()
