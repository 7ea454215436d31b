"""What changed since a saved run: nothing where nothing did, and what did."""

import math
import random

import pytest
from made_up_runs import made_up_run

from mbperf.measure.change import changes, findings
from mbperf.measure.selftest import fake_run
from mbperf.report import page, record, tables

SLOWER = ("group 3", "group 17", "group 29")


def verdicts(now, then):
    return {name: change["verdict"] for name, change in changes(now, then).items()}


def called(found):
    return [name for name, verdict in found.items() if verdict in ("BETTER", "WORSE")]


def test_two_runs_of_one_tree_are_told_apart_in_one_row_of_a_hundred_at_most():
    false = [
        name for seed in range(40) for name in called(verdicts(fake_run(2 * seed), fake_run(2 * seed + 1)))
    ]
    assert len(false) <= 0.01 * 40 * len(fake_run(0))


def test_a_busy_neighbour_during_one_run_changes_no_row():
    loud = [verdicts(fake_run(seed, noise=3.0), fake_run(seed + 500)) for seed in range(20)]
    assert sum(len(called(one)) for one in loud) <= 0.01 * 20 * len(fake_run(0))


def test_five_percent_are_found_and_no_other_row():
    hits, others = 0, 0
    for seed in range(20):
        slower = dict.fromkeys(SLOWER, 1.05)
        found = verdicts(fake_run(seed, slower=slower), fake_run(seed + 500))
        hits += sum(found[name] == "WORSE" for name in SLOWER)
        others += len(called(found)) - sum(found[name] != "SAME" and name in SLOWER for name in called(found))
    assert hits >= 0.9 * 20 * len(SLOWER)
    assert others <= 0.01 * 20 * len(fake_run(0))


def test_what_torch_did_is_no_change_of_ours():
    """Another heap for torch alone: its ratio moves, the one against the roof does not."""
    then, now = fake_run(1), fake_run(2)
    ratios = now["group 5"]["ratios"]["torch"]
    ratios["processes"] = [
        one * 3 * math.exp(random.Random(i).gauss(0, 0.2)) for i, one in enumerate(ratios["processes"])
    ]
    change = changes(now, then)["group 5"]
    assert change["against"] == "roof"
    assert change["verdict"] not in ("BETTER", "WORSE")


def test_the_same_state_of_the_heap_is_compared():
    then, now = fake_run(1), fake_run(2)
    row = now["group 5"]
    row["other_heap"] = {"heap": "", "ratios": row["ratios"]}
    tripled = {k: v | {"processes": [3 * one for one in v["processes"]]} for k, v in row["ratios"].items()}
    now["group 5"] = row | {"heap": "recycled", "ratios": tripled}
    then["group 5"]["other_heap"] = {"heap": "recycled", "ratios": tripled}
    change = changes(now, then)["group 5"]
    assert change["ratio"] == pytest.approx(1.0)


def test_an_old_record_cannot_tell():
    then = fake_run(1)
    for row in then.values():
        for ratio in row["ratios"].values():
            del ratio["processes"]
    found = changes(fake_run(2), then)
    assert {one["verdict"] for one in found.values()} == {"CANNOT TELL"}
    assert all(one["low"] is None and one["ratio"] for one in found.values())
    older = record.saved_rows(made_up_run())
    assert {one["verdict"] for one in changes(older, older).values()} == {"CANNOT TELL"}


def test_what_became_worse_is_a_line_each():
    now, then = fake_run(1, slower={"group 3": 1.2}), fake_run(2)
    for name, change in changes(now, then).items():
        now[name]["change"] = change
    (line,) = findings(now)
    assert line.startswith("group 3: WORSE than the compared run: 0.8")


def test_the_change_stands_in_the_table_and_on_the_page():
    run = made_up_run()
    rows = record.subjects(run)
    rows[0]["change"] = {"ratio": 0.951, "low": 0.93, "high": 0.97, "verdict": "WORSE", "against": "roof"}
    rows[0] |= {
        "heap": "recycled",
        "other_heap": {"heap": "fresh", "ratios": {"torch": rows[0]["ratios"]["torch"]}},
    }
    saved = record.saved_rows(run)
    for width in (80, 140):
        text = tables.headline(rows, saved, {}, width)
        assert "-4.9% WORSE" in text
        assert "recycled" in text
        assert "fresh" in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    html = page.html(run, {})
    assert "-4.9% WORSE [-7.0, -3.0] against roof" in html
    assert "the same with a fresh heap" in html
