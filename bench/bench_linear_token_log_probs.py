"""Log-probabilities and entropies from hidden states: chunks of logits, against the ways people write."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR_TOKENS, SHORT, LinearCase
from linear_token_ways import WAYS, Way, unfused
from torch import Tensor

from mbperf.measure.group import Group
from mbperf.measure.memory import printed_by

Step = Callable[..., tuple[Tensor, ...]]


def step(way: Way) -> Step:
    """Forward and backward, with upstream gradients that differ from row to row, as advantages do."""

    def forward_backward(
        input: Tensor, weight: Tensor, target: Tensor, *upstream: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = way(input, weight, target)
        # Float32 made of logits that are rounded to bfloat16 is as exact as bfloat16, and compared as such.
        rounded = [output.to(input.dtype) for output in outputs]
        return *rounded, *torch.autograd.grad(outputs, (input, weight), upstream)

    return forward_backward


def make_inputs(case: LinearCase) -> tuple[Tensor, ...]:
    rows, features, classes = case.shape
    input = torch.randn(rows, features).to(case.dtype).requires_grad_()
    weight = torch.randn(classes, features).mul_(0.05).to(case.dtype).requires_grad_()
    return input, weight, torch.randint(0, classes, (rows,)), torch.randn(rows), torch.randn(rows)


def expected(input: Tensor, weight: Tensor, target: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (input, weight)]
    logits = F.linear(*leaves)
    shifted = logits - logits.detach().amax(1, keepdim=True)
    log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
    outputs = log_p[torch.arange(len(target)), target], -(log_p.exp() * log_p).sum(1)
    return *outputs, *torch.autograd.grad(outputs, leaves, [each.double() for each in upstream])


def peak(way: str, case: LinearCase) -> dict[str, int]:
    script, dtype = Path(__file__).with_name("linear_token_ways.py"), str(case.dtype).removeprefix("torch.")
    return {"peak_memory_bytes": printed_by(script, way, *case.shape, dtype)}


def group(case: LinearCase) -> Group:
    rows, features, classes = case.shape
    facts = {"N": rows, "H": features, "C": classes, "dtype": SHORT[case.dtype], "pass": "fwd+bwd"}
    return Group(
        op="linear_token_log_probs",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={name: step(way) for name, way in WAYS.items()},
        optional={"compiled": lambda: step(torch.compile(unfused, dynamic=False))},
        expected=expected,
        floors={"checkpointed": 1.0},
        facts={**facts, "why": case.why},
        extra_metrics={way: partial(peak, way, case) for way in WAYS} if case.memory else {},
        also_fresh=False,
        input_sets=1 if rows * classes > 1_000_000 else None,
        weight=0.5,
    )


@pytest.mark.race([group(case) for case in LINEAR_TOKENS])
def test_linear_token_log_probs(race):
    race()
