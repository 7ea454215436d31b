"""A profile as text: the verdict first, then what to paste, how sure, tables. Fits 80 columns, uses 120."""

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mbperf.loader.output.advice import idle_words
from mbperf.loader.output.ranks import words as ranks_words
from mbperf.loader.output.units import duration, si, size
from mbperf.loader.records import Profile

WIDE = 110
STYLES = {
    "compute": "bold green",
    "loader": "bold yellow",
    "start-up": "bold yellow",
    "infeasible": "bold red",
}


def show(profile: Profile, console: Console) -> None:
    """Print a profile."""
    console.print(Text(profile.verdict, style=STYLES.get(profile.bound, "bold")), soft_wrap=True)
    if profile.call:
        console.print()
        console.print(Text(f"    {profile.call}", style="bold cyan"), soft_wrap=True)
        console.print()
        console.print(Text(rate_line(profile)))
        console.print(Text(profile.confidence_words[:1].upper() + profile.confidence_words[1:] + "."))
    if profile.idle_measured is not None and profile.idle_from_rate is not None:
        console.print(
            f"Idle share seen by a paced consumer {idle_words(profile)}, "
            f"from the drained rate {100 * profile.idle_from_rate:.0f} %."
        )
    for sentence in ranks_words(profile.ranks) if profile.recommendation and profile.ranks else ():
        console.print(Text(sentence))
    for part in (configurations, infeasible, knobs, stages, remarks):
        if (table := part(profile, console.width)) is not None:
            console.print()
            console.print(table)
    console.print()
    console.print(Text(closing(profile), style="dim"))


def rate_line(profile: Profile) -> str:
    """Return the rate with its interval, per sample and per batch."""
    low, high = profile.rate_interval or (0.0, 0.0)
    return (
        f"{si(profile.rate_samples_per_s or 0)} samples/s (95 % interval {si(low)} to {si(high)}), "
        f"{si(profile.rate_batches_per_s or 0)} batches/s."
    )


def closing(profile: Profile) -> str:
    """Return the last line: what it cost and where it ran."""
    cpus = profile.machine.get("usable_cpus", 0)
    count = len(profile.trials)
    so_far = ": the best so far" if profile.recommendation else ""
    stopped = f"Interrupted{so_far}. " if profile.interrupted else ""
    return (
        f"{stopped}{count} trial{'' if count == 1 else 's'} in {profile.spent_s:.1f} s of "
        f"{profile.budget_s:g} s, "
        f"{cpus:g} processors, seed {profile.seed}"
    )


def configurations(profile: Profile, width: int) -> Table | None:
    """Return the table of what was tried; a dot marks what nothing beats in every respect at once."""
    if not profile.configurations:
        return None
    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("")
    table.add_column("Tried", overflow="fold")
    paced = profile.idle_fraction is not None
    right = ["samples/s", "±", "n"]
    right += (["idle"] if paced else []) + ["first", "later", "memory"]
    right += ["wait p50", "p95", "p99"] if wide else []
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for row in profile.configurations:
        low, high = row["rate_interval"]
        spread = 100 * (high / low) ** 0.5 - 100
        cells = [si(row["rate_samples_per_s"]), f"{spread:.0f} %", str(row["trials"])]
        cells += [f"{100 * row['idle_fraction']:.0f} %"] if paced else []
        cells += [
            duration(row["first_batch_s"]),
            duration(row["later_first_batch_s"]),
            size(row["memory_bytes"]),
        ]
        cells += [duration(row[f"wait_{p}_s"]) for p in ("p50", "p95", "p99")] if wide else []
        mark = "→" if row["recommended"] else "●" if row["pareto"] else ""
        table.add_row(mark, label(row, profile), *cells, style="bold" if row["recommended"] else None)
    note = "→ recommended, ● nothing tried beats it in rate, workers and memory at once\n"
    note += "±: 95 % interval; n: trials; first, later: time to an epoch's first batch"
    return Group(table, Text(note, style="dim"))  # type: ignore[return-value]


def label(row: dict[str, Any], profile: Profile) -> str:
    """Return a configuration's name, without the batch size where all have the same."""
    sizes = {other["settings"]["batch_size"] for other in profile.configurations}
    words = row["label"]
    return words if len(sizes) > 1 else words.replace(f", batch {row['settings']['batch_size']}", "")


def infeasible(profile: Profile, width: int) -> Table | None:
    """Return the table of what could not run, and why."""
    rows = {t.settings.label(): t.infeasible for t in profile.trials if t.infeasible}
    if not rows:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold red", padding=(0, 1))
    table.add_column("Infeasible", no_wrap=width >= WIDE, ratio=1)
    table.add_column("Why", ratio=2)
    for label, why in rows.items():
        table.add_row(label, Text(why))
    return table


