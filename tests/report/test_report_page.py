"""From a saved run to tables, pictures, the page and README's block; the run is made up."""

import csv
import io
import re
import subprocess
from pathlib import Path

import pytest
import readme
from click.testing import CliRunner
from made_up_runs import made_up_run, saved

from mbperf.report import history, page, plots, record, tables
from mbperf.report.command import report

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run():
    return made_up_run()


def save(run, folder, name="0001_x.json"):
    return saved(run, folder / run["mbperf"]["hardware"]["name"], name)


def test_the_made_up_run_is_a_valid_record(run):
    record.validate(run, "made up")


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_terminal_table_fits_the_width_it_is_given(run, width):
    rows = record.subjects(run)
    saved = {f"{row['op']} {row['case']}": row for row in rows}
    text = tables.headline(rows, saved, run["mbperf"]["geometric_means"], width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for word in (
        "x naive",
        "x torch",
        "GB/s",
        "roof",
        "A/A",
        "verdict",
        "change",
        "FASTER",
        "geometric mean",
    ):
        assert word in text, word
    assert ("[" in text) == (width >= tables.WIDE)


def test_terminal_table_says_what_cannot_be_trusted(run):
    (row, *_) = record.subjects(run)
    row = row | {"clean_control": False, "noisy": True, "control": {"ratio": 0.93, "low": 0.9, "high": 0.96}}
    row["ratios"] = row["ratios"] | {"roof": {"ratio": 1.4, "low": 1.3, "high": 1.5, "verdict": "FASTER"}}
    text = tables.headline([row], {}, {}, 120)
    assert "140%!" in text
    assert "-7.0%!~" in text
    assert "1 of 1 A/A controls were off" in text
    assert "could not be judged" not in text


def test_a_ratio_in_doubt_is_marked_where_its_interval_has_no_room(run):
    (row, *_) = record.subjects(run)
    row["ratios"]["torch"] |= {"verdict": "CANNOT TELL"}
    text = tables.headline([row], {f"{row['op']} {row['case']}": row}, {}, 80)
    assert re.search(r"(10\.\d|9\.\d+)x\?", text)
    assert "+0.0%?" in text


def test_a_very_narrow_terminal_loses_no_word_of_the_verdict(run):
    (row, *_) = record.subjects(run)
    row["ratios"]["torch"] |= {"verdict": "CANNOT TELL"}
    text = tables.headline([row], {}, {}, 60)
    assert "CANNOT" in text
    assert "TELL" in text


@pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.95, 1.09)])
def test_a_control_that_cannot_be_judged_is_not_called_off(run, low, high):
    (row, *_) = record.subjects(run)
    row = row | {"clean_control": False, "control": {"ratio": 1.02, "low": low, "high": high}}
    text = tables.headline([row], {}, {}, 120)
    assert "+2.0%?" in text
    assert "1 of 1 could not be judged" in text
    assert "controls were off" not in text


