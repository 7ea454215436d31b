"""The `race` fixture in real pytest runs on a tiny benchmark folder: what is measured, saved and compared."""

import itertools
import json
import os
import re
import statistics
import sys
from pathlib import Path

import pytest
import scipy.stats  # noqa: F401 -- runs in this process forget what they import, and numpy loads only once

import mbperf.measure.fork
import mbperf.measure.machine
import mbperf.measure.roof
import mbperf.plugin.summary
from mbperf.plugin.session import PROFILES
from mbperf.report import record

pytest_plugins = ["pytester"]

CONFTEST = """
from pathlib import Path
from mbperf.plugin.store import keep_results_in

def pytest_configure(config):
    here = Path(__file__).parent
    keep_results_in(config, here.parent / "results", here)
"""

BENCH = """
import pytest, torch
from mbperf.measure.group import Group
from mbperf.measure.traffic import copy_traffic

torch.set_num_threads(1)
SUM = torch.tensor(0.0)

def add(x): return (x + x,)
def twice(x): return (x * 2,)
{plant}

def group(n):
    return Group(
        "double", str(n), lambda: (torch.randn(n),),
        {{"fused": {fused}, "naive": twice, "torch": lambda x: (torch.mul(x, 2),)}},
        lambda x: (x.double() * 2,), copy_traffic(4 * n), floors={floors}, facts={{"N": n}},
        optional={{"extra": lambda: twice}},
    )

@pytest.mark.race([group(n) for n in (100, 200)])
def test_double(race):
    race()
"""

RUN = ("bench/", "--benchmark-compare", "--mbperf-budget=0.4", "-p", "no:cacheprovider")
# A working extension and a free machine are needed to measure; what is measured is not asserted here.


@pytest.fixture(autouse=True)
def may_fork(monkeypatch):
    """Other tests have started threads in this process; this folder computes on one alone."""
    monkeypatch.setattr(mbperf.measure.fork, "threads", lambda: 1)


@pytest.fixture
def folder(pytester):
    """A benchmark folder with two groups."""

    def make(plant="", fused="add", floors="{}"):
        pytester.makefile(".ini", pytest="[pytest]\npython_files = bench_*.py")
        (pytester.path / "bench").mkdir(exist_ok=True)
        (pytester.path / "bench/conftest.py").write_text(CONFTEST)
        code = BENCH.format(plant=plant, fused=fused, floors=floors)
        (pytester.path / "bench/bench_double.py").write_text(code)
        return pytester

    return make


@pytest.fixture(scope="module")
def first_run():
    """What the first complete run of that folder left, by path; filled by whoever needs it first."""
    return {}


@pytest.fixture
def recorded(folder, first_run):
    """A benchmark folder with one complete run in its store, measured once for all tests."""
    pytester = folder()
    if not first_run:
        assert pytester.runpytest_inprocess(*RUN).ret == 0
        (file,) = pytester.path.glob("results/*/*/*.json")
        first_run[file.relative_to(pytester.path)] = file.read_text()
    for path, content in first_run.items():
        (pytester.path / path).parent.mkdir(parents=True, exist_ok=True)
        (pytester.path / path).write_text(content)
    return pytester


def saved(pytester, folder="results/*/*"):
    """The saved runs, oldest first, each row with what its group shares."""
    return [record.load(file) for file in sorted(pytester.path.glob(f"{folder}/*.json"))]


def text(result):
    return "\n".join(result.outlines + result.errlines)


def test_first_run_has_nothing_to_compare_with_and_second_compares(folder):
    pytester = folder()
    first = pytester.runpytest_inprocess(*RUN)
    assert first.ret == 0
    assert "no complete run to compare with yet" in text(first)
    assert "mbperf: ratios inside this run" in text(first)
    second = pytester.runpytest_inprocess(*RUN)
    assert second.ret == 0
    assert "Comparing against benchmarks from" in text(second)
    assert "change" in text(second)
    assert re.search(r"test_double\[100-fused\] \(NOW\)", text(second))
    one, two = saved(pytester)
    assert one["mbperf"]["complete"]
    assert two["mbperf"]["complete"]


def by_process(row):
    """The seconds of each round, of one process after the other."""
    ends = [0, *itertools.accumulate(row["extra_info"]["rounds"])]
    return [row["stats"]["data"][begin:end] for begin, end in itertools.pairwise(ends)]


