"""Interleaved rounds: every contender once per round, in an order that favours none.

Orders come from a cyclic Latin square, permuted afresh per block, so that over a block each contender stands
once in each place. All contenders make the same number of calls per round.
"""

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mbperf.measure import covariates
from mbperf.measure.covariates import Covariates
from mbperf.measure.statistics import paired_ratio

# Of a group's budget, for the sake of its least number of rounds.
MOST_OVERDRAFT = 3.0
LEAST_ROUNDS = 3

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Plan:
    """How long and how finely to measure one group.

    Args:
        budget_s: stop after this long, however wide the intervals.
        width: stop when every interval is at most this wide, relative to its ratio.
        min_rounds, max_rounds: bounds that neither of the two overrules.
        batch_s: how long the fastest contender's calls of one round should take together.
        warm: one untimed call before each contender's timed ones, so that "hot" is hot at one call a round.
        multiple: the calls per round are a multiple of this (the rotation of a cold group).
        seed: of the orders.
    """

    budget_s: float
    width: float = 0.01
    min_rounds: int = 12
    max_rounds: int = 200
    batch_s: float = 1e-3
    warm: bool = True
    multiple: int = 1
    seed: int = 0


@dataclass
class Rounds:
    """Seconds per call of every contender in every round, and what else was seen meanwhile."""

    seconds: dict[str, list[float]]
    inner_calls: int
    seed: int
    seen: list[Covariates] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)

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


def run_rounds(
    calls: Mapping[str, Call],
    compared: Sequence[tuple[str, str]],
    plan: Plan,
    pace: Sequence[str] = (),
    clock: Clock = time.perf_counter,
    read: covariates.Reader = covariates.read,
) -> Rounds:
    """Measure all contenders in interleaved rounds until the intervals are narrow or the budget is spent.

    Args:
        calls: the contenders, ready to call.
        compared: (base, contender) pairs whose interval has to become narrow.
        plan: bounds on the time and on the rounds.
        pace: the contenders whose fastest sets the number of calls per round; all of them by default.
        clock: seconds; replaced by a fake one in the tests of this ruler.
        read: covariates; likewise.

    Returns:
        Rounds, seconds per call.

    >>> rounds = run_rounds({"a": int, "b": int}, [("a", "b")], Plan(budget_s=9, max_rounds=12))
    >>> len(rounds.seconds["a"])
    12
    """
    start = clock()
    inner_calls = calibrate(calls, pace or list(calls), plan, clock)
    rounds = Rounds({name: [] for name in calls}, inner_calls, plan.seed)
    with _no_collection():
        for order in _orders(list(calls), plan):
            _run_round(calls, order, rounds, plan, clock, read)
            if _spent(clock() - start, len(rounds.seen), plan):
                break
            # Looked at after whole blocks only: there every contender has stood in every place.
            if len(rounds.seen) % len(order) == 0 and _narrow(rounds, compared, plan):
                break
    return rounds


def calibrate(calls: Mapping[str, Call], pace: Sequence[str], plan: Plan, clock: Clock) -> int:
    """Return the common number of calls per round: the fastest contender then takes about `plan.batch_s`."""
    once = {name: _timed(call, 1, clock) for name, call in calls.items()}
    # The first call says who may be the fastest; only they are worth a closer look.
    likely = [name for name in pace if once[name] <= 5 * min(once[one] for one in pace)]
    fastest = min(_seconds_per_call(calls[name], plan.batch_s, clock) for name in likely)
    affordable_s = plan.budget_s / plan.min_rounds * fastest / max(sum(once.values()), 1e-9)
    calls_per_round = max(1, round(min(plan.batch_s, affordable_s) / max(fastest, 1e-9)))
    return -(-calls_per_round // plan.multiple) * plan.multiple


def _seconds_per_call(call: Call, enough_s: float, clock: Clock) -> float:
    """Return the least seconds per call of three tries of at least `enough_s` / 4 each."""
    n = 1
    while (seconds := _timed(call, n, clock)) * 4 < enough_s and n < 1_000_000:
        n *= 2
    return min([seconds] + [_timed(call, n, clock) for _ in range(2)]) / n


def _timed(call: Call, n: int, clock: Clock) -> float:
    repeat = itertools.repeat(None, n)
    start = clock()
    for _ in repeat:
        call()
    return clock() - start


def _orders(names: list[str], plan: Plan) -> Iterator[list[str]]:
    rng = random.Random(plan.seed)
    blocks = (latin_square(names, rng) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(blocks), plan.max_rounds)


def _run_round(
    calls: Mapping[str, Call],
    order: Sequence[str],
    rounds: Rounds,
    plan: Plan,
    clock: Clock,
    read: covariates.Reader,
) -> None:
    before, start = read(), clock()
    for name in order:
        call = calls[name]
        if plan.warm:
            call()
        # A clock too coarse for a null call reads 0, which has no logarithm.
        rounds.seconds[name].append(max(_timed(call, rounds.inner_calls, clock), 1e-9) / rounds.inner_calls)
    rounds.round_s.append(clock() - start)
    rounds.seen.append(read().since(before))


def _spent(seconds: float, rounds: int, plan: Plan) -> bool:
    """Whether to stop, wide intervals or not; a machine that stalls does not get all its rounds."""
    if rounds >= plan.min_rounds:
        return seconds >= plan.budget_s
    return rounds >= LEAST_ROUNDS and seconds >= MOST_OVERDRAFT * plan.budget_s


def _narrow(rounds: Rounds, compared: Sequence[tuple[str, str]], plan: Plan) -> bool:
    if len(rounds.seen) < plan.min_rounds:
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
