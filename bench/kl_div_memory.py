"""Peak memory of forward+backward of a KL divergence from logits, in the fresh process that runs this file.

Logits are not counted, the returned gradient is.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mbperf
from mbperf.measure.memory import added_at_peak


def by_torch(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """What is written with torch today; nobody divides by 1."""
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


WAYS: dict[str, Callable[..., Tensor]] = {"fused": mbperf.kl_div_from_logits, "torch": by_torch}


def peak(way: str, rows: int, classes: int) -> int:
    """Return the bytes above the logits at the highest."""

    def step(n: int, c: int) -> int:
        student, teacher = torch.randn(n, c, requires_grad=True), torch.randn(n, c)
        return added_at_peak(lambda: torch.autograd.grad(WAYS[way](student, teacher), student))

    step(64, 512)  # loads code and starts threads
    return step(rows, classes)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