def test_every_row_carries_its_figures_and_true_seconds(folder):
    pytester = folder()
    result = pytester.runpytest_inprocess(*RUN, "--benchmark-save-data")
    assert "goes to .benchmarks/, not to the runs on record" in text(result)
    assert not saved(pytester)
    (run,) = saved(pytester, ".benchmarks/*")
    names = [row["name"] for row in run["benchmarks"]]
    assert sorted(names) == sorted(
        f"test_double[{n}-{c}]"
        for n in (100, 200)
        for c in ["fused", "again", "naive", "torch", "roof", "null"]
    )
    fused = next(row for row in run["benchmarks"] if row["name"] == "test_double[100-fused]")
    info = fused["extra_info"]
    assert set(info["ratios"]) == {"naive", "torch", "roof"}
    assert info["time_s"] == pytest.approx(fused["stats"]["median"], rel=1e-5)
    assert 1e-7 < info["time_s"] < 1e-2
    assert len(fused["stats"]["data"]) == sum(info["rounds"])
    naive = next(row for row in run["benchmarks"] if row["name"] == "test_double[100-naive]")
    # The first rounds of a process are both's; naive may have left after them.
    processes = zip(by_process(naive), by_process(fused), strict=True)
    paired = [[n / f for n, f in zip(*both, strict=False)] for both in processes]
    ratio = statistics.geometric_mean(map(statistics.median, paired))
    assert info["ratios"]["naive"]["ratio"] == pytest.approx(ratio, rel=0.01)


def test_saved_runs_satisfy_their_schema(recorded):
    (file,) = recorded.path.glob("results/*/*/*.json")
    assert len(record.subjects(record.load(file))) == 2


def test_a_run_with_rows_of_a_gpu_names_it(folder, monkeypatch):
    told = {"name": "NVIDIA Test 1", "machine": "nvidia-test-1"}
    monkeypatch.setattr(mbperf.measure.machine, "gpu", lambda: told)
    pytester = folder(plant='DEVICE = "cuda"')
    file = pytester.path / "bench/bench_double.py"
    file.write_text(file.read_text().replace('facts={"N": n}', 'facts={"N": n, "device": DEVICE}'))
    assert pytester.runpytest_inprocess(*RUN).ret == 0
    (run,) = saved(pytester)
    assert run["mbperf"]["gpu"] == told
    assert record.machine_name(run) == "nvidia-test-1"
    assert list(run["mbperf"]["geometric_means"]) == ["double cuda"]


def test_a_partial_run_is_kept_but_never_compared_with(recorded):
    pytester = recorded
    partial = pytester.runpytest_inprocess(*RUN, "-k", "fused")
    assert partial.ret == 0
    partial.assert_outcomes(passed=2, deselected=10)
    assert "x torch" in text(partial)  # the ratio needs torch even where its row was not asked for
    assert [run["mbperf"]["complete"] for run in saved(pytester)] == [True, False]
    assert "10 tests were deselected" in saved(pytester)[1]["mbperf"]["incomplete_because"]
    third = pytester.runpytest_inprocess(*RUN)
    assert "0001_" in next(line for line in text(third).splitlines() if "Comparing against" in line)


def test_named_tests_smoke_runs_and_failures_are_incomplete(folder):
    pytester = folder()
    pytester.runpytest_inprocess("bench/bench_double.py::test_double", *RUN[1:])
    pytester.runpytest_inprocess(*RUN, "--mbperf-profile=smoke")
    reasons = [run["mbperf"]["incomplete_because"] for run in saved(pytester)]
    assert reasons == ["single tests were named", "profile smoke"]


def test_from_a_sub_directory_with_a_foreign_run_to_compare(recorded, monkeypatch):
    pytester = recorded
    (file,) = pytester.path.glob("results/*/*/*.json")
    foreign = json.loads(file.read_text())
    foreign["machine_info"] = foreign["mbperf"]["hardware"] = {"name": "other-machine"}
    other = pytester.path / "results/other-machine/0001_x.json"
    other.parent.mkdir()
    other.write_text(json.dumps(foreign))
    monkeypatch.chdir(pytester.path / "bench")
    bare = pytester.runpytest_inprocess("--benchmark-compare", *RUN[2:])
    assert bare.ret == 0
    assert "other-machine" not in text(bare)
    asked = pytester.runpytest_inprocess(f"--benchmark-compare={other}", *RUN[2:], "--mbperf-gate")
    assert asked.ret == 0
    assert "of another machine (other-machine): its times only inform" in text(asked)
    assert "machine_info is different" not in text(asked)
    assert [row["fullname"] for row in saved(pytester)[0]["benchmarks"]] == [
        row["fullname"] for row in saved(pytester)[-1]["benchmarks"]
    ]


def test_broken_files_in_the_store_are_passed_over(recorded):
    pytester = recorded
    (file,) = pytester.path.glob("results/*/*/*.json")
    (file.parent / "0007_broken.json").write_text('{"benchmarks": [')
    (file.parent / "0008_alien.json").write_text("[1, 2]")
    second = pytester.runpytest_inprocess(*RUN)
    assert second.ret == 0
    assert file.stem in next(line for line in text(second).splitlines() if "Comparing against" in line)


