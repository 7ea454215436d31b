"""From trials to an answer: verdict in words, recommendation and confidence, what made no difference."""

import math
from typing import Any

from mbperf.loader.output.units import duration, si
from mbperf.loader.records import Profile
from mbperf.loader.search.candidates import Candidate, Candidates
from mbperf.loader.settings import Settings, changed_knobs

CONFIDENCE_MARGIN = 0.05  # "sure" means: truly within this of the best that was tried
IDLE_THRESHOLD = 0.05  # a consumer that waits less than this is bound by its own step
START_UP_SHARE = 0.5


def advise(profile: Profile, candidates: Candidates, tolerance: float) -> None:
    """Fill in the answer of a profile from what was tried."""
    chosen = candidates.recommend(tolerance)
    if chosen is None:
        return
    settings = candidates.with_persistence(chosen, tolerance)
    profile.recommended = settings
    profile.recommendation = settings.keywords()
    if settings.collate == "mbperf":
        profile.recommendation["collate_fn"] = "mbperf.collate"
    if profile.subject.get("fixed_batches"):
        del profile.recommendation["batch_size"]  # DataLoader takes it or a batch sampler, never both
    profile.call = settings.call(
        profile.subject.get("fixed_words", ()), profile.subject.get("loader_class") or "DataLoader"
    )
    shown = candidates.shown_for(chosen, tolerance)
    say_figures(profile, candidates, shown)
    profile.confidence = candidates.confidence(chosen, CONFIDENCE_MARGIN, profile.seed)
    profile.knobs = knob_effects(candidates, chosen, tolerance)
    profile.indistinguishable = indistinguishable(candidates, chosen)
    profile.confidence_words = confidence_words(profile, candidates)
    profile.configurations = [row(candidates, c, shown) for c in candidates.feasible()]
    mark_pareto(profile.configurations)
    profile.bound = bound(profile, candidates, chosen)
    profile.verdict = verdict(profile, settings, workers_hurt(candidates))
    profile.notes += unproven(candidates, chosen, settings, tolerance)


def say_figures(profile: Profile, candidates: Candidates, candidate: Candidate) -> None:
    """Fill in what was measured of the recommendation."""
    profile.rate_samples_per_s = candidate.rate
    profile.rate_interval = candidates.interval(candidate)
    samples = candidates.consumer.samples or math.inf  # a dataset shorter than a batch makes shorter batches
    profile.rate_batches_per_s = candidate.rate / min(candidate.settings.batch_size or 1, samples)
    profile.break_even_step_s = 1 / profile.rate_batches_per_s if candidate.settings.num_workers else None
    profile.first_batch_s = candidate.first_batch_s
    profile.later_first_batch_s = candidate.later_first_batch_s
    if profile.step_time_s is not None:
        profile.idle_from_rate = candidates.consumer.idle(candidate.settings, candidate.rate)
        profile.idle_measured = candidate.idle_measured
        profile.idle_fraction = candidates.expected_idle(candidate)
        profile.idle_interval = candidates.idle_interval(candidate)


def bound(profile: Profile, candidates: Candidates, chosen: Candidate) -> str:
    """Return what limits the recommendation: "loader", "compute", "start-up" or "step-dependent"."""
    samples = candidates.consumer.samples
    if samples and candidates.start_up_s(chosen) > START_UP_SHARE * samples / candidates.value(chosen):
        return "start-up"
    if profile.idle_fraction is None:
        return "step-dependent"
    return "loader" if profile.idle_fraction > IDLE_THRESHOLD else "compute"


def workers_hurt(candidates: Candidates) -> bool:
    """Tell whether each number of workers tried is slower than none, all other knobs alike."""
    pairs = [
        (some, none)
        for none in candidates.feasible()
        for some in candidates.feasible()
        if none.settings.num_workers == 0 and changed_knobs(some.settings, none.settings) == ["num_workers"]
    ]
    return bool(pairs) and all(candidates.ratio(*pair)[2] < 1 for pair in pairs)


def verdict(profile: Profile, settings: Settings, hurt: bool) -> str:
    """Return the first line of the answer."""
    rate = f"{si(profile.rate_samples_per_s or 0)} samples/s"
    workers = f"num_workers={settings.num_workers}{' in each rank' if profile.ranks else ''}"
    if profile.bound == "start-up":
        return (
            f"Start-up-bound: starting workers takes longer than loading the epoch ({rate} with {workers})."
        )
    if profile.bound == "step-dependent":
        period = 1 / max(profile.rate_batches_per_s or 0, 1e-12)
        if settings.num_workers:
            return (
                f"Loader-bound for steps shorter than {duration(period)} per batch, compute-bound for longer "
                f"ones ({rate} with {workers})."
            )
        # Loading and step follow each other: the idle share is period / (period + step).
        longest = period / IDLE_THRESHOLD - period
        others = "workers are slower" if hurt else "--step-time tells if workers would hide that"
        return (
            f"Loader-bound for steps shorter than {duration(longest)} per batch, compute-bound for longer "
            f"ones: {workers} adds {duration(period)} to each ({rate}); {others}."
        )
    idle = idle_words(profile)
    step = duration(profile.step_time_s or 0.0)
    if profile.bound == "loader":
        return f"Loader-bound: at {step} per step the consumer idles {idle} even with {workers} ({rate})."
    return f"Compute-bound: at {step} per step the consumer idles {idle} with {workers} ({rate})."


