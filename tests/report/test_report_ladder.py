"""The ladder of training loops: its table, words and picture, with rungs left out or no ladder at all."""

import re

import pytest
import readme
from made_up_runs import saved

from mbperf.report import ladder, page

LABELS = {
    "manual": "by hand",
    "slices": "slices",
    "torch": "torch",
    "fused": "mbperf",
    "compiled": "compiled",
}
DATA_S = {"manual": 0.01, "slices": 0.01, "torch": 0.3, "fused": 0.1}


def rung(name):
    phases = {"data": DATA_S[name], "forward": 0.25, "loss": 0.05, "backward": 0.35, "step": 0.1}
    time_s = sum(phases.values())
    base_s = 0.76
    ratio = {"ratio": base_s / time_s, "low": 0.5, "high": 2.0, "verdict": "SAME"}
    return {
        "op": "training",
        "case": "epoch",
        "contender": name,
        "subject": "fused",
        "facts": {"N": 6400, "bs": 64, "rungs": LABELS},
        "time_s": time_s,
        "ratios": {} if name == "slices" else {"slices": ratio},
        "control": None,
        "clean_control": True,
        "noisy": False,
        "rounds": [9],
        "dropped_rounds": [0],
        "inner_calls": [1],
        "seeds": [1],
        "phase_time_s": phases,
    }


@pytest.fixture
def rows():
    return [rung(name) for name in ("fused", "manual", "slices", "torch")]


@pytest.fixture
def run(rows):
    facts = {
        "schema": 2,
        "complete": True,
        "incomplete_because": "",
        "profile": "long",
        "budget_s": 1,
        "processes": 1,
        "confidence": 0.99,
        "geometric_means": {},
        "hardware": {"name": "machine-1"},
        "software": {},
    }
    benchmarks = [{"group": "training", "extra_info": row, "stats": {}} for row in rows]
    commit = {"id": "0123456789ab"}
    return {
        "datetime": "2026-01-02T03:04:05",
        "commit_info": commit,
        "benchmarks": benchmarks,
        "mbperf": facts,
    }


def table(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_rungs_stand_in_their_order_and_one_that_was_left_out_says_so(rows):
    header, _, *lines = table(ladder.markdown(rows))
    assert header == ["", "samples/s", "x slices", "data", "forward", "loss", "backward", "step"]
    assert [line[0] for line in lines] == list(LABELS.values())
    assert lines[0][1:] == ["8,421", "1.00x [0.50, 2.00]", "1%", "33%", "7%", "46%", "13%"]
    assert lines[1][2] == "1"
    assert lines[-1][1:] == [ladder.NOT_RUN, *[""] * 6]


def test_words_give_microseconds_of_a_batch(rows):
    [text] = ladder.aloud(rows)
    assert "1000 us of data, where views of the data cost 100 us and torch's DataLoader 3000 us" in text
    assert "together, as a view is first read there: 3500, 2600 and 5500 us" in text
    assert "bare copy" not in text
    assert ladder.aloud(rows[1:]) == []


def test_words_give_the_least_that_a_shuffled_batch_costs(rows):
    for row in rows:
        row["least_data_time_s"] = 0.05
    [text] = ladder.aloud(rows)
    assert "around a bare copy of as many rows, data costs 500 us. Data and forward" in text


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_fits_and_names_every_rung(rows, width):
    text = ladder.terminal(rows, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert all(label in text for label in LABELS.values())
    assert "not run" in text


def test_picture_has_a_bar_for_every_phase_of_every_rung_that_ran(rows):
    speed, parts = ladder.picture(rows).axes
    assert [bar.get_width() for bar in speed.patches] == pytest.approx(
        [6.4 / 0.76, 6.4 / 0.76, 6.4 / 1.05, 6.4 / 0.85]
    )
    assert len(parts.patches) == 4 * len(ladder.PHASES)
    assert ladder.NOT_RUN in speed.texts[-1].get_text()


def test_no_ladder_is_no_table_and_no_picture(rows):
    for row in rows:
        del row["phase_time_s"]
    assert ladder.markdown(rows) == ladder.terminal(rows) == ""
    assert ladder.picture(rows) is None


def test_readme_shows_the_picture_of_its_own_run(run, tmp_path):
    results, file = tmp_path / "results", tmp_path / "README.md"
    saved(run, results / "machine-1")
    file.write_text("".join(f"{readme.BEGIN.format(n)}\n{readme.END.format(n)}\n" for n in readme.BLOCKS))
    arguments = [f"--readme={file}", f"--results={results}"]
    assert readme.main(arguments) == 0
    [target] = re.findall(r"!\[.*\]\((.*)\)", file.read_text())
    picture = tmp_path / target
    assert page.source(run) in picture.read_text()
    assert readme.main([*arguments, "--check"]) == 0
    first = picture.read_bytes()
    picture.write_text(picture.read_text().replace(run["datetime"], "2025-01-01"))
    assert readme.main([*arguments, "--check"]) == 1
    readme.main(arguments)
    assert picture.read_bytes() == first, "the same record gives the same picture"
    picture.unlink()
    assert readme.main([*arguments, "--check"]) == 1


def test_readme_of_a_run_without_a_ladder_says_so(run, tmp_path):
    run["benchmarks"] = []
    assert "has no ladder" in readme.ladder_block(run)
    readme.draw(run, tmp_path)
    assert not list(tmp_path.iterdir())
