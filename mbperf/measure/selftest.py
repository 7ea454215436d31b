"""Put the ruler itself to the test: `python -m mbperf.measure.selftest`.

1. Fake clocks with known ratio, drift and bursts: how often does the interval hold the true ratio?
2. Identical contenders (A/A) on this machine, the other cores kept busy: how often is a difference claimed?
3. A real operation made 3 % longer: how often is it found?
4. Made-up runs of several processes: what is called changed, where nothing did and where 5 % did?
5. Made-up trees in lockstep, their processes in one of two states: what is called changed, likewise?
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mbperf import processors
from mbperf.measure.change import BETTER, WORSE, changes
from mbperf.measure.covariates import Covariates
from mbperf.measure.figures import figures
from mbperf.measure.group import Group, measure
from mbperf.measure.lockstep import COMPARED, THAT, THIS, Effort, compare, decide
from mbperf.measure.rounds import Plan, Rounds, run_rounds
from mbperf.measure.rows import CONTROL
from mbperf.measure.statistics import Ratio, Verdict, paired_ratio

REPEATS = 100  # of the operation in the base; the slower contender does 103
SLOWER_BY = 0.03
# What the ruler promises: at most 1 % false verdicts, at least 95 % of injected slow-downs found.
WRONG = (Verdict.FASTER, Verdict.SLOWER)  # about identical contenders
MOST_FALSE, LEAST_FOUND, LEAST_HELD, LEAST_WORSE = 0.01, 0.95, 0.95, 0.9
CHANGED = (BETTER, WORSE)


@dataclass
class FakeMachine:
    """A clock that contenders advance, with slow drift, bursts and per-call noise.

    Args:
        rng: of the noise.
        drift: change of speed over a second of its time, as a share.
        burst_share: of the time that another tenant takes half the machine.
    """

    rng: random.Random
    drift: float = 0.3
    burst_share: float = 0.1
    now: float = 0.0
    _burst_ends: float = field(default=0.0, repr=False)

    def clock(self) -> float:
        """Return its time in seconds."""
        return self.now

    def contender(self, seconds: float) -> Callable[[], None]:
        """Return a call that costs `seconds` on this machine when it is left alone."""

        def call() -> None:
            noise = math.exp(self.rng.gauss(0, 0.02))
            self.now += seconds * noise * self._slowness()

        return call

    def _slowness(self) -> float:
        if self.now > self._burst_ends and self.rng.random() < self.burst_share / 100:
            self._burst_ends = self.now + 0.1
        burst = 2.0 if self.now < self._burst_ends else 1.0
        return burst * (1 + self.drift * math.sin(self.now))


def fake_ratio(true_ratio: float, seed: int) -> Ratio:
    """Measure a pair of known ratio on a fake machine; the ratio is t_base / t_x.

    >>> abs(fake_ratio(8.0, seed=1).ratio - 8.0) < 0.1
    True
    """
    fake = FakeMachine(random.Random(seed))
    calls = {"base": [fake.contender(1e-3)], "x": [fake.contender(1e-3 / true_ratio)]}
    plan = Plan(budget_s=0.5, seed=seed)
    rounds = run_rounds(calls, [("base", "x")], plan, clock=fake.clock, read=_undisturbed)
    return paired_ratio(rounds.seconds["base"], rounds.seconds["x"])


def _undisturbed() -> Covariates:
    return Covariates(0, 0.0)


def held_share(true_ratio: float, runs: int) -> float:
    """Return how often the interval of a fake pair holds its true ratio.

    >>> held_share(1.03, runs=20) > 0.9
    True
    """
    ratios = (fake_ratio(true_ratio, seed) for seed in range(runs))
    return sum(not ratio.excludes(true_ratio) for ratio in ratios) / runs


def fake_run(
    seed: int, groups: int = 80, slower: Mapping[str, float] | None = None, noise: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Return the subject rows of a run of made-up processes: ratios that vary between processes and runs.

    Args:
        seed: of the run; the groups and their true ratios are the same in all runs.
        groups: how many.
        slower: group -> factor on the subject's time.
        noise: factor on the variation between processes and between runs.

    >>> sorted(fake_run(0, groups=2)["group 1"]["ratios"])
    ['roof', 'torch']
    """
    truth, rng = random.Random(0), random.Random(seed + 1)
    run = {}
    for number in range(groups):
        name, speedup = f"group {number}", math.exp(truth.uniform(0, 3))
        sd = FAKE_SD * math.exp(truth.gauss(0, 0.4))  # some groups are less calm than others
        ours = math.log((slower or {}).get(name, 1.0))
        ratios = {}
        for base, ratio in (("torch", speedup), ("roof", 0.8)):
            of_run = rng.gauss(0, noise * FAKE_RUN_SD)
            logs = [math.log(ratio) - ours + of_run + rng.gauss(0, noise * sd) for _ in range(3)]
            processes = [math.exp(log) for log in logs]
            ratios[base] = {"ratio": math.exp(math.fsum(logs) / 3), "processes": processes}
        run[name] = {"contender": "fused", "heap": "", "ratios": ratios}
    return run


