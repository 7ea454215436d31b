"""A whole sweep on synthetic trials: rates are given, noise is drawn from a seed, time is only counted."""

import math
import random
from dataclasses import asdict

from mbperf.loader.output.advice import advise
from mbperf.loader.records import Profile
from mbperf.loader.search import sweep as sweep_module
from mbperf.loader.search.model import Consumer
from mbperf.loader.search.space import Space
from mbperf.loader.search.sweep import Budget, Sweep
from mbperf.loader.trial.probe import Costs
from mbperf.loader.trial.timing import BLOCKS

START_S = 0.1  # a trial spends this before its first batch


class CountedTime:
    """Stands for the module `time`: its clock shows what trials have been given."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class SyntheticRunner:
    """Stands for a TrialRunner: answers from `rate_of(settings)` in samples/s, with noise between trials."""

    def __init__(self, clock, rate_of, getitem_s, waits, noise, seed):
        self.clock, self.rate_of, self.noise = clock, rate_of, noise
        self.costs = Costs(getitem_s=getitem_s, getitem_cpu_s=0.0 if waits else getitem_s, samples=100,
                           batch_size=64, collate_s={"torch": 1e-4})  # fmt: skip
        self.draw = random.Random(seed)
        self.subject = {"own_settings": None, "user_collate": False, "batches": True, "tensor_dataset": False,
                        "loader_class": None, "accelerator": False, "has_step": False, "fixed_words": [],
                        "name": "synthetic"}  # fmt: skip

    def run(self, job, limit_s):
        self.clock.now += START_S + job["seconds"]
        return asdict(self.costs) if job["job"] == "probe" else self.trial(job)

    def trial(self, job):
        settings = sweep_module.Settings(**job["settings"])
        rate = self.rate_of(settings) * math.exp(self.draw.gauss(0, self.noise))
        blocks = [rate * (1 + self.draw.gauss(0, self.noise)) for _ in range(BLOCKS)]
        seconds, start_s = job["seconds"], 0.02 * settings.num_workers * (not settings.persistent_workers)
        first_s = max(1, settings.num_workers) * 64 / rate + start_s * (1 + abs(self.draw.gauss(0, 0.1)))
        return {"seconds": seconds, "samples": int(rate * seconds), "batches": int(rate * seconds / 64),
                "blocks": blocks, "waits_s": [64 / rate], "step_s": 0.0, "first_batch_s": first_s,
                "later_first_batch_s": first_s if job["later_epoch"] else None, "epoch_s": [], "memory": None,
                "whole_epochs": False}  # fmt: skip


def swept(monkeypatch, rate_of, getitem_s=2e-3, waits=False, noise=0.02, seed=0, budget_s=60.0, samples=2000):
    """Return the profile that a sweep over these rates ends with, on two processors."""
    clock = CountedTime()
    monkeypatch.setattr(sweep_module, "time", clock)
    monkeypatch.setattr(sweep_module.limits, "usable_cpus", lambda: 2.0)
    runner = SyntheticRunner(clock, rate_of, getitem_s, waits, noise, seed)
    sweep = Sweep(runner, Consumer(0.0, 64, samples), Budget(budget_s, clock.now), 0.03, seed,
                  lambda event, payload: None, space=Space())  # fmt: skip
    sweep.run()
    profile = Profile(subject=runner.subject, trials=sweep.trials)
    advise(profile, sweep.candidates, 0.03)
    return profile
