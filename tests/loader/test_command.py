"""The command: its first line, widths, JSON, exit codes, files it writes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import subjects  # noqa: F401  importable by path in trials
from click.testing import CliRunner
from retrying import with_enough_time
from rich.console import Console
from test_candidates import W, advised, candidates_of, trial

from mbperf.loader import demos
from mbperf.loader.command import Duration, argument, loader
from mbperf.loader.output.display import not_tried, show
from mbperf.loader.output.picture import draw, families
from mbperf.loader.processes.forkserver import import_object
from mbperf.loader.records import Profile
from mbperf.loader.settings import Settings
from mbperf.loader.source import Source

pytestmark = pytest.mark.timed


def run(*arguments):
    return CliRunner().invoke(loader, list(arguments), catch_exceptions=False)


def test_json_is_one_object_with_the_promised_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["subjects:sleeps", "--workers", "0,2", "--batch-size", "16", "--json", "--save"]
    result = with_enough_time(
        lambda seconds: run(*asked, "--budget", f"{seconds}s"),
        lambda result: result.exit_code == 0,
        limits_s=(6, 18, 54),
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    for key in (
        "verdict",
        "recommendation",
        "confidence",
        "rate_samples_per_s",
        "idle_fraction",
        "first_batch_s",
        "trials",
    ):
        assert key in data
    assert data["recommendation"]["num_workers"] == 2
    assert all("settings" in trial and "infeasible" in trial for trial in data["trials"])
    saved = list((tmp_path / "results").glob("*/loader/*.json"))
    assert saved
    assert json.loads(saved[-1].read_text())["seed"] == 0
    assert saved[-1].with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def source_born_here(monkeypatch):
    """A path's dataset is made in a fork of the test's own process: no seconds for starting a fresh one."""

    def source(path, arguments=None, fixed=None):
        return Source(live=partial(import_object(path), **(arguments or {})), fixed=fixed or {})

    monkeypatch.setattr("mbperf.loader.command.Source", source)


@pytest.mark.parametrize("demo", demos.NAMES)
def test_demos_run_and_the_verdict_comes_first(demo, source_born_here):
    result = with_enough_time(
        lambda seconds: run("--demo", demo, "--budget", f"{seconds}s", "--workers", "0,2"),
        lambda result: result.exit_code in (0, 4),
        limits_s=(4, 12, 36),
    )
    assert result.exit_code in (0, 4), result.stderr
    assert result.stdout.startswith(("Loader-bound", "Compute-bound", "Start-up-bound"))
    datasets = ["dataset", "mbperf.TensorDataset(*tensors)"][: 2 if demo == "lesson" else 1]
    assert any(f"DataLoader({dataset}, batch_size=64" in result.stdout for dataset in datasets)


def test_nothing_runs_is_exit_code_3():
    result = with_enough_time(
        lambda s: run("subjects:Raises", "--budget", f"{s}s", "--workers", "0,2", "--no-shuffle"),
        lambda result: result.exit_code == 3,
        limits_s=(30, 90),
    )
    assert result.exit_code == 3
    assert result.stdout.startswith("Infeasible: dataset[77] raises ValueError: broken sample")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_termination_end_with_what_is_known_and_leave_nothing(number, tmp_path):
    command = [sys.executable, "-m", "mbperf", "loader", "subjects:sleeps", "--budget", "60s"]
    known = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=os.environ | known, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    while not (started := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)  # it has a child as soon as it forks, but knows that only when the child has executed
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.startswith(("No answer: interrupted", "Loader-bound", "Start-up-bound"))
    assert "Interrupted" in out.splitlines()[-1]
    assert not [child for child in started if child.is_running()]
    assert not list(Path(tmp_path).iterdir())


def test_ctrl_c_before_anything_runs_is_exit_code_130(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mbperf.loader.command.answer", interrupted)
    result = run("--demo", "lesson")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either"),
        (["a:b", "--demo", "lesson"], "give either"),
        (["a:b", "--workers", "many"], "expected numbers such as 0,1,2,4, got 'many'"),
        (["a:b", "--workers", "-1"], "expected numbers such as 0,1,2,4"),
        (["a:b", "--budget", "soon"], "expected a time such as 5ms"),
        (["a:b", "--budget", "1s"], "--budget must be at least 3s"),
        (["a:b", "--contexts", "thread"], "default, fork, spawn, forkserver"),
        (["a:b", "--arg", "samples"], "expected NAME=VALUE"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_module_that_is_not_there_is_one_line():
    result = run("no_such_module:dataset", "--budget", "60s")
    assert result.exit_code == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in result.stderr
    assert "Traceback" not in result.stderr


def test_times_and_arguments():
    assert [Duration().convert(v, None, None) for v in ("5ms", "60s", "2m", "0.5", "250us")] == pytest.approx(
        [0.005, 60, 120, 0.5, 2.5e-4]
    )
    assert argument("samples=100") == ("samples", 100)
    assert argument("folder=/data/x=1") == ("folder", "/data/x=1")


def example():
    """A profile with every part a report can have."""
    draw_, candidates = random.Random(1), candidates_of({W(0): 480, W(2): 912.5, W(4): 1790, W(8): 1802})
    slow = candidates.add(trial(W(1), 470, 0.02, draw_))
    profile = advised(candidates)
    profile.trials = [t for candidate in candidates.by_settings.values() for t in candidate.trials]
    profile.trials[
        0
    ].infeasible = "/dev/shm is full (raise it, e.g. docker run --shm-size): bus error in worker 1"
    profile.lint = [
        {"code": "big_python_lists", "words": "dataset.paths holds about 200,000 Python objects (14 MB)"}
    ]
    profile.notes = ["mbperf.collate left out: your collate_fn makes another batch than it would"]
    profile.not_tried = [
        {"label": "6 workers", "settings": W(6).as_dict(), "predicted_samples_per_s": 1795.0}
    ]
    profile.stages = {
        "getitem_s": 0.002, "collate_s": 1.2e-4, "transfer_s": 9e-4,
        "busy_share": {"worker-0": 0.99, "worker-1": 0.97},
        "imbalance": 0.02, "slowest": [(107, 0.04), (207, 0.04)], "pickle_s": None,
        "first_batch": {"total_s": 0.2, "start_worker_s": 0.03, "fetch_and_collate_s": 0.15,
                        "hand_over_s": 0.02},
        "memory": {"pss_bytes": 3e8, "uss_bytes": 1e8, "main_pss_bytes": 1e8, "workers_pss_bytes": [1e8, 1e8],
                   "shared_bytes": 2e6, "descriptors": 21},
        "memory_slope_bytes_per_1000": 1200.0,
    }  # fmt: skip
    profile.costs = {"getitem_cpu_s": 1e-4, "getitem_s": 2e-3, "batch_bytes": 200_000}
    assert slow.feasible
    return profile


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_and_says_everything(width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(example(), console)
    lines = console.export_text().splitlines()
    assert lines[0].startswith("Loader-bound for steps shorter than 35.")
    longest = max(len(line) for line in lines[3:])
    assert longest <= width
    text = "\n".join(lines)
    for words in ("4 workers", "Infeasible", "/dev/shm is full", "getitem", "slowest", "107 (40 ms)",
                  "PSS 300 MB", "trap", "note", "not tried", "slower", "num_workers=8"):  # fmt: skip
        assert words in text, words
    assert ("wait p50" in text) == (width == 120)


def test_what_was_not_tried_is_told_in_few_words():
    left = [W(3), W(1), Settings(collate="mbperf").with_workers(1)]
    rows = [{"label": s.label(), "settings": s.as_dict()} for s in left]
    assert not_tried(Profile(not_tried=rows)) == (
        "1, 3 workers, batch 64; 1 worker, batch 64, mbperf.collate"
    )


def test_the_picture_has_a_line_over_workers(tmp_path):
    profile = example()
    assert [row["settings"]["num_workers"] for row in families(profile)["batch 64"]] == [0, 1, 2, 4, 8]
    assert draw(profile, tmp_path / "x.png").stat().st_size > 10_000
    assert b"<svg" in draw(profile, tmp_path / "x.svg").read_bytes()
    with pytest.raises(ValueError, match="no measured configuration"):
        draw(Profile(), tmp_path / "y.png")


def test_demo_datasets(tmp_path):
    images = demos.images(str(tmp_path))
    assert len(images) == 512
    pixels, label = images[3]
    assert pixels.shape == (3, 160, 160)
    assert 20 < pixels.float().std() < 120
    assert label == 3
    batch = next(iter(demos.tokens(200)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == batch["input_ids"].shape[1]
    assert lengths.min() < lengths.max()
    assert len(demos.lesson(10)) == 10
    assert demos.slow_disk()[3][1] == 3
