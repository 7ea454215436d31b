"""`mbperf.loader.profile`: from a dataset and a time budget to an answer. No user code runs here."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from mbperf import processors
from mbperf.loader.output import ranks as of_ranks
from mbperf.loader.output.advice import CONFIDENCE_MARGIN, advise
from mbperf.loader.processes.ranks import RanksRunner
from mbperf.loader.processes.runner import HARD_GRACE_S, TrialRunner
from mbperf.loader.records import Profile
from mbperf.loader.search import limits
from mbperf.loader.search.model import Consumer
from mbperf.loader.search.space import Space
from mbperf.loader.search.sweep import Budget, Sweep
from mbperf.loader.settings import Settings
from mbperf.loader.source import LoaderError, Source, source_of

SHORTEST_BUDGET_S = 3.0
SHORTEST_EXAMINE_S = 0.2
ALONE_SHARE = 0.25  # of the budget, for what one rank alone would suggest
UNTRIED_CONFIDENCE = 0.3  # the model is right more often than not when it sees more than the margin


def profile(
    dataset: Any,
    *,
    batch_size: int | Sequence[int] | None = None,
    workers: Sequence[int] | None = None,
    prefetch: Sequence[int] = (2, 4),
    pin_memory: Sequence[bool] | None = None,
    contexts: Sequence[str | None] = (None,),
    in_order: Sequence[bool] = (True, False),
    collates: Sequence[str] | None = None,
    collate_fn: Callable | None = None,
    worker_init_fn: Callable | None = None,
    shuffle: bool | None = None,
    drop_last: bool = False,
    step_time_s: float | None = None,
    step: Callable[[Any], object] | None = None,
    budget_s: float = 60.0,
    tolerance: float = 0.03,
    seed: int = 0,
    arguments: dict[str, Any] | None = None,
    ranks: int = 1,
    on_event: Callable[[str, Any], None] | None = None,
) -> Profile:
    """Find the DataLoader configuration that suits this dataset on this machine, and say how sure that is.

    Torch equivalent: trying `DataLoader(dataset, num_workers=0, 1, 2, ...)` by hand with a stopwatch.

    Args:
        dataset: map-style or iterable Dataset, a sequence, tensors, a ready DataLoader (its class and
            arguments are kept), a function returning one of these, or "package.module:attribute".
        batch_size: samples in a batch, or several to try; default the loader's own, else 64.
        workers, prefetch, pin_memory, contexts, in_order, collates: values to try; None: chosen here.
            collates: "torch", "mbperf" (and mbperf.TensorDataset); the user's own is always tried.
        collate_fn, worker_init_fn, shuffle, drop_last: as for DataLoader, the same in every trial.
        step_time_s: how long the consumer takes with a batch; None: unknown. Paced trials sleep as long, as a
            step that waits for an accelerator does.
        step: the consumer's own step, called with each batch; its time is measured. One that computes on this
            machine's processors competes with the workers, which no step_time_s can tell.
        budget_s: seconds for everything (kept within 10 %).
        tolerance: the simplest configuration is recommended that none is shown to beat by more than this.
        seed: of the trial order and of the random states inside trials.
        arguments: keyword arguments for a function named by import path.
        ranks: training processes of this machine that load at once, each its share; the answer is of each.
        on_event: called as (event, payload) for a progress display.

    Returns:
        Profile: plain records in base units; `exit_code` for scripts. After Ctrl-C what is known so far.

    Raises:
        LoaderError: the dataset cannot reach a fresh process or cannot be made there.
        ValueError: an argument out of range.

    >>> answer = profile(list(range(1000)), budget_s=10, workers=[0])
    >>> answer.recommendation["num_workers"]
    0
    """
    check_arguments(budget_s, tolerance, step_time_s, ranks)
    fixed = {"collate_fn": collate_fn, "worker_init_fn": worker_init_fn, "shuffle": shuffle,
             "drop_last": drop_last, "step": step}  # fmt: skip
    source = source_of(dataset, fixed)
    source.arguments = arguments or {}
    space = Space(workers, _sizes(batch_size), prefetch, pin_memory, contexts, in_order, collates)
    return profile_source(
        source, space, step_time_s, budget_s, tolerance, seed, on_event, batch_size is not None,
        runner_of(ranks),
    )  # fmt: skip


Runner = TrialRunner | RanksRunner


def runner_of(ranks: int) -> Callable[[Source, float], Runner]:
    """Return what makes the runner of so many ranks from a source and the seconds to make the dataset."""
    return TrialRunner if ranks == 1 else partial(RanksRunner.here, ranks=ranks)


def ready_s(budget_s: float) -> float:
    """Return how long making the dataset may take."""
    return max(0.8 * budget_s, SHORTEST_BUDGET_S)


def check_arguments(budget_s: float, tolerance: float, step_time_s: float | None, ranks: int) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError, LoaderError: naming the argument.
    """
    if os.environ.get("MBPERF_LOADER_TRIAL"):
        raise LoaderError(
            "profile: called while a trial's process imports your script; put the call under "
            'if __name__ == "__main__":'
        )
    if budget_s < SHORTEST_BUDGET_S:
        raise ValueError(f"profile: budget_s must be at least {SHORTEST_BUDGET_S:g} s, got {budget_s:g}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"profile: tolerance must be in [0, 1), got {tolerance:g}")
    if step_time_s is not None and step_time_s < 0:
        raise ValueError(f"profile: step_time_s must not be negative, got {step_time_s:g}")
    if ranks < 1:
        raise ValueError(f"profile: ranks must be at least 1, got {ranks}")


def _sizes(batch_size: int | Sequence[int] | None) -> list[int | None]:
    if batch_size is None:
        return [None]
    return [batch_size] if isinstance(batch_size, int) else list(batch_size)


def profile_source(
    source: Source,
    space: Space,
    step_time_s: float | None,
    budget_s: float,
    tolerance: float,
    seed: int,
    on_event: Callable[[str, Any], None] | None,
    size_given: bool,
    start: Callable[[Source, float], Runner] = TrialRunner,
) -> Profile:
    """Run the whole profile of a source; see `profile`. `start` makes the runner, as `runner_of` says."""
    budget = Budget(budget_s)
    tell = on_event or (lambda event, payload: None)
    answer = Profile(step_time_s=step_time_s, budget_s=budget_s, seed=seed, machine=machine_facts())
    if source.warning:
        answer.notes.append(source.warning)
    sweep: Sweep | None = None
    alone: Sweep | None = None
    try:
        tell("phase", "making the dataset in a fresh process")
        with start(source, ready_s(budget_s)) as runner:
            answer.subject = runner.subject
            settle_batch_size(space, runner.subject, size_given)
            consumer = Consumer(step_time_s or 0.0, space.batch_sizes[0], runner.subject["length"])
            sweep = Sweep(runner, consumer, budget, tolerance, seed, tell, space=space, cpus=runner.cpus)
            if runner.subject["has_step"] and step_time_s is None:
                answer.step_time_s = measured_step(sweep)
                consumer.step_time_s = answer.step_time_s or 0.0
            if isinstance(runner, RanksRunner):
                answer.ranks = ranks_facts(runner)
                alone = one_rank_alone(runner, sweep)
            sweep.run()
            finish(answer, sweep, tolerance)
    except KeyboardInterrupt:
        answer.interrupted = True
    if sweep is not None:
        conclude(answer, sweep, tolerance)
        say_ranks(answer, sweep, alone)
    if answer.recommendation is None:
        answer.verdict = without_answer(sweep)
    answer.spent_s = budget.spent
    return answer


def ranks_facts(runner: RanksRunner) -> dict[str, Any]:
    """Return how many ranks there are, and what those of this machine share."""
    return {
        "ranks": runner.at_once,
        "on_this_machine": len(runner.neighbours),
        "cpus": runner.cpus_of_all,
    }


def one_rank_alone(runner: RanksRunner, sweep: Sweep) -> Sweep:
    """Return a short sweep of the first rank alone; what it would suggest is tried in all ranks, too."""
    sweep.tell("phase", "trying one rank alone")
    sweep.ranks = len(runner.neighbours)
    alone = Sweep(
        runner.alone, replace(sweep.consumer), Budget(ALONE_SHARE * sweep.budget.total_s), sweep.tolerance,
        sweep.seed, sweep.tell, space=replace(sweep.space, notes=[]),
    )  # fmt: skip
    alone.run()
    if (chosen := alone.recommended()) is not None:
        sweep.also = [chosen.settings]
    return alone


def say_ranks(answer: Profile, sweep: Sweep, alone: Sweep | None) -> None:
    """Write down what all ranks come to together, beside what one alone would have suggested."""
    chosen = sweep.recommended()
    if not answer.ranks or chosen is None:
        return
    suggested = alone.recommended() if alone else None
    told = (suggested.settings, suggested.rate) if suggested else None
    answer.ranks |= of_ranks.figures(sweep.candidates, chosen, answer.ranks["on_this_machine"],
                                     answer.ranks["cpus"], told)  # fmt: skip


def settle_batch_size(space: Space, subject: dict[str, Any], given: bool) -> None:
    """Let the user's loader decide the batch size where nobody else did; 64 otherwise."""
    own = subject["own_settings"]
    if own is not None and (subject["fixed_batches"] or not subject["batches"]):
        space.batch_sizes = [own["batch_size"]]
    elif not given:
        space.batch_sizes = [own["batch_size"] if own else 64]


def measured_step(sweep: Sweep) -> float | None:
    """Return the median time of the user's own step on real batches, or None when it fails (with a note)."""
    sweep.tell("phase", "timing your step")
    settings = Settings(batch_size=sweep.space.batch_sizes[0])
    job = {
        "job": "step",
        "settings": settings.as_dict(),
        "seconds": 0.05 * sweep.budget.total_s,
        "seed": sweep.seed,
    }
    answer = sweep.runner.run(job, max(0.15 * sweep.budget.total_s, 1.0))
    if "infeasible" in answer:
        sweep.space.notes.append(f"your step could not be timed: {answer['infeasible']}")
        return None
    return answer["step_s"]


def finish(answer: Profile, sweep: Sweep, tolerance: float) -> None:
    """Spend the reserve: a paced check of the idle share, lint, an instrumented run of the recommendation."""
    if sweep.fatal is not None:
        return
    if answer.step_time_s:
        sweep.confirm()
    run_lint(answer, sweep)
    chosen = sweep.candidates.recommend(tolerance)
    seconds = min(3.0, 0.4 * (sweep.budget.left - HARD_GRACE_S))
    if chosen is None or seconds < SHORTEST_EXAMINE_S:
        return
    sweep.tell("phase", "taking the recommendation apart, stage by stage")
    job = {"job": "examine", "settings": chosen.settings.as_dict(), "seconds": seconds, "seed": sweep.seed}
    answer.stages = sweep.runner.run(job, sweep.budget.left - HARD_GRACE_S)
    if "infeasible" in answer.stages:
        answer.notes.append(f"the instrumented run failed: {answer.stages['infeasible']}")


def run_lint(answer: Profile, sweep: Sweep) -> None:
    """Look for known traps, for at most a twentieth of the budget."""
    sweep.tell("phase", "looking for known traps")
    limit = min(max(0.05 * sweep.budget.total_s, 1.0), sweep.budget.left - HARD_GRACE_S)
    if limit <= 0:
        answer.notes.append("lint left out: no time left")
        return
    found = sweep.runner.run({"job": "lint", "settings": sweep.base.as_dict(), "seed": sweep.seed}, limit)
    if "findings" in found:
        answer.lint = found["findings"]
    else:
        answer.notes.append(f"lint was not finished: {found['infeasible']}")
    if isinstance(sweep.runner, RanksRunner) and sweep.runner.subject["iterable"]:
        answer.lint += same_stream(sweep.runner, limit)


def same_stream(runner: RanksRunner, limit_s: float) -> list[dict[str, str]]:
    """Return the trap of a stream that does not split itself by rank."""
    firsts = [answer.get("digest") for answer in runner.run_each({"job": "first sample"}, limit_s)]
    if None in firsts or len(set(firsts)) > 1:
        return []
    words = (
        "every rank's stream begins with the same sample: it has to split itself by torch.distributed's rank "
        "and by get_worker_info(), or all ranks train on the same samples"
    )
    return [{"code": "same_stream_on_every_rank", "words": words}]


def conclude(answer: Profile, sweep: Sweep, tolerance: float) -> None:
    """Write down what is known, whenever it ended."""
    answer.trials = sweep.trials
    answer.costs = asdict(sweep.costs)
    answer.foreseen = sweep.foreseen
    answer.notes += sweep.space.notes
    untried = [s for s in dict.fromkeys(sweep.not_tried) if s not in sweep.candidates.by_settings]
    answer.not_tried = [
        {"label": s.label(), "settings": s.as_dict(), "predicted_samples_per_s": sweep.model.rate(s)}
        for s in untried
    ]
    for index, words in sweep.costs.failures:
        answer.notes.append(words if index < 0 else f"dataset[{index}]: {words}")
    advise(answer, sweep.candidates, tolerance)
    doubt_for_lack_of_time(answer, sweep)
    if answer.idle_measured is not None and abs(answer.idle_measured - (answer.idle_from_rate or 0)) > 0.05:
        answer.notes.append(
            f"idle from the drained rate and as measured differ ({answer.idle_from_rate or 0:.0%}, "
            f"{answer.idle_measured:.0%}): loader and consumer disturb each other, or the machine is busy"
        )


def without_answer(sweep: Sweep | None) -> str:
    """Return the first line where nothing can be recommended."""
    fatal, trials = (sweep.fatal, sweep.trials) if sweep else (None, [])
    why = fatal or next((t.infeasible for t in reversed(trials) if t.infeasible), None)
    return f"Infeasible: {why}" if why else "No answer: interrupted before the first trial ended."


def doubt_for_lack_of_time(answer: Profile, sweep: Sweep) -> None:
    """Take confidence back where a configuration that had too little time is predicted to be better."""
    untried = [Settings(**row["settings"]) for row in answer.not_tried]
    untried += [s for s in sweep.cut_short if not sweep.candidates.by_settings[s].feasible]
    if answer.recommended is None or not untried:
        return

    def worth(settings: Settings) -> float:
        return sweep.consumer.value(settings, sweep.model.rate(settings))

    best = max(untried, key=worth)
    gain = worth(best) / worth(answer.recommended)
    if gain > 1 + CONFIDENCE_MARGIN:
        answer.confidence = min(answer.confidence or 0.0, UNTRIED_CONFIDENCE)
        answer.confidence_words = (
            f"unsure: no time to try {best.label()}, predicted {gain:.2f} times as fast; give a larger budget"
        )


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    return {
        "usable_cpus": limits.usable_cpus(),
        "cgroup_quota": processors.quota(),
        "cpu_count": os.cpu_count(),
        "shared_memory_free_bytes": limits.shared_memory_free(),
        "descriptor_limit": limits.descriptor_limit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
