"""Whether the kernels that are chosen here are the fastest, shape by shape: `mbperf doctor --paths`.

Candidates are every path of csrc/cpu/cross_entropy/path.h that serves the shape, and each other instruction
set on the path that it chooses. All run in interleaved rounds on the same inputs. What is chosen should be
within 5 % of the best.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mbperf.measure.rounds import Plan, run_rounds
from mbperf.measure.statistics import Ratio, paired_ratio

DTYPES = ("float32", "bfloat16")
SLOWER_BY = 1.05  # what another candidate has to gain before the choice is called wrong
PLAN = Plan(budget_s=0.5, width=0.02, min_rounds=12, max_rounds=100, patience_s=5.0)


class Case(NamedTuple):
    """Logits (N, C, ...) and on how many threads of torch's: one, or all.

    One is the rule, because threads wait for each other, beside other work for longer than the kernels take;
    all where threads are what the choice depends on.
    """

    shape: tuple[int, ...]
    all_threads: bool = False


# Tiles, groups, rows and columns are each chosen somewhere; few and many classes, whole vectors and parts of
# one, maps with classes far apart.
CASES = (
    Case((64, 10)), Case((50_000, 10)), Case((100_000, 3)), Case((16_384, 32)), Case((2_000, 100)),
    Case((8_192, 257)), Case((4_096, 1_000)), Case((4, 150, 64, 64)), Case((7, 151_665)),
    Case((7, 151_665), all_threads=True), Case((1, 1_000_000), all_threads=True),
)  # fmt: skip


class Candidate(NamedTuple):
    """A way to compute: an instruction set, and the path it takes."""

    instruction_set: str
    path: str

    def __str__(self) -> str:
        """Return both names."""
        return f"{self.instruction_set} {self.path}"


class Problem(NamedTuple):
    """Tensors of a case, and forward and backward on them."""

    input: Any
    target: Any
    call: Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Of one case: how many times longer each other candidate takes than the chosen one."""

    shape: tuple[int, ...]
    dtype: str
    threads: int
    chosen: Candidate
    others: dict[Candidate, Ratio]

    @property
    def better(self) -> list[Candidate]:
        """The candidates that surely beat the chosen one."""
        return [candidate for candidate, ratio in self.others.items() if ratio.high < 1 / SLOWER_BY]

    @property
    def verdict(self) -> str:
        """What the intervals say of the choice."""
        if self.better:
            return "SLOWER"
        return "ok" if all(r.low >= 1 / SLOWER_BY for r in self.others.values()) else "CANNOT TELL"

    def __str__(self) -> str:
        """Return the line that the command prints."""
        told = ", ".join(
            f"{candidate} {r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]" for candidate, r in self.others.items()
        )
        threads = f" on {self.threads} threads" if self.threads > 1 else ""
        what = f"{'x'.join(map(str, self.shape))} {self.dtype}{threads}: {self.chosen} chosen"
        return f"{self.verdict:<12}{what}; time of {told or 'no other candidate'}"


def comparisons(extension: Any, plan: Plan = PLAN) -> Iterator[Comparison]:
    """Yield the comparison of every case and dtype; forward and backward together.

    Args:
        extension: has instruction_sets(), instruction_set(), set_instruction_set(name),
            cross_entropy_paths(input, target) and set_cross_entropy_path(name or None).
        plan: how long and how finely.
    """
    import torch

    chosen, threads = extension.instruction_set(), torch.get_num_threads()
    try:
        for case in CASES:
            if case.all_threads and threads == 1:
                continue
            torch.set_num_threads(threads if case.all_threads else 1)
            for dtype in DTYPES:
                yield _compare(extension, case, dtype, chosen, plan)
    finally:
        torch.set_num_threads(threads)
        extension.set_instruction_set(chosen)
        extension.set_cross_entropy_path(None)


def _compare(extension: Any, case: Case, dtype: str, instruction_set: str, plan: Plan) -> Comparison:
    import torch

    problem = _problem(case.shape, dtype)
    chosen, *others = _candidates(extension, instruction_set, problem)
    calls = {str(each): [_on(extension, each, problem.call)] for each in (chosen, *others)}
    rounds = run_rounds(calls, [(str(other), str(chosen)) for other in others], plan)
    kept, _, _ = rounds.kept()
    ratios = {other: paired_ratio(kept[str(other)], kept[str(chosen)]) for other in others}
    return Comparison(case.shape, dtype, torch.get_num_threads(), chosen, ratios)


def _candidates(extension: Any, instruction_set: str, problem: Problem) -> list[Candidate]:
    """Return the chosen candidate, its other paths, and the other sets on the paths that they choose."""
    extension.set_cross_entropy_path(None)
    found = []
    for name in (instruction_set, *(n for n in extension.instruction_sets() if n != instruction_set)):
        extension.set_instruction_set(name)
        paths = extension.cross_entropy_paths(problem.input, problem.target)
        found += [Candidate(name, path) for path in (paths if name == instruction_set else paths[:1])]
    return found


def _on(extension: Any, candidate: Candidate, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        extension.set_instruction_set(candidate.instruction_set)
        extension.set_cross_entropy_path(candidate.path)
        return call()

    return run


def _problem(shape: tuple[int, ...], dtype: str) -> Problem:
    import torch

    from mbperf.ops.cross_entropy import cross_entropy

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return Problem(logits, target, lambda: torch.autograd.grad(cross_entropy(logits, target), logits))
