"""KL divergence from logits: fused against log_softmax of both and F.kl_div, against the memory limit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KL_DIV, SHORT, KlDivCase
from kl_div_memory import by_torch
from torch import Tensor

import mbperf
from mbperf.measure.group import Group
from mbperf.measure.memory import printed_by
from mbperf.measure.traffic import kl_div_traffic


def step(case: KlDivCase, loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """Forward and backward, as they are timed."""

    def forward_backward(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        value = loss(student, teacher, temperature=case.temperature)
        return value, *torch.autograd.grad(value, student)

    return forward_backward


def make_inputs(case: KlDivCase) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(case.shape).to(case.dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def expected(case: KlDivCase, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    q, p = ((t.double() / case.temperature).softmax(1) for t in (student, teacher))
    loss = (p * (p.log() - q.log())).sum() / len(p)
    return loss, (q - p) / (case.temperature * len(p))


def peak(way: str, case: KlDivCase) -> dict[str, int]:
    script = Path(__file__).with_name("kl_div_memory.py")
    return {"peak_memory_bytes": printed_by(script, way, *case.shape)}


def group(case: KlDivCase) -> Group:
    rows, classes = case.shape
    return Group(
        op="kl_div",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={"fused": step(case, mbperf.kl_div_from_logits), "torch": step(case, by_torch)},
        optional={"compiled": lambda: step(case, torch.compile(by_torch, dynamic=False))},
        expected=partial(expected, case),
        traffic=kl_div_traffic(rows, classes, case.dtype.itemsize),
        floors={"torch": case.floor},
        facts={
            "N": rows,
            "C": classes,
            "dtype": SHORT[case.dtype],
            "pass": "fwd+bwd",
            "temperature": case.temperature,
            "why": case.why,
        },
        extra_metrics={way: partial(peak, way, case) for way in ("fused", "torch")} if case.memory else {},
    )


@pytest.mark.race([group(case) for case in KL_DIV])
def test_kl_div(race):
    race()