def knobs(profile: Profile, width: int) -> Table | None:
    """Return what each other value of a single knob would do."""
    if not profile.knobs:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("Knob", overflow="fold")
    for name in ("instead of", "gives"):
        table.add_column(name)
    table.add_column("rate x", justify="right", no_wrap=True)
    table.add_column("")
    for effect in profile.knobs:
        low, high = effect["interval"]
        table.add_row(
            f"{effect['knob']}={effect['value']}",
            str(effect["chosen"]),
            effect["words"],
            f"{effect['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    return table


def stages(profile: Profile, width: int) -> Table | None:
    """Return where the time of the recommended configuration goes."""
    lines = stage_lines(profile.stages, profile.costs)
    if not lines:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("Stage", no_wrap=True)
    table.add_column("of the recommended configuration")
    for name, words in lines:
        table.add_row(name, words)
    return table


def stage_lines(found: dict[str, Any], costs: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, words) for each stage that was measured."""
    if not found or "infeasible" in found:
        return []
    lines = []
    if found["getitem_s"] is not None:
        cpu = costs.get("getitem_cpu_s", 0) / max(costs.get("getitem_s", 0), 1e-12)
        lines.append(
            ("getitem", f"{duration(found['getitem_s'])} a sample ({100 * cpu:.0f} % of it on the CPU)")
        )
    if found["collate_s"] is not None:
        lines.append(
            ("collate", f"{duration(found['collate_s'])} a batch of {size(costs.get('batch_bytes'))}")
        )
    if found["transfer_s"] is not None:
        lines.append(("transfer", f"{duration(found['transfer_s'])} a batch, from worker to consumer"))
    if costs.get("pin_s") is not None:
        lines.append(("pin", f"{duration(costs['pin_s'])} a batch, to page-locked memory"))
    lines += first_batch_lines(found)
    if found["busy_share"]:
        shares = ", ".join(f"{100 * share:.0f}" for share in found["busy_share"].values())
        lines.append(("workers", f"busy {shares} %; imbalance {100 * (found['imbalance'] or 0):.0f} %"))
    if found["slowest"]:
        slow = ", ".join(f"{index} ({duration(spent)})" for index, spent in found["slowest"][:5])
        lines.append(("slowest", f"indices {slow}"))
    return lines + memory_lines(found)


def not_tried(profile: Profile) -> str:
    """Return what was not tried, worker counts of the same other knobs together: `1, 3 workers, batch 64`."""
    counts: dict[str, list[int]] = {}
    for row in profile.not_tried:
        _, separator, rest = row["label"].partition(", ")
        counts.setdefault(separator + rest, []).append(row["settings"]["num_workers"])
    return "; ".join(
        f"{', '.join(map(str, sorted(found)))} worker{'' if found == [1] else 's'}{rest}"
        for rest, found in counts.items()
    )


def first_batch_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the parts of the time to the first batch."""
    first = found.get("first_batch")
    if not first:
        return []
    parts = [
        ("pickling the dataset", found.get("pickle_s")),
        ("starting its worker", first["start_worker_s"] or None),
        ("fetching and collating", first["fetch_and_collate_s"]),
        ("handing over", first["hand_over_s"]),
    ]
    words = ", ".join(f"{name} {duration(spent)}" for name, spent in parts if spent is not None)
    return [("first batch", f"{duration(first['total_s'])}: {words}")]


def memory_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return memory, its slope, descriptors and shared memory."""
    memory = found.get("memory")
    if not memory:
        return []
    workers = memory["workers_pss_bytes"] or []
    mean = f", each worker {size(sum(workers) / len(workers))}" if workers else ""
    words = f"PSS {size(memory['pss_bytes'])} in all (main {size(memory['main_pss_bytes'])}{mean}), "
    words += f"USS {size(memory['uss_bytes'])}"
    if found.get("memory_slope_bytes_per_1000") is not None:
        words += f", {found['memory_slope_bytes_per_1000'] / 1e6:+.2f} MB per 1,000 samples"
    shared = f"{memory['descriptors']} descriptors, {size(memory['shared_bytes'])} shared memory"
    return [("memory", words), ("kernel", shared)]


def remarks(profile: Profile, width: int) -> Group | None:
    """Return traps, foreseen shortages, notes and what was not tried."""
    lines = [("trap", finding["words"]) for finding in profile.lint]
    lines += [("foreseen", words) for words in profile.foreseen]
    lines += [("note", words) for words in profile.notes]
    if profile.not_tried:
        lines.append(("not tried", f"{not_tried(profile)} (predicted slower, or no time left)"))
    if not lines:
        return None
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, words in lines:
        table.add_row(name, Text(words))
    return Group(Padding(table, 0))
