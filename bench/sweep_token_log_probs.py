"""token_log_probs with entropies on every shape of the grid: against a plain loss, and the usual way.

    python bench/sweep_token_log_probs.py --seconds 2

Prints a table: for each dtype how long forward and backward take in units of cross_entropy(reduction="none"),
and how many times as long `log_softmax` takes, on recycled pages, with 99 % intervals.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from cases import SHAPES, SHORT
from token_ways import fused, log_softmax
from torch import Tensor

import mbperf
from mbperf.measure import heap
from mbperf.measure.group import recycle_for
from mbperf.measure.rounds import Plan, run_rounds
from mbperf.measure.statistics import Ratio, paired_ratio
from mbperf.report.tables import digits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSS, USUAL = "loss", "log_softmax"


def ours(logits: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(fused(logits, target, 1.0, True), logits, (upstream, upstream))


def loss(logits: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    losses = mbperf.cross_entropy(logits, target, reduction="none", out_dtype=torch.float32)
    return torch.autograd.grad(losses, logits, upstream)


def usual(logits: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    outputs = log_softmax(logits, target, 1.0, True, classes=1)
    return torch.autograd.grad(outputs, logits, (upstream, upstream))


WAYS = {"ours": ours, LOSS: loss, USUAL: usual}


class Found(NamedTuple):
    """How long ours takes in units of the loss, and the usual way in units of ours."""

    cost: Ratio
    gain: Ratio


def measured(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> Found:
    """Race the three on one shape; the usual way leaves after the least rounds."""
    torch.manual_seed(0)
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    upstream = torch.full(target.shape, 1 / target.numel())
    recycle_for((logits,))
    calls = {name: [partial(way, logits, target, upstream)] for name, way in WAYS.items()}
    plan = Plan(seconds, width=0.01, min_rounds=8, max_rounds=300)
    kept, _, _ = run_rounds(calls, [(LOSS, "ours")], plan, brief=[USUAL]).kept()
    first = kept["ours"][: len(kept[USUAL])]
    return Found(paired_ratio(kept["ours"], kept[LOSS]), paired_ratio(kept[USUAL], first))


def cell(found: Ratio) -> str:
    return f"{digits(found.ratio)} [{digits(found.low)}, {digits(found.high)}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and dtype")
    options = parser.parse_args(arguments)
    heap.set_state(heap.RECYCLED)
    print("| logits | of the loss | log_softmax |\n|---|--:|--:|")
    for dtype in DTYPES:
        gains = []
        for shape, _, _ in SHAPES:
            found = measured(shape, dtype, options.seconds)
            gains.append(found.gain.ratio)
            size = " x ".join(f"{n:,}" for n in shape)
            print(f"| {size} {SHORT[dtype]} | {cell(found.cost)} | {cell(found.gain)} |", flush=True)
        print(
            f"| geometric mean, {SHORT[dtype]} | | {digits(statistics.geometric_mean(gains))} |", flush=True
        )


if __name__ == "__main__":
    main()
