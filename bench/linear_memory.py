"""Peak memory of forward+backward of linear + cross entropy, in the fresh process that runs this file.

Inputs are not counted, and neither are the gradients: `memory_budget` speaks of what comes on top of them.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mbperf
from mbperf.measure.memory import added_at_peak

WAYS: dict[str, Callable[..., Tensor]] = {
    "fused": mbperf.linear_cross_entropy,
    "fused_16MB": partial(mbperf.linear_cross_entropy, memory_budget=16 << 20),
    "torch": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    "two_steps": lambda x, w, y: mbperf.cross_entropy(F.linear(x, w), y),
}


def peak(way: str, rows: int, features: int, classes: int, dtype: str = "float32") -> int:
    """Return the bytes above inputs and gradients at the highest."""

    def step(n: int, h: int, v: int) -> int:
        x, w = (torch.randn(size, h).to(getattr(torch, dtype)).requires_grad_() for size in (n, v))
        target = torch.randint(0, v, (n,))
        added = added_at_peak(lambda: torch.autograd.grad(WAYS[way](x, w, target), (x, w)))
        return added - int(x.nbytes + w.nbytes)

    step(64, 64, 512)  # loads code and starts threads
    return step(rows, features, classes)


if __name__ == "__main__":
    print(peak(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:]))
