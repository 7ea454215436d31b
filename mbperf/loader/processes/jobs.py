"""The jobs that run inside a trial's own process: timing a loader, probing costs, an instrumented run, lint.

A job gets the Subject and plain arguments, and returns plain values; an alarm ends it with what it has.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from mbperf.loader.processes import causes, stacks
from mbperf.loader.settings import Settings
from mbperf.loader.subject import Subject
from mbperf.loader.trial.gate import Gate
from mbperf.loader.trial.lint import digest, lint_subject
from mbperf.loader.trial.memory import Footprint, fill_heap, footprint
from mbperf.loader.trial.probe import probe
from mbperf.loader.trial.stages import read_journals, summarise_stages, timed_hooks
from mbperf.loader.trial.time_loader import TrialInterrupted, time_loader

STACKS_S = 0.5  # for workers to answer; the runner ends a job by force a second after its alarm
# The traceback of an interrupted trial holds a loader's iterator, whose collection waits 5 s for workers that
# hang. It is kept alive: this process ends without collecting anything, as soon as its answer is sent.
_unfinished: list[TrialInterrupted] = []


@contextlib.contextmanager
def alarm(seconds: float, folder: str) -> Iterator[None]:
    """Raise TrialInterrupted in the main thread after `seconds`; workers say first where they are."""

    def ring(number: int, frame: object) -> None:
        workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]
        stacks.ask(folder, workers, STACKS_S)
        raise TrialInterrupted(f"no answer within {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seed_everything(seed: int) -> None:
    """Seed what samplers and datasets draw from, so that a failing batch can be found again."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def run_trial(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Time one configuration; see `time_loader` for what the figures mean."""
    settings = Settings(**job["settings"])
    if job.get("fill_heap"):
        fill_heap()
    seed_everything(job["seed"])
    state = torch.get_rng_state()
    loader = subject.make(settings)
    footprints: list[Footprint] = []
    parent = None if job.get("inline") else os.getppid()

    def while_alive(batches: Iterator) -> None:
        footprints.append(footprint(parent))
        gate.load_on(loader, batches)

    try:
        with Gate(job.get("gate"), subject.shard.ranks) as gate:
            gate.arrive()
            timing = time_loader(
                loader,
                job["seconds"],
                step_time_s=job.get("step_time_s", 0.0),
                step=subject.step if job.get("own_step") else None,
                max_batches=job.get("max_batches"),
                later_epoch=job.get("later_epoch", False),
                while_alive=while_alive,
            )
    except TrialInterrupted:
        raise
    except Exception as error:
        cause, words = causes.of_exception(error)
        found = None
        if cause == "exception":
            found = failing_index(subject, settings, job["seed"], state)
        return {"infeasible": found or words, "cause": cause}
    figures = asdict(timing)
    figures["memory"] = asdict(footprints[0]) if footprints else None
    return figures


def failing_index(subject: Subject, settings: Settings, seed: int, state: torch.Tensor) -> str | None:
    """Return which index raises, by reading the same samples in the same order in this process."""
    if subject.iterable:
        return _failing_position(subject)
    torch.set_rng_state(state)
    plain = subject.make(Settings(batch_size=settings.batch_size, collate=settings.collate))
    torch.empty(
        (), dtype=torch.int64
    ).random_()  # the loader's iterator draws its base seed before the sampler
    for batch in plain._index_sampler:
        for index in batch if isinstance(batch, (list, tuple)) else [batch]:
            try:
                subject.dataset[index]
            except Exception as error:
                return f"dataset[{index}] raises {type(error).__name__}: {error}"
    return None


def _failing_position(subject: Subject) -> str | None:
    position = 0
    try:
        for _ in subject.dataset:
            position += 1
    except Exception as error:
        return f"sample {position} of the iteration raises {type(error).__name__}: {error}"
    return None