def idle_words(profile: Profile) -> str:
    """Return the idle share with its interval: `45 % (41 to 49)`."""
    low, high = profile.idle_interval or (0.0, 0.0)
    return f"{100 * (profile.idle_fraction or 0.0):.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def confidence_words(profile: Profile, candidates: Candidates) -> str:
    """Return how sure the recommendation is, and what could not be told apart."""
    share = f"{100 * (profile.confidence or 0):.0f} %"
    share = "over 99 %" if share == "100 %" else share
    sure = f"{share} sure to be within {100 * CONFIDENCE_MARGIN:.0f} % of the best"
    count = len(candidates.by_settings)
    tried = f"of {count} configurations tried" if count > 1 else "of the one configuration tried"
    if not profile.indistinguishable:
        return f"{sure} {tried}"
    return f"{sure} {tried}; cannot distinguish it from {' / '.join(profile.indistinguishable)}"


def indistinguishable(candidates: Candidates, chosen: Candidate) -> list[str]:
    """Return other worker counts (same knobs) whose interval against the chosen one contains 1."""
    found = set()
    for candidate in candidates.feasible():
        if candidate is chosen or changed_knobs(candidate.settings, chosen.settings) != ["num_workers"]:
            continue
        _, low, high = candidates.ratio(candidate, chosen)
        if low <= 1 <= high:
            found.add(candidate.settings.num_workers)
    return [f"{count} workers" for count in sorted(found)]


def unproven(candidates: Candidates, chosen: Candidate, settings: Settings, tolerance: float) -> list[str]:
    """Return a note where the best loses order or keeps workers alive, and was not shown to be worth that."""
    best = candidates.feasible()[0]
    gain = candidates.value(best) / candidates.value(chosen)
    known = best.settings == settings or candidates.is_worth_noticing(best, tolerance)
    if known or gain * (1 - tolerance) <= 1:
        return []
    trials = "1 trial" if len(best.deciding) == 1 else f"{len(best.deciding)} trials"
    return [
        f"{best.settings.label()} looked {gain:.2f} times as fast in {trials}; what it changes for you needs "
        "a gain that repeated trials show, for which a larger budget has time"
    ]


def knob_effects(candidates: Candidates, chosen: Candidate, tolerance: float) -> list[dict[str, Any]]:
    """Compare the recommendation with each configuration that differs in one knob only."""
    effects = []
    for candidate in candidates.feasible():
        changed = changed_knobs(candidate.settings, chosen.settings)
        if len(changed) != 1 or candidate is chosen:
            continue
        ratio, low, high = candidates.ratio(candidate, chosen)
        effects.append(
            {
                "knob": changed[0],
                "value": getattr(candidate.settings, changed[0]),
                "chosen": getattr(chosen.settings, changed[0]),
                "ratio": ratio,
                "interval": (low, high),
                "words": effect_words(low, high, tolerance),
            }
        )
    return sorted(effects, key=lambda effect: (effect["knob"], str(effect["value"])))


def effect_words(low: float, high: float, tolerance: float) -> str:
    """Return the verdict on a ratio's interval."""
    if low > 1:
        return "faster"
    if high < 1:
        return "slower"
    return "no difference" if low > 1 - 2 * tolerance and high < 1 + 2 * tolerance else "cannot tell"


def row(candidates: Candidates, candidate: Candidate, chosen: Candidate) -> dict[str, Any]:
    """Return one line of the table of configurations."""
    low, high = candidates.interval(candidate)
    settings = candidate.settings
    paced = candidates.consumer.step_time_s > 0
    return {
        "settings": settings.as_dict(),
        "label": settings.label(),
        "recommended": candidate is chosen,
        "trials": len(candidate.trials),
        "rate_samples_per_s": candidate.rate,
        "rate_interval": (low, high),
        "value_samples_per_s": candidates.value(candidate),
        "idle_fraction": candidates.expected_idle(candidate) if paced else None,
        "idle_interval": candidates.idle_interval(candidate) if paced else None,
        "paced_trials": len(candidate.seen),
        "first_batch_s": candidate.first_batch_s,
        "later_first_batch_s": candidate.later_first_batch_s,
        "memory_bytes": candidate.memory_bytes,
        "wait_p50_s": candidate.trials[-1].wait_p50_s,
        "wait_p95_s": candidate.trials[-1].wait_p95_s,
        "wait_p99_s": candidate.trials[-1].wait_p99_s,
    }


def mark_pareto(rows: list[dict[str, Any]]) -> None:
    """Mark the rows that no other beats in value, workers and memory at once."""

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        pairs = [
            (a["value_samples_per_s"], b["value_samples_per_s"]),
            (-a["settings"]["num_workers"], -b["settings"]["num_workers"]),
            (-(a["memory_bytes"] or 0), -(b["memory_bytes"] or 0)),
        ]
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    for line in rows:
        line["pareto"] = not any(beats(other, line) for other in rows)
