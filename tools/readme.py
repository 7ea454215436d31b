"""README's figures: the blocks between its marks, made from the newest runs under results/.

Of a CPU it is the newest complete run, of a GPU the newest one.

`python tools/readme.py` rewrites them, and the picture of the ladder beside the run; with --check it
only says whether something is stale (exit 1), and with --show FILE it prints the tables of that run of a GPU.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbperf.measure.rows import ROOF
from mbperf.report import ladder, record
from mbperf.report.page import reproduce, save, share_in_words, source
from mbperf.report.tables import digits, ratio

BEGIN, END = "<!-- mbperf:begin {} -->", "<!-- mbperf:end {} -->"
PICTURE = "ladder.svg"
# The case on which the table is read aloud: large enough that memory is the limit, known to everyone.
SPOKEN = "512x32000 f32 fwd+bwd"
MAIN = ("fwd+bwd", "f32")
# Columns of the two tables of a GPU: contenders and their titles.
EAGER = "eager"
PEERS = {"fused": "mbperf", "quack": "quack", "compiled": "torch.compile", "torch": "torch"}
IN_GRAPHS, FROM_HOST = {**PEERS, ROOF: "memory limit"}, {**PEERS, "liger": "Liger"}


def block(run: Mapping[str, Any]) -> str:
    """Return the headline block of a run: the table, then one row of it in words.

    Args:
        run: a record.

    Returns:
        Markdown, without the marks.
    """
    rows = [row for row in record.subjects(dict(run)) if _belongs(row)]
    lines = ["| | x naive | x torch | of the memory limit |", "|---|--:|--:|--:|"]
    for row in rows:
        ratios = row["ratios"]
        cells = [ratio(ratios.get("naive"), True), ratio(ratios.get("torch"), True), share_in_words(row)]
        lines.append(f"| {row['op']} {row['case']} | " + " | ".join(cells) + " |")
    lines += _mean_lines(run)
    origin = f"99 % intervals; from `{reproduce(run)}`, {run['datetime'][:10]}."
    return "\n".join([*lines, "", origin, "", *_aloud(rows)]).rstrip()


def _belongs(row: Mapping[str, Any]) -> bool:
    """Plain forward+backward at float32, and all there is of operations that know no passes; on the CPU."""
    facts = row["facts"]
    if facts.get("device") == "cuda":
        return False
    if "pass" not in facts:
        return True
    return (facts["pass"], facts["dtype"]) == MAIN and not facts.get("options")


def _mean_lines(run: Mapping[str, Any]) -> list[str]:
    lines = []
    for label, bases in run["mbperf"]["geometric_means"].items():
        words, groups = label.split(), max((one["groups"] for one in bases.values()), default=0)
        if groups > 1 and (len(words) == 1 or MAIN[0] in words):
            cells = [ratio(bases.get(base), True) for base in ("naive", "torch")]
            lines.append(f"| **geometric mean, {label}** | " + " | ".join(cells) + " | |")
    return lines


def _aloud(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row in words, so that the reader can read the others."""
    row = next((one for one in rows if one["case"] == SPOKEN), None)
    if row is None or "torch" not in row["ratios"]:
        return []
    torch = row["ratios"]["torch"]
    high = "" if torch["high"] is None else f" and {digits(torch['high'])}"
    sentences = [
        f"Read aloud: at {SPOKEN} (forward and backward of 512 rows of 32,000 classes) the fused operation",
        f"is {digits(torch['ratio'])} times as fast as `F.cross_entropy`; the truth lies between "
        f"{digits(torch['low'])}{high}.",
        f"It moves {digits(row['bandwidth_bytes_per_s'] / 1e9)} GB/s of the bytes that have to move, "
        f"{share_in_words(row)} of what a bare copy of them reached in the same rounds.",
    ]
    if not row["clean_control"] and row["control"]:
        off = abs(row["control"]["ratio"] - 1)
        sentences.append(
            f"Its A/A control, the operation against itself, was {off:.1%} off, so differences of that size "
            "mean nothing here."
        )
    return [" ".join(sentences)]


def ladder_block(run: Mapping[str, Any]) -> str:
    """Return the block of the ladder of training loops: table, words, picture; or that the run has none.

    Args:
        run: a record.

    Returns:
        Markdown, without the marks.
    """
    table = ladder.markdown(record.rows(dict(run)))
    if not table:
        return f"The run that these figures are made from has no ladder (`{reproduce(run)}`)."
    machine = run["mbperf"]["hardware"]["name"]
    origin = f"From `{reproduce(run)}`, {run['datetime'][:10]}."
    return f"{table}\n\n![the ladder](results/{machine}/{PICTURE})\n\n{origin}"


def gpu_block(run: Mapping[str, Any]) -> str:
    """Return the block of a run of a GPU: microseconds of a call, in graphs and from the host.

    Args:
        run: a record.

    Returns:
        Markdown, without the marks.
    """
    in_graphs: dict[str, dict[str, Mapping[str, Any]]] = {}
    from_host: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in record.rows(dict(run)):
        cases = from_host if row["facts"].get("options") == EAGER else in_graphs
        case = f"{row['op']} {row['case']}".replace(" cuda", "", 1).removesuffix(f" {EAGER}")
        cases.setdefault(case, {})[row["contender"]] = row
    tables = _gpu_table("us in a graph", IN_GRAPHS, in_graphs), _gpu_table("us, eager", FROM_HOST, from_host)
    return "\n\n".join([*tables, _of_gpu(run)])


