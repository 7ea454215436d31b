"""What several ranks on one machine come to together, and what one alone would have led to believe."""

import statistics
from typing import Any

from mbperf.loader.output.units import si
from mbperf.loader.search.candidates import Candidate, Candidates
from mbperf.loader.settings import Settings


def figures(
    candidates: Candidates,
    chosen: Candidate,
    neighbours: int,
    cpus: float,
    alone: tuple[Settings, float] | None,
) -> dict[str, Any]:
    """Return what all ranks come to together.

    Args:
        candidates: what was tried in all ranks at once.
        chosen: what is recommended to each.
        neighbours: ranks on this machine.
        cpus: processors that those share.
        alone: what a profile of one rank alone recommends, and the rate it has alone, in samples/s.

    Returns:
        Workers of this machine; rates in samples/s of each rank, of the slowest and of all; `alone`.
    """
    each = [statistics.fmean(rates) for rates in zip(*(t.rank_rates for t in chosen.trials), strict=True)]
    workers = chosen.settings.num_workers * neighbours
    return {
        "workers_on_this_machine": workers,
        "more_workers_than_cpus": workers > cpus,
        "rates_samples_per_s": each,
        "slowest_samples_per_s": min(each, default=None),
        "total_samples_per_s": sum(each),
        "alone": None if alone is None else beside(candidates, chosen, *alone),
    }


def beside(candidates: Candidates, chosen: Candidate, settings: Settings, rate: float) -> dict[str, Any]:
    """Return what one rank alone would have been recommended, and what that is worth in all ranks."""
    tried = candidates.by_settings.get(settings)
    ratio = interval = infeasible = None
    if tried is not None and tried.feasible:
        ratio, *interval = candidates.ratio(tried, chosen)
    elif tried is not None:
        infeasible = next((t.infeasible for t in tried.trials if t.infeasible), None)
    return {
        "settings": settings.as_dict(),
        "label": settings.label(),
        "rate_samples_per_s": rate,
        "same": settings == chosen.settings,
        "ratio": ratio,
        "interval": interval,
        "infeasible": infeasible,
    }


def words(record: dict[str, Any]) -> list[str]:
    """Return the sentences about all ranks."""
    slowest, total = si(record["slowest_samples_per_s"] or 0.0), si(record["total_samples_per_s"])
    each = record["workers_on_this_machine"] // record["on_this_machine"]
    found = [
        f"{record['ranks']} ranks at once: the slowest {slowest} samples/s, together {total}; "
        f"{in_all(each, record)}."
    ]
    return found if record["alone"] is None else [*found, alone_words(record, record["alone"])]


def in_all(workers: int, record: dict[str, Any]) -> str:
    """Return how many workers the ranks of this machine start, and whether it has so many processors."""
    neighbours, cpus = record["on_this_machine"], record["cpus"]
    count = workers * neighbours
    than = f", more than the {cpus:g} processors" if count > cpus else f" on {cpus:g} processors"
    return f"{workers} worker{'' if workers == 1 else 's'} x {neighbours} ranks = {count}{than}"


def alone_words(record: dict[str, Any], alone: dict[str, Any]) -> str:
    """Return what one rank alone would have suggested, and what following it would have cost."""
    if alone["same"]:
        return "One rank alone would have suggested the same."
    rate = si(alone["rate_samples_per_s"])
    said = f"One rank alone would have suggested {alone['label']} ({rate} samples/s)"
    many = in_all(alone["settings"]["num_workers"], record)
    if alone["infeasible"]:
        return f"{said}: {many}, which cannot run: {alone['infeasible']}."
    if alone["ratio"] is None:
        return f"{said}: {many}; there was no time to try that in all ranks."
    low, high = alone["interval"]
    return f"{said}: {many}; that gives {alone['ratio']:.2f} times this rate ({low:.2f} to {high:.2f})."
