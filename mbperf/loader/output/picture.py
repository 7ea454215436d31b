"""The picture: throughput over workers, measured with intervals, predicted, and what the consumer needs."""

from itertools import cycle
from pathlib import Path

from mbperf.loader.records import Profile
from mbperf.loader.settings import Settings, changed_knobs

BLUE, GREY, ORANGE = "#2b6cb0", "#9aa5b1", "#dd6b20"
PALETTE = ("#718096", "#38a169", "#805ad5", "#b7791f", "#319795", "#d53f8c")


def draw(profile: Profile, path: str | Path) -> Path:
    """Write the picture of a profile to a file (png or svg by its name) and return its path.

    Raises:
        ValueError: nothing was measured.
    """
    from mbperf.require import require

    if not profile.configurations or profile.recommended is None:
        raise ValueError("draw: profile holds no measured configuration")
    figure = require("matplotlib.figure", "loader").Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = cycle(PALETTE)
    for label, rows in families(profile).items():
        chosen = any(row["recommended"] for row in rows)
        counts = [row["settings"]["num_workers"] for row in rows]
        rates = [row["rate_samples_per_s"] for row in rows]
        below = [rate - row["rate_interval"][0] for rate, row in zip(rates, rows, strict=True)]
        above = [row["rate_interval"][1] - rate for rate, row in zip(rates, rows, strict=True)]
        axes.errorbar(
            counts,
            rates,
            yerr=[below, above],
            marker="o",
            capsize=3,
            lw=2 if chosen else 1,
            color=BLUE if chosen else next(colours),
            label=label,
            zorder=3 if chosen else 2,
        )
    mark_recommendation(axes, profile)
    mark_consumer(axes, profile)
    untried = [row for row in profile.not_tried if family(Settings(**row["settings"])) in families(profile)]
    if untried:
        axes.plot(
            [row["settings"]["num_workers"] for row in untried],
            [row["predicted_samples_per_s"] for row in untried],
            "x",
            color=GREY,
            label="predicted, not tried",
        )
    axes.set_xlabel("num_workers")
    axes.set_ylabel("samples/s, drained (95 % interval)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{profile.subject.get('name', 'dataset')}: {profile.call}", fontsize=9, loc="left", wrap=True
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


def family(settings: Settings) -> str:
    """Return what a line of the picture has in common: everything but the workers."""
    words = settings.label().partition(", ")[2]
    return words or "DataLoader"


def families(profile: Profile) -> dict[str, list[dict]]:
    """Group the measured rows into lines over workers.

    A row without workers has no prefetch, order or start method, so it begins every line it fits; a single
    variant is a point, not a line.
    """
    rows = sorted(profile.configurations, key=lambda row: row["settings"]["num_workers"])
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(family(Settings(**row["settings"])), []).append(row)
    for members in lines.values():
        example = Settings(**members[-1]["settings"])
        if len(members) > 1 or any(row["recommended"] for row in members):
            members[:0] = [
                row for row in rows if row not in members and begins(Settings(**row["settings"]), example)
            ]
    return lines


def begins(settings: Settings, example: Settings) -> bool:
    """Tell whether a configuration without workers is the start of the example's line."""
    return settings.num_workers == 0 and changed_knobs(settings, example) == ["num_workers"]


def mark_recommendation(axes, profile: Profile) -> None:
    """Ring the recommended point."""
    row = next(row for row in profile.configurations if row["recommended"])
    axes.plot(
        [row["settings"]["num_workers"]],
        [row["rate_samples_per_s"]],
        "o",
        ms=14,
        mfc="none",
        mec=ORANGE,
        mew=2,
        label="recommended",
        zorder=4,
    )


def mark_consumer(axes, profile: Profile) -> None:
    """Draw the rate that the consumer asks for, where its step time is known."""
    if not profile.step_time_s or profile.recommended is None:
        return
    needed = (profile.recommended.batch_size or 1) / profile.step_time_s
    axes.axhline(
        needed, color=ORANGE, ls="--", lw=1, label=f"consumer at {profile.step_time_s * 1e3:.3g} ms a step"
    )
