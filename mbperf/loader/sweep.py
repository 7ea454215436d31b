"""The sweep: spend a time budget on trials where they tell most.

Anchors correct the model; the model picks the first round; then successive halving over the survivors, with
single-knob variants of the leader, each round in fresh random order with longer trials.
"""

from dataclasses import dataclass, field
from typing import Any

from mbperf.loader import limits
from mbperf.loader.arm import Arm
from mbperf.loader.arms import cost
from mbperf.loader.nursery import HARD_GRACE_S
from mbperf.loader.runs import LONGEST_S, PACED_STEPS, SHORTEST_S, Runs
from mbperf.loader.settings import Settings
from mbperf.loader.space import Space, grid, loaders_of, near_the_optimum, variants

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
class Sweep(Runs):
    """Decide what to run next, on the evidence so far. `space` holds the values that each knob may take."""

    space: Space = field(default_factory=Space)
    not_tried: list[Settings] = field(default_factory=list)
    foreseen: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Probe, then trials until the budget (less its reserve) is spent or the answer is clear."""
        subject = self.nursery.subject
        own = Settings(**subject["own_settings"]) if subject["own_settings"] else None
        self.base = self.space.base(own, subject["user_collate"])
        self.probe()
        candidates, explicit = self.candidates(subject)
        self.not_tried = list(candidates)  # whoever reads it leaves out what has been tried by then
        self.say_foreseen(candidates)
        self.try_round(drained(self.anchors(candidates, own)), self.first_seconds(), needed=True)
        if self.fatal is None:
            self.first_round(candidates, explicit)
            self.halve()

    def first_seconds(self) -> float:
        """Return how long a trial of the first round lasts."""
        return min(LONGEST_S, max(SHORTEST_S, FIRST_TRIAL_SHARE * self.budget.total_s))

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
        chosen = near_the_optimum(candidates, self.model, self.consumer, KEEP_PREDICTED, explicit)
        chosen = [s for s in chosen if s not in self.arms.by_settings]
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
        while self.trial_time_left > SHORTEST_S and self.arms.feasible() and not self.clear(varied):
            seconds = min(LONGEST_S, seconds * GROWTH)
            again = [(arm.settings, self.wants_pacing(arm)) for arm in self.survivors()]
            new = self.new_variants(varied)
            varied |= set(new)
            before = len(self.trials)
            self.try_round([*again, *((settings, False) for settings in new)], seconds)
            if len(self.trials) == before:
                break

    def wants_pacing(self, arm: Arm) -> bool:
        """Tell whether an arm's next trial is paced: beside a step, drained and paced trials take turns."""
        return self.consumer.step_time_s > 0 and len(arm.paced) < len(arm.trials)

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
        shown = self.recommended() or arms[0]
        found = {arm.settings: arm for arm in [arms[0], shown, *cheap, *possible[:half]]}
        return list(found.values())[:MOST_SURVIVORS]

    def clear(self, varied: set[Settings]) -> bool:
        """Tell whether more trials would change nothing: repeated, narrow, and the variants seen."""
        chosen = self.arms.recommend(self.tolerance)
        if chosen is None or self.new_variants(varied):
            return False
        paced = self.consumer.step_time_s > 0
        return all(
            len(arm.seen if paced else arm.trials) >= ENOUGH_TRIALS
            and self.arms.value_error(arm) <= ENOUGH_ERROR
            for arm in self.survivors()
        )

    def confirm(self) -> None:
        """Pace a consumer on the recommendation until its idle share is known, or the time for that is gone.

        Where that changes the recommendation, the next one is paced.
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

    def idle_known(self, arm: Arm) -> bool:
        """Tell whether paced trials have shown the idle share closely enough."""
        low, high = self.arms.idle_interval(arm)
        return len(arm.seen) >= ENOUGH_TRIALS and high - low <= ENOUGH_IDLE

    def try_round(self, chosen: list[tuple[Settings, bool]], seconds: float, needed: bool = False) -> None:
        """Run one trial of each (settings, paced), in random order, while there is time.

        Needed ones may use the reserve.
        """
        for settings, paced in self.order.sample(chosen, len(chosen)):
            left = self.budget.left - 1.0 if needed else self.trial_time_left
            if self.trials and left < self.expected_s(settings, SHORTEST_S, paced):
                if settings not in self.arms.by_settings:
                    self.not_tried.append(settings)
                continue
            self.try_one(settings, seconds, paced)
            if self.fatal is not None:
                return
        self.round += 1


def drained(chosen: list[Settings]) -> list[tuple[Settings, bool]]:
    """Return drained trials of each."""
    return [(settings, False) for settings in chosen]
