"""Keep the runs of a benchmark folder: one folder per kind of machine, complete runs marked as baselines.

A benchmark folder's conftest calls `keep_results_in`; without that call pytest-benchmark's own storage holds.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mbperf.measure import machine
from mbperf.plugin.hooks import BASELINE, SESSION, entries
from mbperf.report import record
from mbperf.report.record import saved_rows

UNSET_STORAGE = "file://./.benchmarks"  # pytest-benchmark's default
DIGITS = 6  # of a saved sample; the clock resolves fewer


def keep_results_in(config: pytest.Config, results: Path, bench: Path) -> None:
    """Save every run under `results`/<machine>/ and compare with the newest complete one there.

    Args:
        config: as pytest gives it to `pytest_configure`.
        results: the folder that holds all machines' runs.
        bench: the folder whose bench_*.py files together make a complete run.

    Raises:
        pytest.UsageError: pytest-benchmark, or this plugin's entry point, is not installed.
    """
    option = config.option
    for plugin, attribute in (("pytest-benchmark", "benchmark_storage"), ("mbperf", "mbperf_profile")):
        if not hasattr(option, attribute):
            raise pytest.UsageError(
                f"{bench.name}: {plugin}'s pytest plugin is not installed; run: make setup"
            )
    store = ResultStore(config, results / machine.name(), bench)
    config.pluginmanager.register(store, "mbperf-store")
    if option.benchmark_storage != UNSET_STORAGE:
        return
    store.choose_storage()
    store.choose_baseline()


@dataclass(eq=False)
class ResultStore:
    """The hooks that save a run and find the run to compare it with."""

    config: pytest.Config
    folder: Path
    bench: Path
    deselected: int = 0
    notes: list[str] = field(default_factory=list)

    def choose_storage(self) -> None:
        """Save here unless that cannot work, which is better said before measuring than after."""
        option = self.config.option
        option.benchmark_storage = f"file://{self.folder}"
        if option.benchmark_disable or option.collectonly:
            return
        if problem := _unwritable(self.folder):
            self.notes.append(f"this run will not be saved: {problem}")
            option.benchmark_autosave = option.benchmark_save = None
            return
        option.benchmark_save_data = True
        if not option.benchmark_autosave and not option.benchmark_save:
            from pytest_benchmark.utils import get_tag

            option.benchmark_autosave = get_tag()

    def choose_baseline(self) -> None:
        """Resolve a bare --benchmark-compare among complete runs of this kind of machine."""
        if self.config.option.benchmark_compare is not True:
            return
        found = record.newest_complete(self.folder, machine.name())
        if found:
            self.config.option.benchmark_compare = str(found[0])
        else:
            self.config.option.benchmark_compare = []
            self.notes.append(f"no complete run to compare with yet under {self.folder}")

    def pytest_report_header(self) -> list[str]:
        """Show where the run goes."""
        return [f"mbperf: {note}" for note in [f"machine {machine.name()}", *self.notes]]

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count what was left out."""
        self.deselected += len(items)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Iterator[None]:
        """Say what changed, before it is saved.

        Nothing measured, nothing to save: pytest-benchmark would warn, and under -W error crash.
        """
        native = getattr(self.config, "_benchmarksession", None)
        if native is not None and not native.benchmarks:
            native.save = native.autosave = None
        elif native is not None:
            self._tell_changes(native.benchmarks)
        return (yield)

    def _tell_changes(self, benchmarks: list[Any]) -> None:
        stash = self.config.stash
        run, baseline = stash.get(SESSION, None), stash.get(BASELINE, None)
        if run is None or baseline is None:
            return
        from mbperf.measure.change import changes

        now = run.subject_rows()
        for name, change in changes(now, saved_rows(baseline)).items():
            now[name]["change"] = change
        for one in benchmarks:
            row = now.get(one.group, {})
            if "change" in row and one.extra_info.get("contender") == row["contender"]:
                one.extra_info["change"] = row["change"]

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """Hardware alone: the default holds clock frequencies, which differ from run to run."""
        return machine.hardware()

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Take the saved run's figures; say in one line if it is another machine's.

        pytest-benchmark would print both machines in full, and crash where the store is not below the
        working directory; it does neither once the two are equal.
        """
        saved = compared_benchmark["machine_info"]
        if saved != machine_info:
            other = saved.get("name") or saved.get("cpu", {}).get("brand_raw", "unknown hardware")
            self.notes.append(f"the compared run is of another machine ({other}): its times only inform")
        elif "mbperf" in compared_benchmark:
            self.config.stash[BASELINE] = compared_benchmark
        compared_benchmark["machine_info"] = machine_info

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add the facts of the run, and shorten samples to the digits that mean something."""
        run = self.config.stash.get(SESSION, None)
        if run is None:
            return
        from mbperf.measure.statistics import CONFIDENCE
        from mbperf.plugin.session import geometric_means

        incomplete_because = self.incomplete_because(output_json["benchmarks"])
        output_json["mbperf"] = {
            "schema": record.SCHEMA,
            "complete": not incomplete_because,
            "incomplete_because": incomplete_because,
            "profile": run.profile.name,
            "budget_s": run.profile.budget_s,
            "processes": run.profile.processes,
            "confidence": CONFIDENCE,
            "geometric_means": geometric_means(run),
            "hardware": machine.hardware(),
            "software": machine.software(),
        }
        for row in output_json["benchmarks"]:
            if "data" in row["stats"]:
                row["stats"]["data"] = [float(f"{s:.{DIGITS}g}") for s in row["stats"]["data"]]

    def incomplete_because(self, saved: list[dict[str, Any]]) -> str:
        """Why this run may not be compared with later, or an empty string."""
        run, session = self.config.stash[SESSION], self.session
        collected = {item.path for item in session.items}
        missing = sorted({*self.bench.glob("bench_*.py")} - collected)
        expected = {
            item.nodeid
            for item in session.items
            for one in entries([item])
            if not run.not_measured(one.group)
        }
        lost = expected - {row["fullname"] for row in saved}
        reasons = {
            f"profile {run.profile.name}": not run.profile.is_baseline,
            f"{self.deselected} tests were deselected": self.deselected > 0,
            "single tests were named": any("::" in arg for arg in self.config.args),
            f"{', '.join(file.name for file in missing)} not run": bool(missing),
            f"{session.testsfailed} tests failed": session.testsfailed > 0,
            f"{len(lost)} rows were not measured": bool(lost),
        }
        return "; ".join(reason for reason, holds in reasons.items() if holds)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember the session: what it collected decides whether the run is complete."""
        self.session = session


def _unwritable(folder: Path) -> str:
    """Why nothing can be saved in a folder, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error)
