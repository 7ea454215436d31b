"""The sweep: spend a time budget on trials where they tell most.

Anchors correct the model; the model picks the first round; then successive halving over the survivors, with
single-knob variants of the leader, each round in fresh random order with longer trials.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mbperf.loader import limits
from mbperf.loader.arms import Arm, Arms, cost
from mbperf.loader.model import Consumer, Model
from mbperf.loader.nursery import Nursery
from mbperf.loader.probe import Costs
from mbperf.loader.records import Trial
from mbperf.loader.settings import Settings
from mbperf.loader.space import Space, grid, loaders_of, near_the_optimum, variants

FIRST_TRIAL_SHARE = 0.02  # of the budget, for one trial of the first round
SHORTEST_S, LONGEST_S = 0.25, 5.0
GROWTH = 1.5  # trials of the next round last this much longer
RESERVE_SHARE, RESERVE_S = 0.2, 3.0  # kept for lint, the instrumented run and the paced check
PACED_STEPS, MOST_PACED_SHARE = 10, 0.25  # the paced check wants this many steps, for that much of the budget
KEEP_PREDICTED = 0.6
ENOUGH_ERROR = 0.01
ENOUGH_TRIALS = 3
MOST_SURVIVORS = 6


@dataclass
class Budget:
    """A total of seconds, counted from the start."""

    total_s: float
    began: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds gone."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.total_s - self.spent


@dataclass
class Sweep:
    """State of one sweep; `trials` and `arms` hold all that is known, whenever it is interrupted.

    `tell(event, payload)` is called with "trial" before and "result" after each trial, for a display.
    """

    nursery: Nursery
    space: Space
    consumer: Consumer
    budget: Budget
    tolerance: float
    seed: int
    tell: Callable[[str, Any], None]
    trials: list[Trial] = field(default_factory=list)
    not_tried: list[Settings] = field(default_factory=list)
    foreseen: list[str] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    round: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self.arms = Arms(self.consumer)
        self.model = Model(self.costs, limits.usable_cpus())
        self.order = random.Random(self.seed)
        self.base = Settings()
        self.fatal: str | None = None

    def run(self) -> None:
        """Probe, then trials until the budget (less its reserve) is spent or the answer is clear."""
        subject = self.nursery.subject
        own = Settings(**subject["own_settings"]) if subject["own_settings"] else None
        self.base = self.space.base(own, subject["user_collate"])
        self.probe()
        candidates, explicit = self.candidates(subject)
        self.say_foreseen(candidates)
        self.try_round(self.anchors(candidates, own), self.first_seconds(), needed=True)
        if self.fatal is None:
            self.first_round(candidates, explicit)
            self.halve()

    def first_seconds(self) -> float:
        """Return how long a trial of the first round lasts."""
        return min(LONGEST_S, max(SHORTEST_S, FIRST_TRIAL_SHARE * self.budget.total_s))

    @property
    def trial_time_left(self) -> float:
        """Seconds that may still go into trials."""
        total = self.budget.total_s
        reserve = max(RESERVE_SHARE * total, min(RESERVE_S, 0.3 * total))
        return self.budget.left - reserve - min(MOST_PACED_SHARE * total, self.paced_s())

    def paced_s(self) -> float:
        """Return the seconds that the shortest useful paced trial of the present recommendation takes."""
        chosen = self.arms.recommend(self.tolerance)
        if chosen is None or not self.consumer.step_time_s:
            return 0.0
        steps = chosen.settings.prefetched_batches + PACED_STEPS
        return steps * self.consumer.period_s(chosen.settings, chosen.rate)

    def probe(self) -> None:
        """Measure single-process costs, for at most a fifth of the budget."""
        self.tell("phase", "measuring one process: getitem, collate, bytes")
        job = {"job": "probe", "settings": self.base.as_dict(), "seed": self.seed}
        seconds = min(1.0, 0.05 * self.budget.total_s)
        answer = self.nursery.run(job | {"seconds": seconds}, 0.2 * self.budget.total_s)
        if "infeasible" in answer:
            self.costs.failures.append((-1, answer["infeasible"]))
        else:
            self.costs = Costs(**answer)
        self.model = Model(self.costs, limits.usable_cpus())
        self.tell("costs", self.costs)

    def candidates(self, subject: dict[str, Any]) -> tuple[list[Settings], bool]:
        """Return the grid, and whether the user named the worker counts."""
        waiting = 1 - self.costs.getitem_cpu_s / self.costs.getitem_s if self.costs.getitem_s > 1e-4 else 0.0
        workers = self.space.worker_counts(self.model.cpus, waiting)
        loaders = loaders_of(self.base, subject, self.model, self.space, self.costs.collate_agrees)
        sizes = [None] if self.base.batch_size is None else list(self.space.batch_sizes)
        return grid(loaders, workers, sizes), self.space.workers is not None

    def anchors(self, candidates: list[Settings], own: Settings | None) -> list[Settings]:
        """Return what the model is corrected by: no workers, two workers, and the user's own settings."""
        plain = [s for s in candidates if s == self.base.with_workers(s.num_workers)]
        without = [s for s in plain if s.num_workers == 0][:1]
        few = sorted((s for s in plain if s.num_workers), key=lambda s: abs(s.num_workers - 2))[:1]
        return list(dict.fromkeys([*without, *few, *([own] if own else [])]))

    def say_foreseen(self, candidates: list[Settings]) -> None:
        """Tell, before anything is tried, from which configuration on something would run out."""
        said: set[str] = set()
        for settings in sorted(candidates, key=cost):
            found = limits.foreseen(settings, self.costs.batch_bytes, self.costs.tensors_per_batch)
            for shortage, words in found.items():
                if shortage not in said:
                    said.add(shortage)
                    self.foreseen.append(f"{settings.label()} and more: {words}")
                    self.tell("foreseen", self.foreseen[-1])

    def first_round(self, candidates: list[Settings], explicit: bool) -> None:
        """Try what the corrected model thinks good, nearest its optimum first, as far as the time goes."""
        chosen, self.not_tried = near_the_optimum(
            candidates, self.model, self.consumer, KEEP_PREDICTED, explicit
        )
        chosen = [s for s in chosen if s not in self.arms.by_settings]
        share, seconds = 0.5 * self.trial_time_left, self.first_seconds()
        affordable: list[Settings] = []
        for settings in chosen:
            share -= self.expected_s(settings, seconds)
            if share < 0 and affordable:
                break
            affordable.append(settings)
        self.not_tried += chosen[len(affordable) :]
        self.try_round(affordable, seconds)

    def halve(self) -> None:
        """Repeat the survivors in ever longer, freshly shuffled rounds; try the leader's variants once."""
        seconds = self.first_seconds()
        varied: set[Settings] = set()
        while self.trial_time_left > SHORTEST_S and self.arms.feasible() and not self.clear(varied):
            seconds = min(LONGEST_S, seconds * GROWTH)
            survivors = [arm.settings for arm in self.survivors()]
            new = self.new_variants(varied)
            varied |= set(new)
            before = len(self.trials)
            self.try_round([*survivors, *new], seconds)
            if len(self.trials) == before:
                break

    def new_variants(self, varied: set[Settings]) -> list[Settings]:
        """Return single-knob variants of the present recommendation that have not been tried."""
        chosen = self.arms.recommend(self.tolerance)
        if chosen is None:
            return []
        found = variants(chosen.settings, self.space, self.nursery.subject["accelerator"])
        return [s for s in found if s not in varied and s not in self.arms.by_settings]

    def survivors(self) -> list[Arm]:
        """Return the better half, never fewer than those that may still be the best or the recommendation."""
        arms = self.arms.feasible()
        possible = [arm for arm in arms if self.arms.ratio(arm, arms[0])[2] >= 1 - self.tolerance]
        half = max(2, (len(arms) + 1) // 2)
        # Of those not to be told from the best, the cheapest matter most: one of them will be recommended.
        cheap = sorted(possible, key=lambda arm: cost(arm.settings))[: MOST_SURVIVORS // 2]
        return list({arm.settings: arm for arm in [arms[0], *cheap, *possible[:half]]}.values())[
            :MOST_SURVIVORS
        ]

    def clear(self, varied: set[Settings]) -> bool:
        """Tell whether more trials would change nothing: repeated, narrow, and the variants seen."""
        chosen = self.arms.recommend(self.tolerance)
        if chosen is None or self.new_variants(varied):
            return False
        return all(
            len(arm.log_rates()) >= ENOUGH_TRIALS and self.arms.value_error(arm) <= ENOUGH_ERROR
            for arm in self.survivors()
        )

    def expected_s(self, settings: Settings, seconds: float) -> float:
        """Return how long a trial will take: start, warm-up, timing, and a later epoch's first batch."""
        arm = self.arms.by_settings.get(settings)
        if arm and arm.trials:
            last = arm.trials[-1]
            return last.spent_s - last.seconds + seconds
        period = self.model.period_s(settings)
        fresh = (
            2.5 * settings.num_workers**0.5
            if settings.multiprocessing_context in ("spawn", "forkserver")
            else 0.0
        )
        start = 0.15 + 0.03 * settings.num_workers + 2 * fresh
        return start + seconds + period * (max(1, settings.prefetched_batches) + max(1, settings.num_workers))

    def try_round(self, chosen: list[Settings], seconds: float, needed: bool = False) -> None:
        """Try each configuration once, in random order, while there is time; needed ones use the reserve."""
        shuffled = self.order.sample(chosen, len(chosen))
        for settings in shuffled:
            left = self.budget.left - 1.0 if needed else self.trial_time_left
            if self.trials and left < self.expected_s(settings, SHORTEST_S):
                if settings not in self.arms.by_settings:
                    self.not_tried.append(settings)
                continue
            self.try_one(settings, seconds)
            if self.fatal is not None:
                return
        self.round += 1

    def try_one(self, settings: Settings, seconds: float) -> Trial:
        """Run one drained trial and take it into account."""
        self.tell("trial", settings)
        expected = self.expected_s(settings, seconds)
        seconds = max(SHORTEST_S, min(seconds, self.trial_time_left - (expected - seconds)))
        # Twelve blocks of whole turns, so that the interval means something, but never three times as long.
        blocks = 12 * max(1, settings.num_workers) * self.model.period_s(settings)
        seconds = max(seconds, min(blocks, 3 * seconds, self.trial_time_left / 4))
        limit = max(1.0, min(max(4 * expected, 3.0), self.trial_time_left))
        started = self.budget.spent
        job = {
            "job": "trial",
            "settings": settings.as_dict(),
            "seconds": seconds,
            "seed": self.order.randrange(2**31),
            "later_epoch": self.round > 0,
        }
        answer = self.nursery.run(job, limit)
        known = {"round": self.round, "started_s": started, "spent_s": self.budget.spent - started}
        return self.take(Trial.from_answer(settings, answer, **known))

    def take(self, trial: Trial) -> Trial:
        """Take a trial into account: arms, model, progress."""
        self.trials.append(trial)
        arm = self.arms.add(trial)
        if self.round == 0 and arm.feasible:
            self.model.correct(trial.settings, arm.rate)
        self.fatal = self.hopeless()
        self.tell("result", (trial, self.arms))
        return trial

    def hopeless(self) -> str | None:
        """Return why no configuration can work: one clear error instead of a table of the same.

        What raises (or is empty) in two configurations does so in all; what hangs, where not one sample came
        in a single process.
        """
        causes = {trial.cause for trial in self.trials}
        hung = causes == {"timeout"} and bool(self.costs.failures) and not self.costs.samples
        if not hung and (len(self.trials) < 2 or not causes <= {"exception", "setup"}):
            return None
        if hung:
            index, words = self.costs.failures[0]
            return words if index < 0 else f"dataset[{index}] {words}"
        return self.trials[-1].infeasible
