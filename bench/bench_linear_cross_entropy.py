"""Linear + cross entropy from chunks of logits, against the unfused ways and torch's own chunks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR, SHORT, LinearCase
from torch import Tensor

import mbperf
from mbperf.measure.group import Group
from mbperf.measure.memory import printed_by

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfused(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def two_steps(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return mbperf.cross_entropy(F.linear(input, weight), target)


def torchs_chunks(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def step(loss: Loss) -> Callable[..., Any]:
    """Forward and backward, as they are timed."""

    def forward_backward(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(input, weight, target)
        return value, *torch.autograd.grad(value, (input, weight))

    return forward_backward


def products(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The three that no way can do without, of the rows that count; what the logits are does not matter."""
    with torch.no_grad():
        live = target != -100
        rows = input if live.all() else input[live]
        logits = F.linear(rows, weight)
        return logits @ weight, logits.T @ rows


def make_inputs(case: LinearCase) -> tuple[Tensor, ...]:
    rows, features, classes = case.shape
    input = torch.randn(rows, features).to(case.dtype).requires_grad_()
    weight = torch.randn(classes, features).mul_(0.05).to(case.dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < case.ignored] = -100
    return input, weight, target


def expected(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (input, weight)]
    value = F.cross_entropy(F.linear(*leaves), target)
    return value, *torch.autograd.grad(value, leaves)


def contenders(case: LinearCase) -> dict[str, Callable[..., Any]]:
    ways: dict[str, Callable[..., Any]] = {
        "fused": step(mbperf.linear_cross_entropy),
        "torch": step(unfused),
        "two_steps": step(two_steps),
    }
    if case.chunked and hasattr(F, "linear_cross_entropy"):
        ways["torch_chunked"] = step(torchs_chunks)
    return ways


def peak(way: str, case: LinearCase) -> dict[str, int]:
    script = Path(__file__).with_name("linear_memory.py")
    dtype = str(case.dtype).removeprefix("torch.")
    return {"peak_memory_bytes": printed_by(script, way, *case.shape, dtype)}


def group(case: LinearCase) -> Group:
    rows, features, classes = case.shape
    return Group(
        op="linear_cross_entropy",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders=contenders(case),
        optional={"compiled": lambda: step(torch.compile(unfused, dynamic=False))},
        expected=expected,
        limit=products,
        floors={"torch": 1.0} | ({"torch_chunked": 4.0} if case.chunked else {}),
        facts={
            "N": rows,
            "H": features,
            "C": classes,
            "dtype": SHORT[case.dtype],
            "pass": "fwd+bwd",
            "limit": "the three products",
            "why": case.why,
        },
        extra_metrics={way: partial(peak, way, case) for way in ("fused", "torch", "two_steps")}
        if case.memory
        else {},
        also_fresh=rows * classes <= 1_000_000,
        input_sets=1 if rows * classes > 1_000_000 else None,
        weight=0.5,
    )


@pytest.mark.race([group(case) for case in LINEAR])
def test_linear_cross_entropy(race):
    race()
