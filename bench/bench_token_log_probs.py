"""Log-probabilities of tokens, entropies: fused, by log_softmax, by logsumexp, against the memory limit."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORWARD_BACKWARD, LARGE_TOKENS, NO_GRAD, SHORT, TOKENS, TokenCase
from token_ways import WAYS, Way
from torch import Tensor

from mbperf.measure.group import Group
from mbperf.measure.memory import printed_by
from mbperf.measure.traffic import token_log_probs_traffic

Step = Callable[..., tuple[Tensor, ...]]


def step(case: TokenCase, way: Way) -> Step:
    """The function that is timed; upstream gradients differ from row to row, as advantages do."""

    def no_grad(logits: Tensor, target: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return way(logits, target, case.temperature, case.entropy)

    def forward_backward(logits: Tensor, target: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
        outputs = way(logits, target, case.temperature, case.entropy)
        return *outputs, *torch.autograd.grad(outputs, logits, upstream)

    return no_grad if case.step == NO_GRAD else forward_backward


def make_inputs(case: TokenCase) -> tuple[Tensor, ...]:
    rows, classes = case.shape
    logits = torch.randn(case.shape).mul_(2).to(case.dtype).requires_grad_(case.step != NO_GRAD)
    upstream = [torch.randn(rows) for _ in range(1 + case.entropy)]
    return logits, torch.randint(0, classes, (rows,)), *upstream


def expected(case: TokenCase, logits: Tensor, target: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
    """Computed in float64, some rows at a time, and kept in float32 for halves: the judge holds two of it."""
    chunks = (tensor.split(1_024) for tensor in (logits, target, *upstream))
    kept = torch.float64 if case.dtype.itemsize > 2 else torch.float32
    of_rows = [
        [output.to(kept) for output in expected_of_rows(case, *its)] for its in zip(*chunks, strict=True)
    ]
    return tuple(map(torch.cat, zip(*of_rows, strict=True)))


def expected_of_rows(
    case: TokenCase, logits: Tensor, target: Tensor, *upstream: Tensor
) -> tuple[Tensor, ...]:
    leaf = logits.detach().double().requires_grad_()
    shifted = (leaf - leaf.detach().amax(1, keepdim=True)) / case.temperature
    log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
    outputs = [log_p[torch.arange(len(target)), target], -(log_p.exp() * log_p).sum(1)][: 1 + case.entropy]
    if case.step == NO_GRAD:
        return tuple(outputs)
    return *outputs, *torch.autograd.grad(outputs, leaf, [each.double() for each in upstream])


def peak(way: str, case: TokenCase) -> dict[str, int]:
    script = Path(__file__).with_name("token_ways.py")
    dtype = str(case.dtype).removeprefix("torch.")
    return {"peak_memory_bytes": printed_by(script, way, *case.shape, dtype)}


def group(case: TokenCase) -> Group:
    rows, classes = case.shape
    facts: dict[str, Any] = {"N": rows, "C": classes, "dtype": SHORT[case.dtype], "pass": case.step}
    # Results of all contenders are held at once while they are compared.
    ways = {name: WAYS[name] for name in ("fused", "torch")} if case in LARGE_TOKENS else WAYS
    return Group(
        op="token_log_probs",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={name: step(case, way) for name, way in ways.items()},
        optional={"compiled": lambda: step(case, torch.compile(WAYS["torch"], dynamic=False))},
        expected=partial(expected, case),
        traffic=token_log_probs_traffic(
            rows,
            classes,
            case.dtype.itemsize,
            backward=case.step == FORWARD_BACKWARD,
            entropy=case.entropy,
        ),
        floors={"torch": case.floor} if case.floor else {},
        facts={**facts, "options": case.options, "why": case.why},
        extra_metrics={way: partial(peak, way, case) for way in ways} if case.memory else {},
        min_rounds=3 if case in LARGE_TOKENS else None,
        also_fresh=case not in LARGE_TOKENS,
        input_sets=1 if case in LARGE_TOKENS else 2 if rows * classes > 1_000_000 else None,
        weight=0.5,
    )


GROUPS = [group(case) for case in (*TOKENS, *(LARGE_TOKENS if "MBPERF_LARGE" in os.environ else ()))]


@pytest.mark.race(GROUPS)
def test_token_log_probs(race):
    race()
