"""`mbperf bench --against REV`: two trees are measured in one run, and nothing of it stays behind."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
import pytest
from toy_tree import ToyTree

from mbperf.against import command, table
from mbperf.against.command import Request, bench_against

pytestmark = pytest.mark.timed


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy tree, with a folder of its own for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "tree").mkdir()
    tree = ToyTree(tmp_path / "tree")
    yield tree
    assert len(tree.worktrees()) == 1
    assert not list((tmp_path / "temporary").iterdir())
    assert not processes_in(tmp_path)


def processes_in(folder: Path) -> list[list[str]]:
    """The command lines of all processes that name a folder."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(str(folder) in word for word in line[2:])]


def raced(toy: ToyTree, *selection: str, **options) -> tuple[int, dict]:
    record = toy.folder.parent / "record.json"
    request = Request("HEAD", selection, json_file=record, **options)
    return bench_against(toy.folder, request), json.loads(record.read_text())


def test_a_slower_and_a_faster_group_are_told_from_one_that_is_the_same(toy, capsys):
    toy.bench("Group('a', 1e-3)", "Group('b', 1e-3)", "Group('c', 1e-3)", "Group('gone', 1)")
    toy.commit()
    toy.bench("Group('a', 1.03e-3)", "Group('b', 1e-3)", "Group('c', 0.9e-3)", "Group('new', 1)")
    code, record = raced(toy, fail_on_worse=True)
    assert code == 1
    rows = {row["group"]: row for row in record["groups"]}
    assert {name: row["verdict"] for name, row in rows.items()} == {"a": "WORSE", "b": "SAME", "c": "BETTER"}
    assert rows["a"]["ratio"] == pytest.approx(1 / 1.03)
    assert rows["a"]["low"] < 1 / 1.03 < rows["a"]["high"] < 0.99
    assert rows["a"]["this_s"] == pytest.approx(1.03e-3)
    assert rows["a"]["processes"] == 6
    assert record["left_out"] == {"gone": "only in the revision", "new": "not in the revision"}
    shown = capsys.readouterr().out
    assert "not compared: new: not in the revision" in shown
    assert "3 groups: 1 BETTER, 1 WORSE, 1 SAME." in shown


def test_groups_are_selected_as_pytest_does_and_same_is_no_failure(toy):
    toy.bench("Group('wide', 1e-3)", "Group('narrow', 1e-3)")
    toy.commit()
    code, record = raced(toy, "bench/bench_toy.py", "-k", "narrow", fail_on_worse=True)
    assert code == 0
    assert [(row["group"], row["verdict"]) for row in record["groups"]] == [("narrow", "SAME")]


def test_what_is_wrong_dies_or_differs_is_named_and_not_timed(toy):
    toy.bench("Group('a', 1)", "Group('b', 1)", "Group('c', 1, make_inputs=lambda: (1,))", "Group('d', 1)")
    toy.commit()
    die = "lambda: os.kill(os.getpid(), signal.SIGSEGV)"
    inputs = "lambda: (type('T', (), {'shape': (2,), 'dtype': 'f32'})(),)"
    toy.bench(
        "Group('a', 1, wrong='off by one')",
        f"Group('b', 1, call={die})",
        f"Group('c', 1, make_inputs={inputs})",
        "Group('d', 1, make_inputs=lambda: 1 / 0)",
    )
    code, record = raced(toy, fail_on_worse=True)
    assert code == 1
    assert {row["group"]: row["lost"] for row in record["groups"]} == {
        "a": "the working tree is wrong: off by one",
        "b": "the working tree: its process died of SIGSEGV",
        "c": "its inputs differ between the trees",
        "d": "the working tree: ZeroDivisionError: division by zero",
    }
    assert all("ratio" not in row for row in record["groups"])


