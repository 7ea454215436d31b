"""Records on disk: how large they may be, what they give back, what the history makes of them."""

import copy
import re
from pathlib import Path

import pytest
from made_up_runs import made_up_run

from mbperf.report import history, lean, page, record, tables

RESULTS = Path(__file__).parents[2] / "results"
LARGEST_BYTES = 400_000
LARGEST_ROW_BYTES = 900
RECORDS = sorted(RESULTS.glob("*/*-CPython-*/*.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.name[:13])
def test_a_record_is_small_and_names_no_address(file):
    text = file.read_text(encoding="utf-8")
    run = record.load(file)
    assert len(text.encode()) <= LARGEST_BYTES
    assert len(text.encode()) <= LARGEST_ROW_BYTES * len(run["benchmarks"])
    assert not re.search(r"\b0x[0-9a-f]+|UNSERIALIZABLE|\"data\":\[", text)
    lines = text.splitlines()
    assert sum(line.startswith('{"group":') for line in lines) == len(run["benchmarks"])


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist holds no records")
def test_there_are_records_to_look_at():
    assert RECORDS


def with_processes(run):
    """As a run of three processes in both states of the heap leaves it: the largest rows there are."""
    for row in record.rows(run):
        for ratio in row["ratios"].values():
            ratio["processes"] = [ratio["ratio"] * step for step in (0.99123, 1.0, 1.01234)]
        row |= {"heap": "recycled", "page_faults": 123.5}
        row["other_heap"] = {
            "heap": "fresh", "time_s": row["time_s"] * 1.23456, "page_faults": 16033.0,
            "ratios": copy.deepcopy(row["ratios"]),
        }  # fmt: skip
    return run


def as_saved(run):
    """A run with what pytest-benchmark writes beside the figures."""
    fields = ("min", "max", "mean", "stddev", "iqr", "q1", "q3", "ld15iqr", "hd15iqr", "ops", "total")
    for entry in run["benchmarks"]:
        del entry["stats"]["data"]
        entry["stats"] |= dict.fromkeys(fields, 1.23456789e-5) | {"rounds": 123, "outliers": "12;3"}
        entry["fullname"] = f"bench/bench_cross_entropy.py::test_cross_entropy[{entry['fullname']}]"
        entry["name"] = entry["fullname"].partition("::")[2]
        name = entry["extra_info"]["contender"]
        entry |= {"params": {"race": name}, "param": name, "options": {"timer": "interleaved_rounds"}}
    return run


def test_the_largest_rows_of_a_run_of_three_processes_fit():
    run = as_saved(with_processes(made_up_run()))
    text = lean.text(lean.read_later(lean.lean(run)))
    rows = [line for line in text.splitlines() if line.startswith('{"group":')]
    assert len(rows) == len(read_rows(run))
    # In the suite's proportion of 115 groups to 400 rows, this is what 400 kB are made of.
    assert len(text) / len(rows) < 800 + 200


def read_rows(run):
    """All but those that only their own run looks at."""
    return [row for row in record.rows(run) if row["contender"] not in ("again", "null")]


def test_the_control_and_the_null_call_are_not_saved():
    run = as_saved(made_up_run())
    saved = lean.read_later(lean.lean(run))
    assert {"again", "null"} <= {row["contender"] for row in record.rows(run)}
    assert [row["contender"] for row in record.rows(saved)] == [row["contender"] for row in read_rows(run)]
    assert all(row["control"] for row in record.subjects(record.validate(saved, "made up")))
    drawn = made_up_run()
    assert lean.read_later(drawn)["benchmarks"] == drawn["benchmarks"]


def test_who_left_early_keeps_its_own_count_of_rounds():
    run = as_saved(made_up_run())
    for row in record.rows(run):
        row["rounds"] = [3, 3, 3] if row["contender"] == "naive" else [50, 60, 70]
    saved = record.validate(lean.lean(run), "made up")
    counts = {row["contender"]: row["rounds"] for row in record.rows(saved)}
    assert counts == {name: [50, 60, 70] for name in counts} | {"naive": [3, 3, 3]}


def test_what_is_read_comes_back():
    run = as_saved(with_processes(made_up_run()))
    saved = record.validate(lean.lean(copy.deepcopy(run)), "made up")
    for row, again in zip(record.subjects(run), record.subjects(saved), strict=True):
        assert again.keys() == row.keys()
        assert again["time_s"] == pytest.approx(row["time_s"], rel=1e-5)
        assert again["bandwidth_bytes_per_s"] == pytest.approx(row["bandwidth_bytes_per_s"], rel=1e-5)
        assert again["ratios"]["torch"]["processes"] == pytest.approx(
            row["ratios"]["torch"]["processes"], rel=5e-4
        )
    null = next(row for row in record.rows(saved) if row["contender"] == "null")
    assert "read_bytes" not in null
    digits = re.findall(r"\d+\.\d+x", page.markdown(saved))
    assert digits == re.findall(r"\d+\.\d+x", page.markdown(run))


def test_bounds_as_near_as_those_of_a_gpu_stay_around_their_median(tmp_path):
    run = as_saved(made_up_run())
    for entry in run["benchmarks"]:
        row = entry["extra_info"]
        if "bandwidth_bytes_per_s" in row:
            row["time_s"] = entry["stats"]["median"] = 1.234_56e-5
            moved = row["read_bytes"] + row["written_bytes"]
            near = {"bandwidth": 1, "bandwidth_low": 1.000_02, "bandwidth_high": 0.999_98}
            row |= {f"{name}_bytes_per_s": moved / (row["time_s"] * off) for name, off in near.items()}
    saved = record.validate(lean.lean(run), "made up")
    for row in record.rows(saved):
        if "bandwidth_low_bytes_per_s" in row:
            low, high = row["bandwidth_low_bytes_per_s"], row["bandwidth_high_bytes_per_s"]
            assert low < row["bandwidth_bytes_per_s"] < high
    assert page.write(saved, [], tmp_path)


def test_a_page_without_samples_says_so():
    run = made_up_run()
    assert page.NO_SAMPLES not in page.html(run, {"rounds": page._figures(run, [])["rounds"]})
    for entry in run["benchmarks"]:
        del entry["stats"]["data"]
    assert page._figures(run, [])["rounds"] is None
    assert page.NO_SAMPLES in page.html(run, {})


def renamed(run, **names):
    """The run with bases of other names."""
    for row in record.rows(run):
        row["ratios"] = {names.get(base, base): one for base, one in row["ratios"].items()}
        row["contender"] = names.get(row["contender"], row["contender"])
    return run


def test_bases_of_any_name_have_their_ratio_and_interval_everywhere():
    run = renamed(made_up_run(), naive="mine_v1", torch="numpy")
    for row in record.subjects(run):
        row["change"] = {"ratio": 1.1, "low": 1.05, "high": 1.15, "verdict": "BETTER", "against": "numpy"}
    wide = tables.headline(record.subjects(run), record.saved_rows(run), {}, 140)
    for shown in (wide, page.markdown(run), page.html(run, {})):
        for word in ("x mine_v1", "x numpy", "+10.0% BETTER"):
            assert word in shown
        assert re.search(r"10\.0x \[9\.9\d, 10\.0\]", shown)
        assert re.search(r"20\.0x \[19\.9, 20\.0\]", shown)
    narrow = tables.headline(record.subjects(run), {}, {}, 60)
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 60
    assert "mine_v1" in narrow
    assert "numpy" in narrow
    assert "change_verdict" in page.rows_csv(run)
    figures = page._figures(run, [run, run])
    labels = [text.get_text() for text in figures["bandwidth_cross_entropy"].legends[0].get_texts()]
    assert labels == ["fused", "mine_v1", "roof"]
    assert "mine_v1" in figures["speedup"].axes[0].get_xlabel()


def without(run, case):
    run["benchmarks"] = [one for one in run["benchmarks"] if one["extra_info"]["case"] != case]
    return run


SMALL = "64x10 f32 fwd+bwd"


def line_of(records, label="cross_entropy f32 fwd+bwd"):
    return next(line for line in history.lines(records) if line.label == label)


def test_history_takes_means_over_the_groups_that_all_runs_have():
    fast, slow = made_up_run(speedup=20.0), without(made_up_run(speedup=10.0), SMALL)
    line = line_of([slow, fast])
    assert (line.groups, line.newest_groups) == (1, 2)
    assert "1 group, 1 more are newer" in line.words()
    assert [place for place, _ in line.points] == [0, 1]
    assert [ratio.ratio for _, ratio in line.points] == pytest.approx([10, 20], rel=0.01)


def test_history_breaks_where_runs_share_too_little_and_says_so():
    other = made_up_run()
    for row in record.rows(other):
        row["case"] = "another " + row["case"]
    line = line_of([other, made_up_run()])
    assert [place for place, _ in line.points] == [1]
    assert "earlier runs left out, other groups or heap: 1" in line.words()


@pytest.mark.parametrize(
    ("then", "now", "compared"),
    [(None, "recycled", 1), ("recycled", "fresh", 1), ("recycled", "recycled", 2), ("", "recycled", 2)],
)
def test_history_compares_one_state_of_the_heap(then, now, compared):
    runs = [made_up_run(), made_up_run()]
    for run, heap in zip(runs, (then, now), strict=True):
        for row in record.rows(run):
            row |= {} if heap is None else {"heap": heap}
    assert len(line_of(runs).points) == compared


def test_no_legend_of_the_history_lies_on_its_axes():
    figure = history.picture([made_up_run(), made_up_run()])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_legend() is None
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