def _gpu_table(
    title: str, columns: Mapping[str, str], cases: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> str:
    lines = [f"| {title} | {' | '.join(columns.values())} |", "|---" + "|--:" * len(columns) + "|"]
    for case, rows in cases.items():
        best = min((rows[name]["time_s"] for name in columns if name in rows and name != ROOF), default=None)
        cells = [_gpu_cell(rows, name, best) for name in columns]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gpu_cell(rows: Mapping[str, Mapping[str, Any]], name: str, best: float | None) -> str:
    """The time of a contender, the fastest in bold; of the limit, with the share of it that was reached."""
    if name not in rows:
        return ""
    time = digits(rows[name]["time_s"] * 1e6)
    if name == ROOF:
        return f"{time} ({share_in_words(rows['fused'])})" if "fused" in rows else time
    return f"**{time}**" if rows[name]["time_s"] == best else time


def _of_gpu(run: Mapping[str, Any]) -> str:
    """On what, when and how the figures were taken, and what of the run is missing."""
    facts, subjects = run["mbperf"], record.subjects(dict(run))
    releases: dict[str, str] = {}
    for row in subjects:
        releases |= row["facts"].get("releases", {})
    versions = [facts["gpu"]["name"]]
    versions += [f"driver {facts['gpu']['driver']}"] * ("driver" in facts["gpu"])
    versions += [f"torch {facts['software']['torch']}", *map(" ".join, sorted(releases.items()))]
    unclean = sum(not row["clean_control"] for row in subjects)
    # The benchmarks of the CPU are no part of it.
    missing = [why for why in facts["incomplete_because"].split("; ") if why and not why.endswith(" not run")]
    sentences = [
        f"From `{reproduce(run)}`, {run['datetime'][:10]}: {', '.join(versions)}.",
        "Medians of one process, the fastest in bold. In a graph: events around captured graphs, whose "
        "inputs together are larger than the cache. Eager: the host's clock around calls, until the device "
        "has finished.",
        "The memory limit moves the same bytes and computes nothing; in brackets stands the share of it that "
        "mbperf reached.",
        f"{unclean} of {len(subjects)} A/A controls were not clean.",
        *([f"Not a whole run: {'; '.join(missing)}."] if missing else []),
    ]
    return " ".join(sentences)


BLOCKS = {"headline": block, "ladder": ladder_block}
GPU_BLOCKS = {"gpu": gpu_block}


def rewritten(text: str, run: Mapping[str, Any], blocks: Mapping[str, Callable[..., str]] = BLOCKS) -> str:
    """Return README's text with some of its blocks rewritten.

    Raises:
        ValueError: the marks of a block are missing or in the wrong order.
    """
    for name, make in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"README: expected the marks {begin} and {end}, in this order")
        text = f"{before}{begin}\n{make(run)}\n{end}{after}"
    return text


def draw(run: Mapping[str, Any], results: Path) -> None:
    """Write the picture that README shows, if the run has what it needs."""
    figure = ladder.picture(record.rows(dict(run)))
    if figure is not None:
        save(figure, run, _picture(run, results))


def _picture(run: Mapping[str, Any], results: Path) -> Path:
    return results / run["mbperf"]["hardware"]["name"] / PICTURE


def newest(results: Path) -> tuple[tuple[Path, Any] | None, tuple[Path, Any] | None]:
    """Return the newest complete run of a CPU and the newest run of a GPU, each with its file, or None.

    A run of a GPU is never complete, as the benchmarks of the CPU are no part of it.
    """
    runs = list(record.runs(results))
    of_cpu = [one for one in runs if one[1]["mbperf"]["complete"] and not record.is_of_gpu(one[1])]
    of_gpu = [one for one in runs if "gpu" in one[1]["mbperf"] and record.is_of_gpu(one[1])]
    return (of_cpu or [None])[-1], (of_gpu or [None])[-1]


def with_figures(text: str, results: Path) -> str:
    """Return README's text with the blocks rewritten that there is a run for."""
    cpu, gpu = newest(results)
    text = rewritten(text, cpu[1]) if cpu else text
    return rewritten(text, gpu[1], GPU_BLOCKS) if gpu else text


def is_stale(readme: Path, results: Path) -> bool:
    """Whether README or its picture differ from the newest runs; False without a run of a CPU."""
    found, _ = newest(results)
    if found is None:
        return False
    text = readme.read_text(encoding="utf-8")
    return with_figures(text, results) != text or not _is_drawn(found[1], _picture(found[1], results))


def _is_drawn(run: Mapping[str, Any], file: Path) -> bool:
    """Whether the picture is of this run; which one it is of stands in its metadata."""
    if not ladder.rungs(record.rows(dict(run))):
        return True
    return file.is_file() and source(run) in file.read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README's blocks, or check them."""
    parser = argparse.ArgumentParser(prog="python tools/readme.py", description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--check", action="store_true", help="exit 1 if a block is stale, change nothing")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the block of this run of a GPU")
    args = parser.parse_args(arguments)
    if args.show:
        print(gpu_block(record.load(args.show)))
        return 0
    found, gpu = newest(args.results)
    if found is None:
        print(f"mbperf: no complete run under {args.results}; run: make bench")
        return 1
    if args.check:
        stale = is_stale(args.readme, args.results)
        print(f"{args.readme} is {'stale; run: make readme' if stale else 'up to date'} ({found[0]})")
        return int(stale)
    text = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(with_figures(text, args.results), encoding="utf-8")
    draw(found[1], args.results)
    print(f"{args.readme}: figures of {found[0]}" + (f" and {gpu[0]}" if gpu else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
