"""Configurations that are worth a trial: the grid, what is left out and why, single-knob variants."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mbperf.loader.search.model import Consumer, Model
from mbperf.loader.settings import Settings

# A getitem that waits (for a disk, a network) for more than this share of its time profits from many workers.
WAITING_SHARE = 0.5


@dataclass
class Space:
    """The values each knob may take. None: the profiler chooses."""

    workers: Sequence[int] | None = None
    batch_sizes: Sequence[int | None] = (64,)
    prefetch: Sequence[int] = (2, 4)
    pin_memory: Sequence[bool] | None = None
    contexts: Sequence[str | None] = (None,)
    in_order: Sequence[bool] = (True, False)
    collates: Sequence[str] | None = None
    notes: list[str] = field(default_factory=list)

    def worker_counts(self, cpus: float, waiting_share: float) -> list[int]:
        """Return the worker counts: up to twice the processors, four times for datasets that wait."""
        if self.workers is not None:
            return sorted(set(self.workers))
        most = max(8, int(4 * cpus)) if waiting_share > WAITING_SHARE else max(4, int(2 * cpus))
        steps = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
        return [count for count in steps if count <= most]

    def base(self, own: Settings | None, user_collate: bool) -> Settings:
        """Return the configuration that variants depart from: the user's loader, or DataLoader's defaults."""
        if own is not None:
            return replace(own, batch_size=own.batch_size if own.batch_size is None else self.batch_sizes[0])
        return Settings(batch_size=self.batch_sizes[0], collate="user" if user_collate else "torch")


def loaders_of(
    base: Settings, subject: dict[str, Any], model: Model, space: Space, agrees: bool
) -> list[Settings]:
    """Return the ways of making a batch: the user's own, `mbperf.collate`, `mbperf.TensorDataset`.

    Notes on what is left out go into `space.notes`.
    """
    found = [base]
    errors = model.costs.collate_error
    wanted = space.collates
    mbperfs = wanted is None or "mbperf" in wanted
    if (
        wanted is not None
        and "torch" in wanted
        and base.collate == "user"
        and "torch" in model.costs.collate_s
    ):
        found.append(replace(base, collate="torch"))
    if subject["batches"] and mbperfs:
        if "mbperf" in errors:
            space.notes.append(f"mbperf.collate left out: {errors['mbperf']}")
        elif "mbperf" in model.costs.collate_s and not agrees:
            space.notes.append("mbperf.collate left out: your collate_fn makes another batch than it would")
        elif "mbperf" in model.costs.collate_s:
            found.append(replace(base, collate="mbperf"))
    if mbperfs and subject["tensor_dataset"] and subject["loader_class"] in (None, "DataLoader"):
        if "mbperf.TensorDataset" in errors:
            space.notes.append(f"mbperf.TensorDataset left out: {errors['mbperf.TensorDataset']}")
        elif not subject["user_collate"]:
            collate = "mbperf" if any(s.collate == "mbperf" for s in found) else base.collate
            found.append(replace(base, dataset="mbperf.TensorDataset", collate=collate))
    return found


def grid(loaders: list[Settings], workers: list[int], batch_sizes: Sequence[int | None]) -> list[Settings]:
    """Return every combination of loader, batch size and worker count."""
    return [
        replace(loader, batch_size=size).with_workers(count)
        for loader in loaders
        for size in batch_sizes
        for count in workers
    ]


def variants(leader: Settings, space: Space, accelerator: bool) -> list[Settings]:
    """Return the leader with one knob changed at a time."""
    changed = []
    pins = space.pin_memory if space.pin_memory is not None else ((False, True) if accelerator else (False,))
    changed += [replace(leader, pin_memory=pin) for pin in pins]
    if leader.num_workers:
        changed += [replace(leader, prefetch_factor=factor) for factor in space.prefetch]
        changed += [replace(leader, in_order=order) for order in space.in_order]
        changed += [replace(leader, multiprocessing_context=context) for context in space.contexts]
        changed.append(replace(leader, persistent_workers=True))
    return [settings for settings in dict.fromkeys(changed) if settings != leader]


def near_the_optimum(
    configurations: list[Settings], model: Model, consumer: Consumer, keep: float, explicit: bool
) -> list[Settings]:
    """Return what to try: those predicted at `keep` of the best or more, nearest the optimum first.

    The optimum has the fewest workers within 3 % of the best prediction; distance is in steps of the worker
    grid. Where the user named the workers, all are tried, and the model only decides their order.
    """
    predicted = {s: consumer.value(s, model.rate(s)) for s in configurations}
    best = max(predicted.values())
    counts = sorted({s.num_workers for s in configurations})
    optimum = min((s for s in configurations if predicted[s] >= 0.97 * best), key=lambda s: s.num_workers)
    middle = counts.index(optimum.num_workers)

    def distance(settings: Settings) -> tuple[int, float]:
        return abs(counts.index(settings.num_workers) - middle), -predicted[settings]

    chosen = [s for s in configurations if explicit or predicted[s] >= keep * best]
    return sorted(chosen, key=distance)
