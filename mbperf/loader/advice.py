"""From trials to an answer: verdict in words, recommendation and confidence, what made no difference."""

import math
from typing import Any

from mbperf.loader.arm import Arm
from mbperf.loader.arms import Arms
from mbperf.loader.records import Profile
from mbperf.loader.settings import Settings

CONFIDENCE_MARGIN = 0.05  # "sure" means: truly within this of the best that was tried
IDLE_THRESHOLD = 0.05  # a consumer that waits less than this is bound by its own step
START_UP_SHARE = 0.5
KNOBS = ("num_workers", "batch_size", "prefetch_factor", "pin_memory", "multiprocessing_context", "in_order",
         "persistent_workers", "collate", "dataset")  # fmt: skip


def advise(profile: Profile, arms: Arms, tolerance: float) -> None:
    """Fill in the answer of a profile from what was tried."""
    chosen = arms.recommend(tolerance)
    if chosen is None:
        return
    settings = arms.with_persistence(chosen)
    profile.recommended = settings
    profile.recommendation = settings.keywords()
    if settings.collate == "mbperf":
        profile.recommendation["collate_fn"] = "mbperf.collate"
    if profile.subject.get("fixed_batches"):
        del profile.recommendation["batch_size"]  # DataLoader takes it or a batch sampler, never both
    profile.call = settings.call(
        profile.subject.get("fixed_words", ()), profile.subject.get("loader_class") or "DataLoader"
    )
    shown = arms.shown_for(chosen)
    say_figures(profile, arms, shown)
    profile.confidence = arms.confidence(chosen, CONFIDENCE_MARGIN, profile.seed)
    profile.knobs = knob_effects(arms, chosen, tolerance)
    profile.indistinguishable = indistinguishable(arms, chosen)
    profile.confidence_words = confidence_words(profile, arms)
    profile.configurations = [row(arms, arm, shown) for arm in arms.feasible()]
    mark_pareto(profile.configurations)
    profile.bound = bound(profile, arms, chosen)
    profile.verdict = verdict(profile, settings, workers_hurt(arms))


def say_figures(profile: Profile, arms: Arms, arm: Arm) -> None:
    """Fill in what was measured of the recommendation."""
    profile.rate_samples_per_s = arm.rate
    profile.rate_interval = arms.interval(arm)
    samples = arms.consumer.samples or math.inf  # a dataset shorter than a batch makes shorter batches
    profile.rate_batches_per_s = arm.rate / min(arm.settings.batch_size or 1, samples)
    profile.break_even_step_s = 1 / profile.rate_batches_per_s if arm.settings.num_workers else None
    profile.first_batch_s = arm.first_batch_s
    profile.later_first_batch_s = arm.later_first_batch_s
    if profile.step_time_s is not None:
        profile.idle_from_rate = arms.consumer.idle(arm.settings, arm.rate)
        profile.idle_measured = arm.idle_measured
        profile.idle_fraction = arms.expected_idle(arm)
        profile.idle_interval = arms.idle_interval(arm)


def bound(profile: Profile, arms: Arms, chosen: Arm) -> str:
    """Return what limits the recommendation: "loader", "compute", "start-up" or "step-dependent"."""
    samples = arms.consumer.samples
    if samples and arms.start_up_s(chosen) > START_UP_SHARE * samples / arms.value(chosen):
        return "start-up"
    if profile.idle_fraction is None:
        return "step-dependent"
    return "loader" if profile.idle_fraction > IDLE_THRESHOLD else "compute"


def workers_hurt(arms: Arms) -> bool:
    """Tell whether each number of workers tried is slower than none, all other knobs alike."""
    pairs = [
        (arm, none)
        for none in arms.feasible()
        for arm in arms.feasible()
        if none.settings.num_workers == 0 and changed_knobs(arm.settings, none.settings) == ["num_workers"]
    ]
    return bool(pairs) and all(arms.ratio(*pair)[2] < 1 for pair in pairs)


def verdict(profile: Profile, settings: Settings, hurt: bool) -> str:
    """Return the first line of the answer."""
    rate = f"{si(profile.rate_samples_per_s or 0)} samples/s"
    workers = f"num_workers={settings.num_workers}"
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


def confidence_words(profile: Profile, arms: Arms) -> str:
    """Return how sure the recommendation is, and what could not be told apart."""
    share = f"{100 * (profile.confidence or 0):.0f} %"
    share = "over 99 %" if share == "100 %" else share
    sure = f"{share} sure to be within {100 * CONFIDENCE_MARGIN:.0f} % of the best"
    count = len(arms.by_settings)
    tried = f"of {count} configurations tried" if count > 1 else "of the one configuration tried"
    if not profile.indistinguishable:
        return f"{sure} {tried}"
    return f"{sure} {tried}; cannot distinguish it from {' / '.join(profile.indistinguishable)}"


def indistinguishable(arms: Arms, chosen: Arm) -> list[str]:
    """Return other worker counts (same knobs) whose interval against the chosen one contains 1."""
    found = []
    for arm in arms.feasible():
        if arm is chosen or changed_knobs(arm.settings, chosen.settings) != ["num_workers"]:
            continue
        _, low, high = arms.ratio(arm, chosen)
        if low <= 1 <= high:
            found.append((arm.settings.num_workers, f"{arm.settings.num_workers} workers"))
    return [words for _, words in sorted(found)]


def changed_knobs(a: Settings, b: Settings) -> list[str]:
    """Return the knobs in which two configurations differ; without workers, those of workers do not count."""
    with_workers = ("prefetch_factor", "multiprocessing_context", "in_order", "persistent_workers")
    skip = with_workers if 0 in (a.num_workers, b.num_workers) else ()
    return [knob for knob in KNOBS if knob not in skip and getattr(a, knob) != getattr(b, knob)]


def knob_effects(arms: Arms, chosen: Arm, tolerance: float) -> list[dict[str, Any]]:
    """Compare the recommendation with each configuration that differs in one knob only."""
    effects = []
    for arm in arms.feasible():
        changed = changed_knobs(arm.settings, chosen.settings)
        if len(changed) != 1 or arm is chosen:
            continue
        ratio, low, high = arms.ratio(arm, chosen)
        effects.append(
            {
                "knob": changed[0],
                "value": getattr(arm.settings, changed[0]),
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


def row(arms: Arms, arm: Arm, chosen: Arm) -> dict[str, Any]:
    """Return one line of the table of configurations."""
    low, high = arms.interval(arm)
    settings = arm.settings
    paced = arms.consumer.step_time_s > 0
    return {
        "settings": settings.as_dict(),
        "label": settings.label(),
        "recommended": arm is chosen,
        "trials": len(arm.trials),
        "rate_samples_per_s": arm.rate,
        "rate_interval": (low, high),
        "value_samples_per_s": arms.value(arm),
        "idle_fraction": arms.expected_idle(arm) if paced else None,
        "idle_interval": arms.idle_interval(arm) if paced else None,
        "paced_trials": len(arm.seen),
        "first_batch_s": arm.first_batch_s,
        "later_first_batch_s": arm.later_first_batch_s,
        "memory_bytes": arm.memory_bytes,
        "wait_p50_s": arm.trials[-1].wait_p50_s,
        "wait_p95_s": arm.trials[-1].wait_p95_s,
        "wait_p99_s": arm.trials[-1].wait_p99_s,
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


def si(value: float) -> str:
    """Return a number with three significant digits and a thousands mark: 1,230 or 12.3 k."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    if value >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Return seconds in the unit that suits them."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    return "-"


def size(count: float | None) -> str:
    """Return bytes in kB, MB or GB."""
    if count is None:
        return "-"
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