FAKE_SD, FAKE_RUN_SD = 0.005, 0.002  # between processes of a run, between runs


def fake_trees(slower: float, seed: int) -> str:
    """Return the verdict on a made-up tree that takes `slower` times as long as the other, in lockstep.

    Every process is in one of two states, which differ by as much as memory layout alone does, and its rounds
    are those of a fake machine.

    >>> fake_trees(1.2, seed=1)
    'WORSE'
    """
    states = random.Random(seed)

    def race(group: str, number: int) -> Rounds:
        fake = FakeMachine(random.Random(states.random()))
        cost = {THIS: slower, CONTROL: slower, THAT: 1.0}
        calls = {
            name: [fake.contender(1e-3 * factor * states.choice((1.0, 1 + FAKE_STATE)))]
            for name, factor in cost.items()
        }
        plan = Plan(budget_s=100, width=0, max_rounds=12, batch_s=2e-3, seed=number)
        return run_rounds(calls, COMPARED, plan, clock=fake.clock, read=_undisturbed)

    found = compare(["made up"], race, Effort(budget_s=math.inf))
    return decide(found)["made up"].verdict


FAKE_STATE = 0.014  # between identical contenders that kept their buffers, see `mbperf.measure.rounds`


def race_pair(repeats: int, budget_s: float, seed: int) -> Verdict:
    """Race a real operation done `repeats` times against itself done 100 times, as any group is raced."""
    from mbperf.testing import cross_entropy_float64

    group = Group(
        op="cross_entropy",
        case=f"{repeats} against {REPEATS} calls at 32x100",
        make_inputs=_inputs,
        contenders={"x": _repeated(repeats), "base": _repeated(REPEATS)},
        expected=lambda logits, target: [cross_entropy_float64(logits.double(), target)],
    )
    plan = Plan(budget_s=budget_s, min_rounds=30, max_rounds=600, seed=seed)
    row = figures(group, [measure(group, plan)])["x"]
    against_base = row["ratios"]["base"]
    judged = Verdict(against_base["verdict"])
    if (judged in WRONG) if repeats == REPEATS else (judged is not Verdict.SLOWER):
        print(f"      seed {seed}, {row['rounds'][0]} rounds: {against_base}, control {row['control']}")
    return judged


def _inputs() -> tuple[Any, Any]:
    import torch

    return torch.randn(32, 100), torch.randint(0, 100, (32,))


def _repeated(repeats: int) -> Callable[..., list[Any]]:
    """F.cross_entropy on 32x100 logits, about 4 us, `repeats` times."""
    import torch.nn.functional as F

    def call(logits: Any, target: Any) -> list[Any]:
        for _ in range(repeats):
            loss = F.cross_entropy(logits, target)
        return [loss]

    return call