def test_warnings_as_errors_on_first_run_second_run_and_empty_selection(folder):
    pytester = folder()
    assert pytester.runpytest_inprocess(*RUN, "-W", "error").ret == 0
    # What is imported for the first time warns, if anything does.
    assert pytester.runpytest_subprocess(*RUN, "-W", "error").ret == 0
    assert pytester.runpytest_inprocess(*RUN, "-W", "error", "-k", "nothing").ret == 5


@pytest.mark.parametrize("problem", ["a file in its place", "no permission"])
def test_a_results_folder_that_cannot_be_written_is_said_first(folder, problem, monkeypatch):
    pytester = folder()
    if problem == "a file in its place":
        (pytester.path / "results").write_text("")
    else:
        # Root may write anywhere, so the system's answer is played.
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("mbperf.plugin.store.tempfile.TemporaryFile", refuse)
    result = pytester.runpytest_inprocess(*RUN)
    assert result.ret == 0
    assert "this run will not be saved" in text(result)
    assert "mbperf: ratios inside this run" in text(result)


def test_disable_means_correctness_only(folder):
    pytester = folder()
    result = pytester.runpytest_inprocess("bench/", "--benchmark-disable")
    result.assert_outcomes(passed=12)
    assert not saved(pytester)
    wrong = folder(fused="lambda x: (x * 3,)").runpytest_inprocess("bench/", "--benchmark-disable")
    wrong.assert_outcomes(passed=8, failed=4)


def test_native_outputs_keep_working(folder):
    pytester = folder()
    # In a process of its own: importing what draws the histogram replaces how plugins are found.
    result = pytester.runpytest_subprocess(
        *RUN, "--benchmark-json=out.json", "--benchmark-histogram=picture", "--benchmark-only", "-k", "100"
    )
    assert result.ret == 0
    assert list(pytester.path.glob("picture*.svg"))
    out = json.loads((pytester.path / "out.json").read_text())
    assert len(out["benchmarks"]) == 6
    assert out["mbperf"]["schema"] == 2


def test_path_swallowed_by_compare_is_caught(folder):
    pytester = folder()
    result = pytester.runpytest_inprocess("--benchmark-compare", "bench/")
    assert result.ret == 4
    assert "write: pytest bench/ --benchmark-compare" in text(result)


def test_optional_contenders_come_when_asked_for(folder):
    pytester = folder()
    assert "extra" not in text(pytester.runpytest_inprocess("bench/", "--collect-only", "-q"))
    asked = pytester.runpytest_inprocess("bench/", "--collect-only", "-q", "--mbperf-with=extra")
    assert "test_double[100-extra]" in text(asked)


def test_fresh_processes_each_contribute(folder):
    assert PROFILES["default"].processes == 3
    pytester = folder()
    # In a process of its own, whose threads are counted.
    result = pytester.runpytest_subprocess(*RUN)
    assert result.ret == 0, text(result)
    assert "0 of them in both states of the heap: 2 processes to judge, 6 to measure" in text(result)
    (run,) = saved(pytester)
    assert run["mbperf"]["processes"] == 3
    assert all(len(row["extra_info"]["rounds"]) == 3 for row in run["benchmarks"])


