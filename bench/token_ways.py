"""The ways people take log-probabilities and entropies off logits; as a script, the peak memory of one.

Peak memory is that of forward+backward with an entropy in the fresh process that runs this file, with the
gradient and without the logits: token_ways.py WAY N C [DTYPE].
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import mbperf
from mbperf.measure.memory import added_at_peak

Way = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, ...]]


def fused(logits: Tensor, target: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    result = mbperf.token_log_probs(logits, target, temperature=temperature, return_entropy=entropy)
    return result if isinstance(result, tuple) else (result,)


def log_softmax(
    logits: Tensor, target: Tensor, temperature: float, entropy: bool, classes: int = -1
) -> tuple[Tensor, ...]:
    """In float32, as trainers widen bfloat16 logits; `classes` is their dimension."""
    x = logits.float() / temperature if temperature != 1 else logits.float()
    log_p = x.log_softmax(classes)
    log_probs = log_p.gather(classes, target.unsqueeze(classes)).squeeze(classes)
    return (log_probs, -(log_p.exp() * log_p).sum(classes)) if entropy else (log_probs,)


def logsumexp(logits: Tensor, target: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """TRL's selective_log_softmax and verl's entropy_from_logits."""
    x = logits.float() / temperature if temperature != 1 else logits.float()
    lse = x.logsumexp(-1)
    log_probs = x.gather(-1, target.unsqueeze(-1)).squeeze(-1) - lse
    return (log_probs, lse - (x.softmax(-1) * x).sum(-1)) if entropy else (log_probs,)


WAYS: dict[str, Way] = {"fused": fused, "torch": log_softmax, "logsumexp": logsumexp}


def peak(way: Way, rows: int, classes: int, dtype: str = "float32") -> int:
    """Return the bytes above the logits at the highest, the gradient among them."""

    def step(n: int, c: int) -> int:
        logits = torch.randn(n, c).to(getattr(torch, dtype)).requires_grad_()
        target, upstream = torch.randint(0, c, (n,)), [torch.randn(n), torch.randn(n)]
        return added_at_peak(lambda: torch.autograd.grad(way(logits, target, 1.0, True), logits, upstream))

    step(64, 512)  # loads code and starts threads
    return step(rows, classes)


if __name__ == "__main__":
    print(peak(WAYS[sys.argv[1]], *map(int, sys.argv[2:4]), *sys.argv[4:]))