def test_equal_sources_are_copied_and_others_are_built(toy, capsys):
    toy.bench("Group('a', 1e-3)")
    toy.commit()
    raced(toy)
    assert "the same sources in both trees: copying it" in capsys.readouterr().err
    toy.write("csrc/new.h", "int b;\n")
    raced(toy)
    assert f"building the extension of {toy.git('rev-parse', 'HEAD')[:12]}" in capsys.readouterr().err


def test_a_revision_that_does_not_build_says_so_in_the_compilers_words(toy):
    toy.write("csrc/a.cpp", "nonsense;\n")
    toy.bench("Group('a', 1e-3)")
    toy.commit()
    toy.write("csrc/a.cpp", "int a;\n")
    with pytest.raises(click.ClickException, match=r"does not build: a.cpp:3:1: error: 'nonsense' does not"):
        raced(toy)


def test_an_unknown_revision_is_named(toy):
    toy.commit()
    with pytest.raises(click.ClickException, match=r"--against no-such: git knows no such revision in "):
        bench_against(toy.folder, Request("no-such", ()))


def test_outside_a_checkout_there_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(click.ClickException, match=r"--against HEAD: .* is no git checkout"):
        bench_against(tmp_path, Request("HEAD", ()))


def test_a_tree_whose_benchmarks_do_not_import_says_why(toy):
    toy.write("bench/bench_toy.py", "import no_such_module\n")
    toy.commit()
    _, record = raced(toy)
    assert "No module named 'no_such_module'" in record["not_collected"]["that"][0]
    assert record["groups"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["building", "measuring"])
def test_interrupted_it_leaves_no_process_and_no_worktree(toy, number, stage):
    """The fixture looks for both; what is interrupted would take a minute."""
    mark = toy.folder.parent / "mark"
    wait = f"(pathlib.Path({str(mark)!r}).touch(), time.sleep(60))"
    if stage == "building":
        toy.write("setup.py", f"import pathlib, time\n{wait}\n")
        toy.bench("Group('a', 1)")
    else:
        toy.bench(f"Group('a', 1, call=lambda: {wait})")
    toy.commit()
    code = (
        f"import tempfile, pathlib; tempfile.tempdir = {tempfile.gettempdir()!r}\n"
        "from mbperf.against.command import Request, bench_against\n"
        f"bench_against(pathlib.Path({str(toy.folder)!r}), Request('HEAD', ()))\n"
    )
    # A shell starts what it puts in the background with SIGINT ignored, and so these tests there.
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    end = time.monotonic() + 60
    while not mark.exists():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(30) != 0


def test_a_budget_that_is_spent_leaves_the_rest_undecided(toy, monkeypatch):
    toy.bench("Group('a', 1e-3)")
    toy.commit()
    code, record = raced(toy, budget_s=1e-3, fail_on_worse=True)
    assert code == 0
    assert [row["verdict"] for row in record["groups"]] == ["CANNOT TELL"]
    assert table.cells(record["groups"][0])[3] == ""


def test_the_table_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bounds = {"ratio": 0.97, "low": 0.96, "high": 0.98}
    row = {"group": "cross_entropy 512x32000 f32 fwd+bwd", "verdict": "CANNOT TELL", "processes": 6}
    record = {
        "this": "abc", "that": "def", "load_before": 0.5, "took_s": 60.0, "machine": "one", "threads": 2,
        "heap": "recycled", "left_out": {"x cold": "it is cold"}, "not_collected": {},
        "groups": [row | bounds | {"this_s": 123e-6, "that_s": 125e-6, "control": bounds}],
    }  # fmt: skip
    table.show(record)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (first,) = [line for line in lines if "cross_entropy" in line]
    assert "123 us 125 us 0.970 [0.960, 0.980] [0.960, 0.980] CANNOT TELL" in " ".join(first.split())


def test_progress_tells_what_is_left(capsys):
    progress = command.Progress(command.LockstepRun({}, (), "fresh"), 3, time.monotonic(), 90.0)
    progress.before_pass(0)
    assert capsys.readouterr().err == "mbperf: pass 1, at most 1:30 left of 3 groups\n"
