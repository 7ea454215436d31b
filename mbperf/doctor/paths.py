"""Which instruction set's kernels are the fastest here, shape by shape: `mbperf doctor --paths`.

All sets run in interleaved rounds on the same inputs, on one thread: several wait for each other, and beside
other work on the cores for longer than the kernels take. What is chosen should be within 5 % of the best.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mbperf.measure.rounds import Plan, run_rounds
from mbperf.measure.statistics import Ratio, paired_ratio

# Few and many classes, whole vectors and parts of one, rows of half a megabyte.
SHAPES = (
    (64, 10), (50_000, 10), (100_000, 3), (16_384, 32), (2_000, 100), (8_192, 257), (7, 151_665),
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
SLOWER_BY = 1.05  # what another set has to gain before the choice is called wrong
PLAN = Plan(budget_s=0.5, width=0.02, min_rounds=12, max_rounds=100, patience_s=5.0)


@dataclass(frozen=True)
class Comparison:
    """Of one shape: how many times longer each other instruction set takes than the chosen one."""

    shape: tuple[int, int]
    dtype: str
    chosen: str
    others: dict[str, Ratio]

    @property
    def better(self) -> list[str]:
        """The sets that surely beat the chosen one."""
        return [name for name, ratio in self.others.items() if ratio.high < 1 / SLOWER_BY]

    @property
    def verdict(self) -> str:
        """What the intervals say of the choice."""
        if self.better:
            return "SLOWER"
        return "ok" if all(r.low >= 1 / SLOWER_BY for r in self.others.values()) else "CANNOT TELL"

    def __str__(self) -> str:
        """Return the line that the command prints."""
        rows, classes = self.shape
        told = ", ".join(
            f"{name} {r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]" for name, r in self.others.items()
        )
        what = f"{rows}x{classes} {self.dtype}: {self.chosen} chosen"
        return f"{self.verdict:<12}{what}; time of {told or 'no other set'}"


def comparisons(extension: Any, plan: Plan = PLAN) -> Iterator[Comparison]:
    """Yield the comparison of every shape and dtype; forward and backward together.

    Args:
        extension: has instruction_sets(), instruction_set() and set_instruction_set(name).
        plan: how long and how finely.
    """
    import torch

    chosen, threads = extension.instruction_set(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in SHAPES:
            for dtype in DTYPES:
                yield _compare(extension, shape, dtype, chosen, plan)
    finally:
        torch.set_num_threads(threads)
        extension.set_instruction_set(chosen)


def _compare(extension: Any, shape: tuple[int, int], dtype: str, chosen: str, plan: Plan) -> Comparison:
    call = _forward_backward(shape, dtype)
    names = extension.instruction_sets()

    def timed(name: str) -> Callable[[], object]:
        return partial(_on, extension, name, call)

    pairs = [(name, chosen) for name in names if name != chosen]
    rounds = run_rounds({name: [timed(name)] for name in names}, pairs, plan)
    kept, _, _ = rounds.kept()
    return Comparison(
        shape, dtype, chosen, {name: paired_ratio(kept[name], kept[chosen]) for name, _ in pairs}
    )


def _on(extension: Any, name: str, call: Callable[[], object]) -> object:
    extension.set_instruction_set(name)
    return call()


def _forward_backward(shape: tuple[int, int], dtype: str) -> Callable[[], object]:
    import torch

    from mbperf.ops.cross_entropy import cross_entropy

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1], generator=generator)
    return lambda: torch.autograd.grad(cross_entropy(logits, target), logits)