@contextmanager
def noisy_neighbours() -> Iterator[None]:
    """Keep all cores but one busy with bursts of work of random length, as another tenant would."""
    count = max(1, processors.usable() - 1)
    context = multiprocessing.get_context("spawn")
    neighbours = [context.Process(target=_burden, args=(n,), daemon=True) for n in range(count)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.terminate()
            neighbour.join()


def _burden(seed: int) -> None:
    rng = random.Random(seed)
    memory = bytearray(16 << 20)
    while True:
        end = time.monotonic() + rng.expovariate(20)
        while time.monotonic() < end:
            memory[:] = bytes(len(memory))
        time.sleep(rng.expovariate(100))


def _report(claim: str, holds: bool) -> bool:
    print(f"{'ok  ' if holds else 'FAIL'}  {claim}", flush=True)
    return holds


def _fakes(runs: int) -> bool:
    outcomes = []
    for true_ratio in (1.0, 1.03, 8.0):
        share = held_share(true_ratio, runs)
        claim = f"fake clocks, true ratio {true_ratio:g}: in its 99 % interval in {share:.1%} of {runs} runs"
        outcomes.append(_report(claim, share >= LEAST_HELD))
    return all(outcomes)


def _changes(runs: int) -> bool:
    """Pairs of made-up runs: of one tree, and of one in which every tenth group became 5 % slower."""
    slower = {f"group {number}": 1.05 for number in range(0, 80, 10)}
    false = found = compared = 0
    for seed in range(runs):
        same = changes(fake_run(2 * seed), fake_run(2 * seed + 1))
        compared += len(same)
        false += sum(one["verdict"] in CHANGED for one in same.values())
        slow = changes(fake_run(2 * seed, slower=slower), fake_run(2 * seed + 1))
        found += sum(slow[name]["verdict"] == WORSE for name in slower)
    tried = runs * len(slower)
    outcomes = [
        _report(f"fake runs of one tree: {false} of {compared} rows changed", false <= MOST_FALSE * compared),
        _report(f"fake runs, rows 5 % slower: WORSE in {found} of {tried}", found >= LEAST_WORSE * tried),
    ]
    return all(outcomes)


def _trees(runs: int) -> bool:
    """Two trees in lockstep, processes in two states each."""
    slow = [fake_trees(1 + SLOWER_BY, seed) for seed in range(runs)]
    same = [fake_trees(1.0, seed) for seed in range(runs)]
    false, found = sum(one in CHANGED for one in same), slow.count(WORSE)
    outcomes = [
        _report(f"fake trees, identical: {false} of {runs} changed", false <= MOST_FALSE * runs),
        _report(
            f"fake trees, {SLOWER_BY:.0%} slower: WORSE in {found} of {runs}", found >= LEAST_FOUND * runs
        ),
    ]
    return all(outcomes)


def _real(groups: int, slowed: int, budget_s: float, seed: int) -> bool:
    import torch

    torch.set_num_threads(1)  # the other cores are the neighbours'
    longer = round(REPEATS * (1 + SLOWER_BY))
    with noisy_neighbours():
        same = [race_pair(REPEATS, budget_s, seed + i) for i in range(groups)]
        slow = [race_pair(longer, budget_s, seed + i) for i in range(slowed)]
    false = sum(one in WRONG for one in same)
    unsure = sum(one is Verdict.CANNOT_TELL for one in same)
    found = sum(one is Verdict.SLOWER for one in slow)
    claims = [
        (
            f"A/A, neighbours busy: {false} false verdicts in {groups} ({unsure} CANNOT TELL)",
            false <= MOST_FALSE * groups,
            groups,
        ),
        (
            f"{SLOWER_BY:.0%} slower, neighbours busy: found in {found} of {slowed}",
            found >= LEAST_FOUND * slowed,
            slowed,
        ),
    ]
    return all([_report(claim, holds) for claim, holds, tried in claims if tried])


def main() -> int:
    """Run the tests and print what they found; 1 if the ruler breaks a promise."""
    parser = argparse.ArgumentParser(prog="python -m mbperf.measure.selftest", description=__doc__)
    parser.add_argument("--fakes", type=int, default=200, help="fake runs per ratio")
    parser.add_argument("--groups", type=int, default=200, help="real A/A groups")
    parser.add_argument("--slowed", type=int, default=100, help="real groups made 3 %% slower")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per real group")
    parser.add_argument("--seed", type=int, default=0, help="of the first real group's order")
    args = parser.parse_args()
    outcomes = [not args.fakes or _fakes(args.fakes), not args.fakes or _changes(args.fakes)]
    outcomes += [not args.fakes or _trees(args.fakes)]
    outcomes += [_real(args.groups, args.slowed, args.budget, args.seed)]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
