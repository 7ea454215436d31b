"""The runs of one profile, each within its time: the probe, drained and paced trials, and what they say.

Which configurations are tried is decided elsewhere (sweep.py); here each trial gets its length and its limit,
and what it saw goes into the arms and, while the model is being corrected, into the model.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mbperf.loader import limits
from mbperf.loader.arm import Arm
from mbperf.loader.arms import Arms
from mbperf.loader.model import Consumer, Model
from mbperf.loader.nursery import Nursery
from mbperf.loader.probe import Costs
from mbperf.loader.records import Trial
from mbperf.loader.settings import Settings

SHORTEST_S, LONGEST_S = 0.25, 5.0
RESERVE_SHARE, RESERVE_S = 0.2, 3.0  # kept for lint, the instrumented run and the last paced trials
PACED_STEPS, MOST_PACED_SHARE = 10, 0.25  # the last paced trial wants this many steps, for that much at most


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

    @property
    def reserve(self) -> float:
        """Seconds that the sweep leaves for what comes after it."""
        return max(RESERVE_SHARE * self.total_s, min(RESERVE_S, 0.3 * self.total_s))


@dataclass
class Runs:
    """What has been run so far; `trials` and `arms` hold all that is known, whenever it is interrupted.

    `tell(event, payload)` is called with "trial" before and "result" after each trial, for a display.
    """

    nursery: Nursery
    consumer: Consumer
    budget: Budget
    tolerance: float
    seed: int
    tell: Callable[[str, Any], None]
    trials: list[Trial] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    round: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self.arms = Arms(self.consumer)
        self.model = Model(self.costs, limits.usable_cpus())
        self.order = random.Random(self.seed)
        self.base = Settings()
        self.fatal: str | None = None

    @property
    def trial_time_left(self) -> float:
        """Seconds that may still go into the sweep's trials."""
        paced = min(MOST_PACED_SHARE * self.budget.total_s, self.paced_s())
        return self.budget.left - self.budget.reserve - paced

    def paced_s(self) -> float:
        """Return the seconds that the first paced trial of the recommendation takes; 0 once it had one."""
        chosen = self.recommended()
        if chosen is None or chosen.paced or not self.consumer.step_time_s:
            return 0.0
        steps = chosen.settings.prefetched_batches + PACED_STEPS
        return steps * self.period_s(chosen.settings, paced=True)

    def recommended(self) -> Arm | None:
        """Return the arm that would be recommended now, with its workers kept alive where that was better."""
        chosen = self.arms.recommend(self.tolerance)
        return None if chosen is None else self.arms.shown_for(chosen)

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

    def period_s(self, settings: Settings, paced: bool) -> float:
        """Return the seconds between batches to expect, as measured where it was, else as predicted."""
        arm = self.arms.by_settings.get(settings)
        rate = arm.rate if arm and arm.rate else self.model.rate(settings)
        return self.consumer.period_s(settings, rate) if paced else (settings.batch_size or 1) / rate

    def expected_s(self, settings: Settings, seconds: float, paced: bool = False) -> float:
        """Return how long a trial will take: start, warm-up, timing, and a later epoch's first batch."""
        arm = self.arms.by_settings.get(settings)
        before = [t for t in (arm.paced if paced else arm.trials) if t.seconds] if arm else []
        if before:
            return before[-1].spent_s - before[-1].seconds + seconds
        period = self.period_s(settings, paced)
        fresh = (
            2.5 * settings.num_workers**0.5
            if settings.multiprocessing_context in ("spawn", "forkserver")
            else 0.0
        )
        start = 0.15 + 0.03 * settings.num_workers + 2 * fresh
        return start + seconds + period * (max(1, settings.prefetched_batches) + max(1, settings.num_workers))

    def try_one(self, settings: Settings, seconds: float, paced: bool = False) -> Trial:
        """Run one trial, drained or paced, within the time that is left to the sweep."""
        expected = self.expected_s(settings, seconds, paced)
        seconds = max(SHORTEST_S, min(seconds, self.trial_time_left - (expected - seconds)))
        # Twelve blocks of whole turns, so that the interval means something, but never three times as long.
        blocks = 12 * max(1, settings.num_workers) * self.period_s(settings, paced)
        seconds = max(seconds, min(blocks, 3 * seconds, self.trial_time_left / 4))
        limit = max(1.0, min(max(4 * expected, 3.0), self.trial_time_left))
        return self.run_trial(settings, seconds, limit, paced)

    def run_trial(self, settings: Settings, seconds: float, limit_s: float, paced: bool = False) -> Trial:
        """Run one trial of a given length, and take it into account."""
        if paced:
            step = self.consumer.step_s(settings)
            self.tell("phase", f"pacing a consumer at {step * 1e3:.3g} ms: {settings.label()}")
        else:
            self.tell("trial", settings)
        started = self.budget.spent
        known: dict[str, Any] = {"round": self.round, "started_s": started}
        job = {
            "job": "trial",
            "settings": settings.as_dict(),
            "seconds": seconds,
            "seed": self.order.randrange(2**31),
            "later_epoch": self.round > 0 and not paced,
            # All are forked from one heap, a training script has another: let the difference show as one
            # between trials.
            "fill_heap": self.count(settings, paced) % 2 == 0,
        }
        if paced:
            known |= {"mode": "paced", "step_time_s": self.consumer.step_s(settings)}
            job |= {"step_time_s": known["step_time_s"], "own_step": self.nursery.subject["has_step"]}
        answer = self.nursery.run(job, limit_s)
        return self.take(Trial.from_answer(settings, answer, spent_s=self.budget.spent - started, **known))

    def count(self, settings: Settings, paced: bool) -> int:
        """Return how many drained, or paced, trials a configuration has had."""
        arm = self.arms.by_settings.get(settings, Arm(settings))
        return len(arm.paced if paced else arm.trials)

    def take(self, trial: Trial) -> Trial:
        """Take a trial into account: arms, model, progress."""
        self.trials.append(trial)
        arm = self.arms.add(trial)
        if self.round == 0 and arm.feasible:
            self.correct_model()
        self.fatal = self.hopeless()
        self.tell("result", (trial, self.arms))
        return trial

    def correct_model(self) -> None:
        """Let the model meet what the anchors showed, the one without workers first."""
        for arm in sorted(self.arms.feasible(), key=lambda arm: arm.settings.num_workers):
            self.model.correct(arm.settings, arm.rate)

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
