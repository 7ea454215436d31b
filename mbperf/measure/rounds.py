"""Interleaved rounds: every contender once per round, in an order and on inputs that favour none.

Orders come from a cyclic Latin square, permuted afresh per block, so that over a block each contender stands
once in each place. Input sets are dealt afresh every round: where a buffer happens to lie made up to 1.4 % of
difference between identical contenders that kept theirs, and none once they were dealt (1,000 rounds each).
"""

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mbperf.measure import covariates
from mbperf.measure.covariates import Covariates
from mbperf.measure.statistics import LEAST_ROUNDS, paired_ratio

# A machine that stalls does not get all its rounds.
MOST_OVERDRAFT = 3.0
# One untimed round longer than this is dear, and calls that long leave their own state behind anyway.
LONG_ROUND_S = 0.5
# A first call that takes so many batches is no shorter than one when it is warm.
SURELY_ENOUGH = 20

Call = Callable[[], object]
Clock = Callable[[], float]


class Timer(Protocol):
    """How the calls of one contender in one round are timed; `mbperf.measure` has the wall clock's below."""

    def __call__(self, call: Call, n: int) -> float:
        """Make `n` calls, wait until their work is done, and return the seconds they took together."""


@dataclass(frozen=True)
class WallTimer:
    """Time on a clock; what a call returns is freed before the next one, inside the contender's own time."""

    clock: Clock = time.perf_counter

    def __call__(self, call: Call, n: int) -> float:
        """Make `n` calls and return the seconds they took together."""
        repeat = itertools.repeat(None, n)
        start = self.clock()
        for _ in repeat:
            call()
        return self.clock() - start


@dataclass(frozen=True)
class Plan:
    """How long and how finely to measure one group.

    Args:
        budget_s: stop after this long, however wide the intervals.
        width: stop when every interval is at most this wide, relative to its ratio.
        min_rounds, max_rounds: bounds that neither overrules; undisturbed rounds at least, all at most.
        batch_s: how long the fastest contender's calls of one round should take together.
        patience_s: a group that has its least rounds neither within three budgets nor within this long, from
            the making of its inputs on, makes do with fewer.
        multiple: the calls per round are a multiple of this (the rotation of a cold group).
        seed: of the orders and of the dealing.
        least_rounds: bound on `min_rounds` where a group asks for fewer; what an interval needs by default.
    """

    budget_s: float
    width: float = 0.01
    min_rounds: int = 12
    max_rounds: int = 200
    batch_s: float = 1e-3
    patience_s: float = 40.0
    multiple: int = 1
    seed: int = 0
    least_rounds: int = LEAST_ROUNDS


@dataclass
class Rounds:
    """Seconds and page faults per call of every contender in every round, and what else was seen."""

    seconds: dict[str, list[float]]
    page_faults: dict[str, list[float]]
    inner_calls: int
    warm: bool
    seed: int
    seen: list[Covariates] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    met: set[int] = field(default_factory=set, repr=False)

    def kept(self) -> tuple[dict[str, list[float]], int, bool]:
        """Return the undisturbed rounds, how many were dropped, and whether the group is noisy."""
        flags, noisy = covariates.disturbed(self.seen, self.round_s)
        kept = {
            name: [s for s, dropped in zip(column, flags, strict=True) if not dropped]
            for name, column in self.seconds.items()
        }
        return kept, sum(flags), noisy