def test_page_stands_alone_and_everything_says_how_to_get_it_again(run, tmp_path):
    files = page.write(run, [run], tmp_path)
    names = {file.name for file in files}
    pictures = {"speedup", "heat_map", "bandwidth_cross_entropy", "rounds", "history"}
    assert names == {"index.html", "table.md", "rows.csv"} | {
        f"{p}.{k}" for p in pictures for k in ("svg", "png")
    }
    text = (tmp_path / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert text.count("<svg") == len(pictures)
    assert "&lt;because&gt;" in text
    for name in ("index.html", "table.md"):
        assert page.reproduce(run) in (tmp_path / name).read_text()
    assert all(file.stat().st_size > 1000 for file in files if file.suffix == ".png")


def test_the_same_record_gives_the_same_tables(run):
    assert page.markdown(run) == page.markdown(made_up_run())
    assert page.rows_csv(run) == page.rows_csv(made_up_run())


def test_peak_memory_is_shown_where_it_was_measured(run):
    run["benchmarks"][0]["extra_info"]["peak_memory_bytes"] = 65_552_384
    expected = "Peak memory, cross_entropy 512x32000 f32 fwd+bwd: fused 65.6 MB."
    assert expected in page.markdown(run)
    assert expected in page.html(run, {})


def test_csv_is_in_base_units_and_holds_every_row(run):
    rows = list(csv.DictReader(io.StringIO(page.rows_csv(run))))
    assert len(rows) == len(run["benchmarks"])
    fused = next(row for row in rows if row["contender"] == "fused")
    assert float(fused["x_torch_ratio"]) == pytest.approx(10, rel=0.01)
    assert float(fused["bandwidth_bytes_per_s"]) == pytest.approx(
        (int(fused["read_bytes"]) + int(fused["written_bytes"])) / float(fused["time_s"])
    )


@pytest.mark.parametrize("draw", [plots.forest, plots.heat_map, plots.trace, history.picture])
def test_nothing_to_draw_is_no_picture(draw):
    assert draw([]) is None


def marked(text=""):
    """README's blocks, empty or with old text in them."""
    return "".join(f"{readme.BEGIN.format(n)}\n{text}\n{readme.END.format(n)}\n" for n in readme.BLOCKS)


def test_readme_block_follows_the_record(run, tmp_path):
    text = f"# x\n{marked('old')}rest\n"
    new = readme.rewritten(text, run)
    assert new.startswith("# x\n")
    assert new.endswith("rest\n")
    assert "old" not in new
    assert "| cross_entropy 512x32000 f32 fwd+bwd |" in new
    assert "forward |" not in new  # the headline is forward+backward of plain calls
    assert "fwd+bwd none" not in new
    assert re.search(r"the fused operation is (9\.9|10\.0)\d? times as fast as `F.cross_entropy`", new)
    assert readme.rewritten(new, run) == new


def test_readme_without_its_marks_is_refused(run):
    with pytest.raises(ValueError, match="expected the marks"):
        readme.rewritten("# x\n", run)


def test_a_stale_readme_is_found_and_made_fresh(run, tmp_path, capsys):
    file, results = tmp_path / "README.md", tmp_path / "results"
    file.write_text(marked())
    arguments = [f"--readme={file}", f"--results={results}"]
    assert readme.main(arguments) == 1  # no run yet
    save(run, results)
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    save(made_up_run(speedup=12.0, when="2026-02-02T00:00:00"), results, "0002_y.json")
    assert readme.main([*arguments, "--check"]) == 1
    assert "stale; run: make readme" in capsys.readouterr().out


def test_newest_complete_run_wins_whatever_lies_beside_it(run, tmp_path):
    save(run, tmp_path, "0001_x.json")
    save(made_up_run(when="2026-03-03", complete=False), tmp_path, "0002_partial.json")
    save(made_up_run(when="2026-04-04", machine="other"), tmp_path)
    (tmp_path / "test-machine/0003_broken.json").write_text("{")
    (tmp_path / "test-machine/0004_alien.json").write_text('{"benchmarks": []}')
    file, _ = record.newest_complete(tmp_path, "test-machine")
    assert file.name == "0001_x.json"


def test_report_command_writes_the_page_of_the_newest_complete_run(run, tmp_path):
    save(run, tmp_path)
    done = CliRunner().invoke(report, ["--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "test-machine/report/index.html").exists()


def test_report_command_names_the_field_of_a_bad_record(run, tmp_path):
    del run["mbperf"]["processes"]
    file = save(run, tmp_path)
    done = CliRunner().invoke(report, [str(file)])
    assert done.exit_code == 1
    assert "mbperf.processes is missing" in done.output


def test_readme_of_this_repository_is_not_stale(tmp_path):
    # Of the runs that are checked in: one's own latest run is no reason to change README.
    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    assert not readme.is_stale(ROOT / "README.md", tmp_path / "results"), "run: make readme"
