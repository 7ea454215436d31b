"""The ways people take log-probabilities and entropies off hidden states; as a script, one's peak memory.

Peak memory is that of forward+backward in the fresh process that runs this file. Inputs are not counted, and
neither are the gradients: linear_token_ways.py WAY N H V [DTYPE].
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from token_ways import fused as from_logits
from token_ways import log_softmax
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mbperf
from mbperf.measure.memory import added_at_peak

Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

CHUNK_ROWS = 64  # what trainers who do this take: a few dozen to a few hundred tokens


def fused(
    input: Tensor, weight: Tensor, target: Tensor, memory_budget: int | None = None
) -> tuple[Tensor, ...]:
    result = mbperf.linear_token_log_probs(
        input, weight, target, return_entropy=True, memory_budget=memory_budget
    )
    return tuple(result)


def unfused(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return log_softmax(F.linear(input, weight), target, 1.0, True)


def two_steps(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return from_logits(F.linear(input, weight), target, 1.0, True)


def checkpointed(input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """A loop over chunks whose logits backward computes again, as TRL, verl and torchtune have it."""
    chunks = [
        checkpoint(unfused, x, weight, y, use_reentrant=False)
        for x, y in zip(input.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True)
    ]
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


WAYS: dict[str, Way] = {
    "fused": fused,
    "torch": unfused,
    "two_steps": two_steps,
    "checkpointed": checkpointed,
}


def peak(way: Way, rows: int, features: int, classes: int, dtype: str = "float32") -> int:
    """Return the bytes above inputs and gradients at the highest."""

    def step(n: int, h: int, v: int) -> int:
        x, w = (torch.randn(size, h).to(getattr(torch, dtype)).requires_grad_() for size in (n, v))
        target, upstream = torch.randint(0, v, (n,)), [torch.randn(n), torch.randn(n)]
        added = added_at_peak(lambda: torch.autograd.grad(way(x, w, target), (x, w), upstream))
        return added - int(x.nbytes + w.nbytes)

    step(64, 64, 512)  # loads code and starts threads
    return step(rows, features, classes)


if __name__ == "__main__":
    every = WAYS | {"fused_16MB": partial(fused, memory_budget=16 << 20)}
    print(peak(every[sys.argv[1]], *map(int, sys.argv[2:5]), *sys.argv[5:]))