def run_probe(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Measure single-process costs."""
    return asdict(probe(subject, Settings(**job["settings"]), job["seconds"], job["seed"], job["scratch"]))


def run_examine(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Run one configuration with hooks: stages, busy share, memory over time, the first batch taken apart."""
    settings = Settings(**job["settings"])
    seed_everything(job["seed"])
    checkpoints: list[tuple[int, Footprint]] = []
    parent = None if job.get("inline") else os.getppid()
    with tempfile.TemporaryDirectory(prefix="mbperf-journals-") as folder:
        loader = subject.make(settings, timed_hooks(folder))
        pickling = _pickling(loader, settings)
        begin = time.monotonic()
        arrivals = _watched(loader, job["seconds"], settings.batch_size or 1, checkpoints, parent)
        summary = summarise_stages(read_journals(folder), settings.num_workers, begin, arrivals)
    return summary | pickling | _memory_figures(checkpoints)


def _memory_figures(checkpoints: list[tuple[int, Footprint]]) -> dict[str, Any]:
    """Return the last footprint, and the slope of PSS (least squares, bytes per 1,000 samples)."""
    if not checkpoints:
        return {"memory": None, "memory_slope_bytes_per_1000": None}
    settled = checkpoints[len(checkpoints) // 3 :]  # queues and buffers fill in the beginning
    samples = [count for count, _ in settled]
    slope = None
    if len(set(samples)) >= 4:
        slope = 1000 * statistics.linear_regression(samples, [at.pss_bytes for _, at in settled]).slope
    return {"memory": asdict(checkpoints[-1][1]), "memory_slope_bytes_per_1000": slope}


def _watched(
    loader: DataLoader,
    seconds: float,
    size: int,
    checkpoints: list[tuple[int, Footprint]],
    parent: int | None,
) -> list[tuple[float, float]]:
    """Drain the loader; note (asked, arrived) for every batch, (samples so far, footprint) nine times.

    The first is taken at once: a short epoch ends, and its workers with it, before an eighth of the time.
    """
    arrivals = []
    begin = due = time.monotonic()
    batches = iter(loader)
    while time.monotonic() - begin < seconds:
        asked = time.monotonic()
        if next(batches, None) is None:
            break
        now = time.monotonic()
        arrivals.append((asked, now))
        if now > due:
            checkpoints.append((len(arrivals) * size, footprint(parent)))
            due += seconds / 8
    return arrivals


def _pickling(loader: DataLoader, settings: Settings) -> dict[str, float | None]:
    """Time what spawn and forkserver do with the dataset for every worker; under fork nothing is pickled."""
    method = settings.multiprocessing_context or torch.multiprocessing.get_start_method()
    if not settings.num_workers or method == "fork":
        return {"pickle_s": None, "pickle_bytes": None}
    begin = time.perf_counter()
    size = len(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    return {"pickle_s": time.perf_counter() - begin, "pickle_bytes": size}


def run_step(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Return the median time of the user's own step, after three steps of warm-up."""
    assert subject.step is not None
    seed_everything(job["seed"])
    loader = subject.make(Settings(**job["settings"]))
    times: list[float] = []
    began = time.monotonic()
    while time.monotonic() - began < job["seconds"] or len(times) < 4:
        for batch in loader:
            begin = time.perf_counter()
            subject.step(batch)
            times.append(time.perf_counter() - begin)
            if time.monotonic() - began > job["seconds"] and len(times) >= 4:
                break
    return {"step_s": statistics.median(times[3:])}


def run_first_sample(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Return a digest of the first sample of a stream, by which ranks tell whether they read the same."""
    return {"digest": digest(next(iter(subject.dataset), None))}


def run_lint(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Look for the known traps."""
    return {"findings": lint_subject(subject, Settings(**job["settings"]))}


JOBS: dict[str, Callable[[Subject, dict[str, Any]], dict[str, Any]]] = {
    "trial": run_trial,
    "probe": run_probe,
    "examine": run_examine,
    "first sample": run_first_sample,
    "lint": run_lint,
    "step": run_step,
}


def run_job(subject: Subject, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job and return its answer; whatever goes wrong becomes an answer too."""
    stacks.listen(job["folder"])
    try:
        with alarm(job["soft_limit_s"], job["folder"]):
            return JOBS[job["job"]](subject, job)
    except TrialInterrupted as error:
        _unfinished.append(error)
        return {"infeasible": timeout_words(error, job["folder"]), "cause": "timeout"}
    except Exception as error:
        cause, words = causes.of_exception(error)
        return {"infeasible": words, "cause": cause if cause != "exception" else "setup"}


def timeout_words(error: TrialInterrupted, folder: str) -> str:
    """Return how long nothing came, and where in the user's code a worker, or this process, stood."""
    here = stacks.where_raised(error.__traceback__)
    where = stacks.where(folder) or (f"it was at {here}" if here else None)
    return f"{error}; {where}" if where else str(error)
