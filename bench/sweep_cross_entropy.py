"""Cross entropy of random shapes, layouts and options, which cases.py does not have: is fused ever slower?

    python bench/sweep_cross_entropy.py --first 0 --count 60

Draw number k is the same everywhere. What seems slower than F.cross_entropy is measured again, for longer.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bench_cross_entropy import expected, losses, make_inputs, step
from cases import NO_GRAD, PASSES, CrossEntropyCase
from torch import Tensor

from mbperf.measure.group import Group, measure
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import Ratio, paired_ratio

ELEMENTS = 1 << 22
LAYOUTS = (
    "contiguous",
    "contiguous",
    "unaligned",
    "class last",
    "transposed",
    "sliced rows",
    "sliced classes",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"weighted": True},
    {"label_smoothing": 0.1},
    {"soft": True},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"weighted": True, "label_smoothing": 0.1, "reduction": "none"},
)
SHORT_LOOK, LONG_LOOK = Plan(0.25, width=0.05, min_rounds=10), Plan(1.5, width=0.02, min_rounds=30)


@dataclass(frozen=True)
class Draw:
    """A case, how its logits lie in memory, and how many of its targets are ignored."""

    number: int
    case: CrossEntropyCase
    layout: str
    ignored: bool

    def __str__(self) -> str:
        case = self.case
        size, dtype = "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")
        words = [
            f"#{self.number}",
            size,
            dtype,
            case.step,
            self.layout,
            case.options,
            "ignored" * self.ignored,
        ]
        return " ".join(filter(None, words))


def draw(number: int, elements: int = ELEMENTS) -> Draw:
    """The draw of this number among logits of at most so many elements."""
    rng = random.Random(number)
    classes = between(rng, 1, 1 << 17)
    rest = max(1, between(rng, 16, elements) // classes)
    shape: tuple[int, ...] = (rest, classes)
    if rest > 3 and rng.random() < 0.3:
        inner = between(rng, 2, rest)
        side = between(rng, 1, inner)
        shape = (max(1, rest // inner), classes, *((side, inner // side) if rng.random() < 0.5 else (inner,)))
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
    case = CrossEntropyCase(
        shape, "", step=rng.choice(PASSES), dtype=rng.choice(dtypes), **rng.choice(OPTIONS)
    )
    return Draw(number, case, rng.choice(LAYOUTS), not case.soft and rng.random() < 0.2)


def between(rng: random.Random, least: int, most: int) -> int:
    """A number from a range, each octave alike, half of them powers of two and their neighbours."""
    octave = rng.randint(least.bit_length(), most.bit_length() - 1)
    number = (
        (1 << octave) + rng.choice([-1, 0, 1]) if rng.random() < 0.5 else int(2 ** (octave + rng.random()))
    )
    return min(max(number, least), most)


def inputs(drawn: Draw) -> tuple[Tensor, Tensor]:
    """Logits and targets of a draw."""
    logits, target = make_inputs(drawn.case)
    if drawn.ignored:
        target[torch.rand(target.shape) < 0.3] = -100
    return laid_out(logits.detach(), drawn.layout).requires_grad_(drawn.case.step != NO_GRAD), target


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """Equal logits, elsewhere in memory."""
    if layout == "unaligned":
        memory = logits.new_empty(logits.numel() + 1)[1:].view(logits.shape)
    elif layout == "class last":  # channels_last
        memory = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "transposed":
        memory = logits.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced rows":
        memory = logits.new_empty(2 * logits.shape[0], *logits.shape[1:])[::2]
    elif layout == "sliced classes":
        memory = logits.new_empty(logits.shape[0], logits.shape[1] + 3, *logits.shape[2:])[:, 1:-2]
    else:
        memory = torch.empty_like(logits)
    return memory.copy_(logits)


def group(drawn: Draw) -> Group:
    """The measurements of a draw."""
    contenders = losses(drawn.case)
    return Group(
        op="cross_entropy",
        case=str(drawn),
        make_inputs=partial(inputs, drawn),
        contenders={name: step(drawn.case, contenders[name]) for name in ("fused", "torch")},
        expected=partial(expected, drawn.case),
        input_sets=2,
    )


def ratio(drawn: Draw, plan: Plan) -> Ratio:
    """How many times faster than F.cross_entropy, at the numbers of calls and rounds of a plan."""
    samples = measure(group(drawn), replace(plan, seed=drawn.number))
    if "fused" in samples.wrong and "torch" not in samples.wrong:
        raise AssertionError(f"{drawn}: {samples.wrong['fused']}")
    # It sums in half precision, to inf or far off; or float16 cannot hold the gradient, whoever takes it.
    if "torch" in samples.wrong:
        return Ratio(math.nan, math.inf, math.inf)
    return paired_ratio(samples.seconds["torch"], samples.seconds["fused"])


def looked_at(drawn: Draw) -> Ratio:
    """The ratio, by a longer look where a short one does not show it above 1."""
    first = ratio(drawn, SHORT_LOOK)
    return first if first.low > 1 else ratio(drawn, LONG_LOOK)


def verdict(found: Ratio) -> str:
    return "SLOWER" if found.high < 1 else "perhaps" if found.low <= 1 else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no draw after so long")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the largest logits")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    for number in range(options.first, options.first + options.count):
        if time.monotonic() - began > options.seconds:
            break
        drawn = draw(number, options.elements)
        found = looked_at(drawn)
        print(f"{found.ratio:7.2f} [{found.low:.2f}, {found.high:.2f}] {verdict(found):8}{drawn}", flush=True)


if __name__ == "__main__":
    main()
