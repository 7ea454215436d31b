"""From journals to answers: time per stage, slowest samples, busy share, the first batch's parts."""

import statistics
from typing import Any

from mbperf.loader.stages import SLOWEST, Record, Stages


def summarise_stages(
    journals: dict[str, Stages], num_workers: int, begin: float, arrivals: list[tuple[float, float]]
) -> dict[str, Any]:
    """Return the figures of an instrumented run.

    Args:
        journals: records per process, from `read_journals`.
        num_workers: of the configuration.
        begin: when the loader was first asked for its iterator (monotonic s).
        arrivals: (asked, arrived) of each batch at the consumer.

    Returns:
        Plain values: seconds per sample (getitem) and per batch (collate, transfer), shares between 0 and 1.
    """
    end = arrivals[-1][1] if arrivals else begin
    workers = {name: stages for name, stages in journals.items() if name.startswith("worker-")}
    every = list(journals.values())
    return {
        "batches": len(arrivals),
        "getitem_s": _per_sample([record for stages in every for record in stages.fetches]),
        "collate_s": _mean([record.seconds for stages in every for record in stages.collates]),
        "transfer_s": _transfer(workers, num_workers, arrivals),
        "slowest": _slowest(every),
        "busy_share": {name: _busy(stages, begin, end) for name, stages in sorted(workers.items())},
        "imbalance": _imbalance(workers),
    } | _first_batch(journals, num_workers, begin, arrivals)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _per_sample(fetches: list[Record]) -> float | None:
    samples = sum(record.count for record in fetches)
    return sum(record.seconds for record in fetches) / samples if samples else None


def _slowest(every: list[Stages]) -> list[tuple[int, float]]:
    seen: dict[int, float] = {}
    for stages in every:
        for record in stages.slow:
            seen[record.count] = max(seen.get(record.count, 0.0), record.seconds)
    return sorted(seen.items(), key=lambda pair: -pair[1])[:SLOWEST]


def _busy(stages: Stages, begin: float, end: float) -> float:
    """Share of a worker's life, from ready to the last arrival, spent fetching and collating."""
    ready = stages.starts[0].begin if stages.starts else begin
    worked = sum(
        max(0.0, min(r.end, end) - r.begin) for r in [*stages.fetches, *stages.collates] if r.begin < end
    )
    return min(1.0, worked / (end - ready)) if end > ready else 0.0


def _imbalance(workers: dict[str, Stages]) -> float | None:
    """Busiest worker's working time over the mean, less 1: 0 is perfectly even."""
    worked = [sum(r.seconds for r in [*stages.fetches, *stages.collates]) for stages in workers.values()]
    mean = statistics.fmean(worked) if worked else 0.0
    return max(worked) / mean - 1 if mean > 0 else None


def _transfer(
    workers: dict[str, Stages], num_workers: int, arrivals: list[tuple[float, float]]
) -> float | None:
    """Median time from collated (in the worker) to handed over, of batches the consumer was waiting for.

    Batches come from the workers in turn, so batch k is the (k // workers)-th of worker k % workers.
    """
    delays = []
    for k, (asked, arrived) in enumerate(arrivals):
        stages = workers.get(f"worker-{k % num_workers}") if num_workers else None
        if stages is None or k // num_workers >= len(stages.collates):
            continue
        collated = stages.collates[k // num_workers].end
        if asked <= collated <= arrived:
            delays.append(arrived - collated)
    return statistics.median(delays) if delays else None


def _first_batch(
    journals: dict[str, Stages], num_workers: int, begin: float, arrivals: list[tuple[float, float]]
) -> dict[str, Any]:
    """Split the time to the first batch: start of its worker, fetch and collate, the rest."""
    if not arrivals:
        return {"first_batch": None}
    maker = journals.get("worker-0" if num_workers else "main", Stages())
    first = arrivals[0][1] - begin
    started = maker.starts[0].begin - begin if maker.starts else 0.0
    made = maker.collates[0].end if maker.collates else None
    every_start = [s.starts[0].begin - begin for s in journals.values() if s.starts]
    return {
        "first_batch": {
            "total_s": first,
            "start_worker_s": started,
            "start_all_workers_s": max(every_start, default=0.0),
            "fetch_and_collate_s": made - begin - started if made is not None else None,
            "hand_over_s": arrivals[0][1] - made if made is not None else None,
        }
    }