def test_a_bench_file_that_starts_threads_is_told_where_they_come_from(folder):
    pytester = folder(
        plant="import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    result = pytester.runpytest_subprocess(*RUN)
    assert result.ret != 0
    assert "this one has 1 more thread(s)" in text(result)


def test_a_process_that_crashes_is_a_failed_row(folder):
    pytester = folder(
        plant="import os, signal\ndef crash(x): os.kill(os.getpid(), signal.SIGSEGV)", fused="crash"
    )
    result = pytester.runpytest_inprocess(*RUN, "-k", "100")
    result.assert_outcomes(failed=6, deselected=6)
    assert "double 100: not measured: the process died of SIGSEGV" in text(result)


def test_what_became_worse_fails_the_run_on_request_and_is_on_record(recorded, monkeypatch):
    pytester = recorded
    (file,) = pytester.path.glob("results/*/*/*.json")
    earlier = json.loads(file.read_text())
    for row in earlier["benchmarks"]:
        for ratio in row["extra_info"]["ratios"].values():
            ratio["processes"] = [1000.0, 1000.0, 1000.0]
    file.write_text(json.dumps(earlier))
    monkeypatch.setattr("mbperf.measure.change.CONFIDENCE", 0.5)  # two groups alone know little of each other
    told = pytester.runpytest_inprocess(*RUN)
    assert told.ret == 0
    assert "WORSE" in text(told)
    failed = pytester.runpytest_inprocess(*RUN, "--mbperf-fail-on-worse", f"--benchmark-compare={file}")
    assert failed.ret == 1
    assert "double 100: WORSE than the compared run: 0.0" in text(failed)
    rows = [row["extra_info"] for row in saved(pytester)[-1]["benchmarks"]]
    changed = {row["contender"]: row["change"] for row in rows if "change" in row}
    assert list(changed) == ["fused"]
    assert changed["fused"]["verdict"] == "WORSE"
    assert changed["fused"]["high"] < 1


def test_a_record_is_lean_and_pytest_benchmark_reads_it(recorded):
    pytester = recorded
    (file,) = pytester.path.glob("results/*/*/*.json")
    written = file.read_text()
    rows = [line for line in written.splitlines() if line.startswith('{"group":')]
    assert len(rows) == 8  # of two groups, without their control and null call
    assert len(written) < 1200 * len(rows)  # beside 8 rows, what a file says once weighs much
    assert max(map(len, rows)) < 1000
    assert not re.search(r"UNSERIALIZABLE|0x|\"data\"", written)
    floats = re.findall(r"\d+\.\d+(?:e-?\d+)?", "".join(rows))
    assert max(len(re.sub(r"e.*|\D", "", one).strip("0")) for one in floats) <= 6
    listed = pytester.run(
        sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--group-by=param:race", "--sort=name"
    )
    assert listed.ret == 0
    assert "benchmark 'race=naive': 2 tests" in text(listed)


STALE = """
_kept = {}
def stale(x):
    # By address and version, as a cache that means well would.
    key = (x.data_ptr(), x._version)
    if key not in _kept:
        _kept[key] = (x + x).clone()
    return (_kept[key].clone(),)
"""
SKIPS = """
def skips(x):
    out = torch.empty_like(x)
    torch.mul(x[:50], 2, out=out[:50])
    return (out,)
"""
OWN_BUFFER = """
_out = torch.zeros(0)
_calls = 0
def own_buffer(x):
    global _out, _calls
    _calls += 1
    if _calls < 2:
        _out = x + x
    return (_out,)
"""
CHANGES = """
def changes(x):
    y = x + x
    x[0] += 1
    return (y,)
"""


@pytest.mark.parametrize(
    ("plant", "name"),
    [(STALE, "stale"), (SKIPS, "skips"), (OWN_BUFFER, "own_buffer"), (CHANGES, "changes")],
)
def test_a_contender_that_cheats_loses_its_timing(folder, plant, name):
    pytester = folder(plant=plant, fused=name)
    result = pytester.runpytest_inprocess(*RUN, "-k", "100")
    assert result.ret == 1
    assert "fused is wrong" in text(result)
    rows = [row["name"] for run in saved(pytester) for row in run["benchmarks"]]
    assert "test_double[100-fused]" not in rows


def test_work_not_done_shows_against_the_roof(pytester, folder):
    # Right by chance (the answer is a constant), and faster than its stated bytes can be moved.
    lazy = folder()
    code = (lazy.path / "bench/bench_double.py").read_text()
    code = code.replace("torch.randn(n)", "torch.zeros(n)").replace("4 * n", "400_000 * n")
    code = code.replace("(x.double() * 2,)", "(SUM,)").replace("return (x + x,)", "return (SUM + 0,)")
    code = code.replace("return (x * 2,)", "return (SUM * 2,)").replace("torch.mul(x, 2)", "SUM + 0")
    (lazy.path / "bench/bench_double.py").write_text(code)
    result = lazy.runpytest_inprocess(*RUN, "-k", "100")
    assert "%!" in text(result)
    assert "of the memory limit: its bytes are miscounted" in text(result)


def test_floors_fail_only_through_the_gate(folder):
    pytester = folder(floors='{"torch": 50.0}')
    told = pytester.runpytest_inprocess(*RUN)
    assert (told.ret, "the floor is 50x" in text(told)) == (0, True)
    result = pytester.runpytest_inprocess(*RUN, "--mbperf-gate")
    assert (result.ret, "the floor is 50x" in text(result)) == (11, True)


def test_without_the_fixture_the_plugin_does_nothing(pytester):
    pytester.makepyfile("def test_plain(benchmark): benchmark(int)")
    result = pytester.runpytest_inprocess("--benchmark-only")
    assert result.ret == 0
    assert "mbperf" not in re.sub(r"plugins: .*", "", text(result)).replace(os.fspath(Path.cwd()), "")
    assert not list(pytester.path.glob("results"))


def test_loading_the_plugin_imports_no_torch(pytester):
    code = "import sys, mbperf.plugin.hooks; sys.exit('torch' in sys.modules)"
    assert pytester.run(sys.executable, "-c", code).ret == 0
