"""Spend a time budget on the trials that tell most.

Anchors correct the model; the model picks the first round; then successive halving over the survivors, with
single-knob variants of the leader, each round in fresh random order with longer trials.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mbperf.loader.processes.ranks import RanksRunner
from mbperf.loader.processes.runner import HARD_GRACE_S, TrialRunner
from mbperf.loader.records import Trial
from mbperf.loader.search import limits
from mbperf.loader.search.candidates import Candidate, Candidates, cost
from mbperf.loader.search.model import Consumer, Model
from mbperf.loader.search.space import Space, grid, loaders_of, near_the_optimum, variants
from mbperf.loader.settings import Settings
from mbperf.loader.trial.probe import Costs

SHORTEST_S, LONGEST_S = 0.25, 5.0
RESERVE_SHARE, RESERVE_S = 0.2, 3.0  # kept for lint, the instrumented run and the last paced trials
PACED_STEPS, MOST_PACED_SHARE = 10, 0.25  # the last paced trial wants this many steps, for that much at most
FIRST_TRIAL_SHARE = 0.02  # of the budget, for one trial of the first round
GROWTH = 1.5  # trials of the next round last this much longer
KEEP_PREDICTED = 0.6
ENOUGH_ERROR = 0.01
ENOUGH_IDLE = 0.05  # width of the idle share's 95 % interval beyond which more paced trials are run
ENOUGH_TRIALS = 3
MOST_SURVIVORS = 6
CLOSING_SHARE = 0.6  # of the reserve, for lint and the instrumented run; the last paced trials get the rest
SHORTEST_PACED_S = 0.2


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
class Sweep:
    """Decide what to run next on the evidence so far, and run it.

    `trials` and `candidates` hold all that is known, whenever the sweep is interrupted. `space` holds the
    values that each knob may take. `cpus` are a rank's share of the processors, `ranks` how many ranks this
    machine has; `also` is tried whatever the model says. `cut_short` are those whose trial was late in less
    time than a slow one may take. `tell(event, payload)` is called with "trial" before and "result" after
    each trial, for a display.
    """

    runner: TrialRunner | RanksRunner
    consumer: Consumer
    budget: Budget
    tolerance: float
    seed: int
    tell: Callable[[str, Any], None]
    space: Space = field(default_factory=Space)
    not_tried: list[Settings] = field(default_factory=list)
    cut_short: list[Settings] = field(default_factory=list)
    foreseen: list[str] = field(default_factory=list)
    cpus: float = field(default_factory=lambda: limits.usable_cpus())
    ranks: int = 1
    also: list[Settings] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    round: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self.candidates = Candidates(self.consumer)
        self.model = Model(self.costs, self.cpus)
        self.order = random.Random(self.seed)
        self.base = Settings()
        self.fatal: str | None = None

    def run(self) -> None:
        """Probe, then trials until the budget (less its reserve) is spent or the answer is clear."""
        subject = self.runner.subject
        own = Settings(**subject["own_settings"]) if subject["own_settings"] else None
        self.base = self.space.base(own, subject["user_collate"])
        self.probe()
        configurations, explicit = self.configurations(subject)
        self.not_tried = list(configurations)  # its readers leave out what has been tried by then
        self.say_foreseen(configurations)
        self.try_round(drained(self.anchors(configurations, own)), self.first_seconds(), needed=True)
        if self.fatal is None:
            self.first_round(configurations, explicit)
            self.halve()

    def first_seconds(self) -> float:
        """Return how long a trial of the first round lasts."""
        return min(LONGEST_S, max(SHORTEST_S, FIRST_TRIAL_SHARE * self.budget.total_s))

    def configurations(self, subject: dict[str, Any]) -> tuple[list[Settings], bool]:
        """Return the grid, and whether the user named the worker counts."""
        waiting = 1 - self.costs.getitem_cpu_s / self.costs.getitem_s if self.costs.getitem_s > 1e-4 else 0.0
        workers = self.space.worker_counts(self.model.cpus, waiting)
        loaders = loaders_of(self.base, subject, self.model, self.space, self.costs.collate_agrees)
        sizes = [None] if self.base.batch_size is None else list(self.space.batch_sizes)
        return grid(loaders, workers, sizes), self.space.workers is not None

    def anchors(self, configurations: list[Settings], own: Settings | None) -> list[Settings]:
        """Return what the model is corrected by: no workers, two workers, and the user's own settings."""
        plain = [s for s in configurations if s == self.base.with_workers(s.num_workers)]
        without = [s for s in plain if s.num_workers == 0][:1]
        few = sorted((s for s in plain if s.num_workers), key=lambda s: abs(s.num_workers - 2))[:1]
        return list(dict.fromkeys([*without, *few, *([own] if own else []), *self.also]))

    def say_foreseen(self, configurations: list[Settings]) -> None:
        """Tell, before anything is tried, from which configuration on something would run out."""
        said: set[str] = set()
        for settings in sorted(configurations, key=cost):
            found = limits.foreseen(
                settings, self.costs.batch_bytes, self.costs.tensors_per_batch, self.ranks
            )
            for shortage, words in found.items():
                if shortage not in said:
                    said.add(shortage)
                    self.foreseen.append(f"{settings.label()} and more: {words}")
                    self.tell("foreseen", self.foreseen[-1])

    def first_round(self, configurations: list[Settings], explicit: bool) -> None:
        """Try what the corrected model predicts to be good, nearest to its optimum first."""
        chosen = near_the_optimum(configurations, self.model, self.consumer, KEEP_PREDICTED, explicit)
        chosen = [s for s in chosen if s not in self.candidates.by_settings]
        share, seconds = 0.5 * self.trial_time_left, self.first_seconds()
        affordable: list[Settings] = []
        for settings in chosen:
            share -= self.expected_s(settings, seconds)
            if share < 0 and affordable:
                break
            affordable.append(settings)
        self.try_round(drained(affordable), seconds)

    def halve(self) -> None:
        """Repeat the survivors in ever longer, freshly shuffled rounds; try the leader's variants once."""
        seconds = self.first_seconds()
        varied: set[Settings] = set()
        while self.trial_time_left > SHORTEST_S and self.candidates.feasible() and not self.clear(varied):
            seconds = min(LONGEST_S, seconds * GROWTH)
            again = [(c.settings, self.wants_pacing(c)) for c in self.survivors()]
            new = self.new_variants(varied)
            varied |= set(new)
            before = len(self.trials)
            self.try_round([*again, *((settings, False) for settings in new)], seconds)
            if len(self.trials) == before:
                break

    def wants_pacing(self, candidate: Candidate) -> bool:
        """Tell whether the next trial is paced: beside a step, drained and paced trials take turns."""
        return self.consumer.step_time_s > 0 and len(candidate.paced) < len(candidate.trials)

    def new_variants(self, varied: set[Settings]) -> list[Settings]:
        """Return single-knob variants of the present recommendation that have not been tried."""
        chosen = self.candidates.recommend(self.tolerance)
        if chosen is None:
            return []
        found = variants(chosen.settings, self.space, self.runner.subject["accelerator"])
        return [s for s in found if s not in varied and s not in self.candidates.by_settings]

    def survivors(self) -> list[Candidate]:
        """Return the better half, never fewer than those that may still be the best or the recommendation."""
        feasible = self.candidates.feasible()
        best = feasible[0]
        possible = [c for c in feasible if self.candidates.ratio(c, best)[2] >= 1 - self.tolerance]
        half = max(2, (len(feasible) + 1) // 2)
        # Of those not to be told from the best, the simplest matter most: one of them will be recommended.
        cheap = sorted(possible, key=lambda c: cost(c.settings))[: MOST_SURVIVORS // 2]
        found = {c.settings: c for c in [best, *self.disputed(best), *cheap, *possible[:half]]}
        return list(found.values())[:MOST_SURVIVORS]

    def disputed(self, best: Candidate) -> list[Candidate]:
        """Return what has to be repeated before a recommendation may lose order or keep workers alive."""
        chosen = self.candidates.recommend(self.tolerance) or best
        kept = self.candidates.by_settings.get(replace(chosen.settings, persistent_workers=True))
        plainer = [group[0] for group in self.candidates.plainer(best)]
        return [chosen, *([kept] if kept and kept.feasible else []), *plainer]

    def clear(self, varied: set[Settings]) -> bool:
        """Tell whether more trials would change nothing: repeated, narrow, and the variants seen."""
        chosen = self.candidates.recommend(self.tolerance)
        if chosen is None or self.new_variants(varied):
            return False
        paced = self.consumer.step_time_s > 0
        return all(
            len(c.seen if paced else c.trials) >= ENOUGH_TRIALS
            and self.candidates.value_error(c) <= ENOUGH_ERROR
            for c in self.survivors()
        )

    def confirm(self) -> None:
        """Pace a consumer on the recommendation until its idle share is known, or no time is left for it.

        Where the result changes the recommendation, the new one is paced next.
        """
        while (chosen := self.recommended()) is not None and not self.idle_known(chosen):
            start = self.expected_s(chosen.settings, 0.0, paced=True)
            left = self.budget.left - CLOSING_SHARE * self.budget.reserve
            wanted = max(1, ENOUGH_TRIALS - len(chosen.seen))
            shortest = max(SHORTEST_S, PACED_STEPS * self.period_s(chosen.settings, paced=True))
            each = left / wanted - start
            seconds = min(LONGEST_S, each if each >= shortest else left - start)
            if seconds < SHORTEST_PACED_S:
                return
            self.run_trial(chosen.settings, seconds, self.budget.left - HARD_GRACE_S, paced=True)

    def idle_known(self, candidate: Candidate) -> bool:
        """Tell whether paced trials have shown the idle share closely enough."""
        low, high = self.candidates.idle_interval(candidate)
        return len(candidate.seen) >= ENOUGH_TRIALS and high - low <= ENOUGH_IDLE

    def try_round(self, chosen: list[tuple[Settings, bool]], seconds: float, needed: bool = False) -> None:
        """Run one trial of each (settings, paced), in random order, while there is time.

        Needed ones may use the reserve.
        """
        for settings, paced in self.order.sample(chosen, len(chosen)):
            left = self.budget.left - 1.0 if needed else self.trial_time_left
            if self.trials and left < self.expected_s(settings, SHORTEST_S, paced):
                if settings not in self.candidates.by_settings:
                    self.not_tried.append(settings)
                continue
            self.try_one(settings, seconds, paced)
            if self.fatal is not None:
                return
        self.round += 1

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

    def recommended(self) -> Candidate | None:
        """Return what would be recommended now, with its workers kept alive where that was better."""
        chosen = self.candidates.recommend(self.tolerance)
        return None if chosen is None else self.candidates.shown_for(chosen, self.tolerance)

    def probe(self) -> None:
        """Measure single-process costs, for at most a fifth of the budget."""
        self.tell("phase", "measuring one process: getitem, collate, bytes")
        job = {"job": "probe", "settings": self.base.as_dict(), "seed": self.seed}
        seconds = min(1.0, 0.05 * self.budget.total_s)
        answer = self.runner.run(job | {"seconds": seconds}, 0.2 * self.budget.total_s)
        if "infeasible" in answer:
            self.costs.failures.append((-1, answer["infeasible"]))
        else:
            self.costs = Costs(**answer)
        self.model = Model(self.costs, self.cpus)
        self.tell("costs", self.costs)

    def period_s(self, settings: Settings, paced: bool) -> float:
        """Return the seconds between batches to expect, as measured where it was, else as predicted."""
        candidate = self.candidates.by_settings.get(settings)
        rate = candidate.rate if candidate and candidate.rate else self.model.rate(settings)
        return self.consumer.period_s(settings, rate) if paced else (settings.batch_size or 1) / rate

    def expected_s(self, settings: Settings, seconds: float, paced: bool = False) -> float:
        """Return how long a trial will take: start, warm-up, timing, and a later epoch's first batch."""
        before = [t for t in self.trials_of(settings, paced) if t.seconds]
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
        patience = max(4 * expected, 3.0)
        limit = max(1.0, min(patience, self.trial_time_left))
        trial = self.run_trial(settings, seconds, limit, paced)
        if trial.cause == "timeout" and limit < patience:
            self.cut_short.append(settings)
        return trial

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
            # All trials are forked from one heap, a training script has another. Trials that differ in it
            # show what that is worth.
            "fill_heap": len(self.trials_of(settings, paced)) % 2 == 0,
        }
        if paced:
            known |= {"mode": "paced", "step_time_s": self.consumer.step_s(settings)}
            job |= {"step_time_s": known["step_time_s"], "own_step": self.runner.subject["has_step"]}
        answer = self.runner.run(job, limit_s)
        return self.take(Trial.from_answer(settings, answer, spent_s=self.budget.spent - started, **known))

    def trials_of(self, settings: Settings, paced: bool) -> list[Trial]:
        """Return the drained, or the paced, trials that a configuration has had."""
        candidate = self.candidates.by_settings.get(settings, Candidate(settings))
        return candidate.paced if paced else candidate.trials

    def take(self, trial: Trial) -> Trial:
        """Take a trial into account: candidates, model, progress."""
        self.trials.append(trial)
        candidate = self.candidates.add(trial)
        if self.round == 0 and candidate.feasible:
            self.correct_model()
        self.fatal = self.hopeless()
        self.tell("result", (trial, self.candidates))
        return trial

    def correct_model(self) -> None:
        """Fit the model to the rates of the anchors, the one without workers first."""
        for candidate in sorted(self.candidates.feasible(), key=lambda c: c.settings.num_workers):
            self.model.correct(candidate.settings, candidate.rate)

    def hopeless(self) -> str | None:
        """Return why no configuration can work: one clear error instead of a table of the same.

        A dataset that raises (or is empty) in two configurations does so in all. One that hangs is hopeless
        where not one sample came in a single process.
        """
        causes = {trial.cause for trial in self.trials}
        hung = causes == {"timeout"} and bool(self.costs.failures) and not self.costs.samples
        if not hung and (len(self.trials) < 2 or not causes <= {"exception", "setup"}):
            return None
        if hung:
            index, words = self.costs.failures[0]
            return words if index < 0 else f"dataset[{index}] {words}"
        return self.trials[-1].infeasible


def drained(chosen: list[Settings]) -> list[tuple[Settings, bool]]:
    """Return drained trials of each."""
    return [(settings, False) for settings in chosen]