def latin_square(names: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Return one block of orders: a cyclic Latin square with rows and names permuted.

    >>> square = latin_square("abc", random.Random(0))
    >>> sorted(order[0] for order in square)
    ['a', 'b', 'c']
    """
    shuffled = rng.sample(list(names), len(names))
    square = [shuffled[i:] + shuffled[:i] for i in range(len(shuffled))]
    rng.shuffle(square)
    return square


def deal(calls: Mapping[str, Sequence[Call]], rng: random.Random) -> dict[str, Call]:
    """Return one call of each contender: on which of the equal input sets it runs this round, by chance.

    As many sets as contenders are dealt without sharing. Identical contenders then differ by chance alone,
    wherever their buffers lie, so that the sign test's level is exact.

    >>> dealt = deal({"a": [int, str], "b": [int, str]}, random.Random(0))
    >>> dealt["a"] is not dealt["b"]
    True
    """
    several = [name for name, its in calls.items() if len(its) > 1]
    sets = max((len(calls[name]) for name in several), default=1)
    hands = rng.sample([index % sets for index in range(max(sets, len(several)))], len(several))
    slots = dict(zip(several, hands, strict=True))
    return {name: its[slots.get(name, 0)] for name, its in calls.items()}


def run_rounds(
    calls: Mapping[str, Sequence[Call]],
    compared: Sequence[tuple[str, str]],
    plan: Plan,
    pace: Sequence[str] = (),
    timer: Timer | None = None,
    clock: Clock = time.perf_counter,
    read: covariates.Reader = covariates.read,
    since_s: float = 0.0,
) -> Rounds:
    """Measure all contenders in interleaved rounds until the intervals are narrow or the budget is spent.

    Args:
        calls: the contenders; of each, one call per input set, in the same order (or just one).
        compared: (base, contender) pairs whose interval has to become narrow.
        plan: bounds on the time and on the rounds.
        pace: the contenders whose fastest sets the number of calls per round; all of them by default.
        timer: of the calls; the wall's by default.
        clock: seconds, of the budget; replaced by a fake one in the tests of this ruler.
        read: covariates; likewise.
        since_s: how long the group has taken so far; the plan's patience counts it.

    Returns:
        Rounds, seconds per call.

    >>> rounds = run_rounds({"a": [int], "b": [int]}, [("a", "b")], Plan(budget_s=9, max_rounds=12))
    >>> len(rounds.seconds["a"])
    12
    """
    start = clock()
    timer = timer or WallTimer(clock)
    rng = random.Random(plan.seed)
    inner_calls, warm = calibrate(deal(calls, rng), pace or list(calls), plan, timer)
    rounds = Rounds({name: [] for name in calls}, {name: [] for name in calls}, inner_calls, warm, plan.seed)
    with _no_collection():
        for order in _orders(list(calls), plan, rng):
            before, began = read(), clock()
            _run_round(deal(calls, rng), order, rounds, timer)
            rounds.round_s.append(clock() - began)
            rounds.seen.append(read().since(before))
            if _spent(clock() - start, since_s, rounds, plan):
                break
            # Looked at after whole blocks only: there every contender has stood in every place.
            if len(rounds.seen) % len(order) == 0 and _narrow(rounds, compared, plan):
                break
    return rounds


def calibrate(calls: Mapping[str, Call], pace: Sequence[str], plan: Plan, timer: Timer) -> tuple[int, bool]:
    """Return the common number of calls per round, and whether an untimed one goes before them.

    The fastest contender's calls then take about `plan.batch_s`.
    """
    once = {name: timer(call, 1) for name, call in calls.items()}
    warm = sum(once.values()) < LONG_ROUND_S
    if min(once[name] for name in pace) > SURELY_ENOUGH * plan.batch_s:
        return plan.multiple, warm
    # The first call says who may be the fastest; only they are worth a closer look.
    likely = [name for name in pace if once[name] <= 5 * min(once[one] for one in pace)]
    fastest = min(_seconds_per_call(calls[name], plan.batch_s, timer) for name in likely)
    affordable_s = plan.budget_s / plan.min_rounds * fastest / max(sum(once.values()), 1e-9)
    # However small the budget: a single call of 3 us would be half clock.
    batch_s = min(plan.batch_s, max(plan.batch_s / 10, affordable_s))
    calls_per_round = max(1, round(batch_s / max(fastest, 1e-9)))
    return -(-calls_per_round // plan.multiple) * plan.multiple, warm


def _seconds_per_call(call: Call, enough_s: float, timer: Timer) -> float:
    """Return the least seconds per call of three tries of at least `enough_s` / 4 each."""
    n = 1
    while (seconds := timer(call, n)) * 4 < enough_s and n < 1_000_000:
        n *= 2
    return min([seconds] + [timer(call, n) for _ in range(2)]) / n


def _orders(names: list[str], plan: Plan, rng: random.Random) -> Iterator[list[str]]:
    blocks = (latin_square(names, rng) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(blocks), plan.max_rounds)


def _run_round(dealt: Mapping[str, Call], order: Sequence[str], rounds: Rounds, timer: Timer) -> None:
    """One round; an untimed call first leaves caches and allocator as a loop of this contender would.

    Without it a contender would be timed on what another freed: whether malloc has to ask the system for
    pages alone moves F.cross_entropy twofold.
    """
    for name in order:
        call = dealt[name]
        if rounds.warm or id(call) not in rounds.met:
            rounds.met.add(id(call))  # what a first call sets up, such as workers, is no part of the others
            call()
        faults = covariates.page_faults()
        seconds = timer(call, rounds.inner_calls)
        rounds.page_faults[name].append((covariates.page_faults() - faults) / rounds.inner_calls)
        # A clock too coarse for a null call reads 0, which has no logarithm.
        rounds.seconds[name].append(max(seconds, 1e-9) / rounds.inner_calls)


def _spent(seconds: float, since_s: float, rounds: Rounds, plan: Plan) -> bool:
    """Whether to stop, wide intervals or not."""
    if _undisturbed(rounds) >= plan.min_rounds:
        return seconds >= plan.budget_s
    return seconds >= max(MOST_OVERDRAFT * plan.budget_s, plan.patience_s - since_s)


def _undisturbed(rounds: Rounds) -> int:
    flags, _ = covariates.disturbed(rounds.seen, rounds.round_s)
    return len(flags) - sum(flags)


def _narrow(rounds: Rounds, compared: Sequence[tuple[str, str]], plan: Plan) -> bool:
    if _undisturbed(rounds) < plan.min_rounds:
        return False
    kept, _, _ = rounds.kept()
    return all(paired_ratio(kept[base], kept[x]).width <= plan.width for base, x in compared)


class _no_collection:
    """No garbage collection inside rounds; one before them."""

    def __enter__(self) -> None:
        self.was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *exception: object) -> None:
        if self.was_enabled:
            gc.enable()


def rotate(calls: Sequence[Call]) -> Call:
    """Return one call that makes the next of `calls` each time, so that none finds its data in cache."""
    if len(calls) == 1:
        return calls[0]
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call
