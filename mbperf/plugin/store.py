"""Save runs lean, take the compared one, and say what changed: in any folder that races.

Where a conftest calls `keep_results_in` there is one folder per kind of machine, in which complete runs are
marked as baselines; elsewhere pytest-benchmark's own storage holds.
"""

import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mbperf.measure import machine
from mbperf.plugin.hooks import BASELINE, SESSION, STORE, entries
from mbperf.report import record
from mbperf.report.lean import lean
from mbperf.report.record import saved_rows

UNSET_STORAGE = "file://./.benchmarks"  # pytest-benchmark's default


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
    store = config.stash[STORE]
    store.folder, store.bench = results / machine.name(), bench
    if option.benchmark_storage != UNSET_STORAGE:
        return
    store.choose_storage(store.folder)
    store.choose_baseline(store.folder)


@dataclass(eq=False)
class ResultStore:
    """The hooks that save a run and find the run to compare it with.

    `folder` and `bench` are those of `keep_results_in`; None where it was not called.
    """

    config: pytest.Config
    folder: Path | None = None
    bench: Path | None = None
    deselected: int = 0
    notes: list[str] = field(default_factory=list)

    def choose_storage(self, folder: Path) -> None:
        """Save here unless that cannot work, which is better said before measuring than after.

        With the samples of its rounds a run is ten times as large: it goes where git looks away.
        """
        option = self.config.option
        if option.benchmark_save_data:
            folder = Path(".benchmarks").absolute()
            self.notes.append("a run saved with its samples goes to .benchmarks/, not to the runs on record")
        option.benchmark_storage = f"file://{folder}"
        if option.benchmark_disable or option.collectonly:
            return
        if problem := _unwritable(folder):
            self.notes.append(f"this run will not be saved: {problem}")
            option.benchmark_autosave = option.benchmark_save = None
            return
        if not option.benchmark_autosave and not option.benchmark_save:
            from pytest_benchmark.utils import get_tag

            option.benchmark_autosave = get_tag()

    def choose_baseline(self, folder: Path) -> None:
        """Resolve a bare --benchmark-compare among complete runs of this kind of machine."""
        if self.config.option.benchmark_compare is not True:
            return
        found = record.newest_complete(folder, machine.name())
        if found:
            self.config.option.benchmark_compare = str(found[0])
        else:
            self.config.option.benchmark_compare = []
            self.notes.append(f"no complete run to compare with yet under {folder}")

    def pytest_report_header(self) -> list[str]:
        """Show where the run goes."""
        where = [f"machine {machine.name()}"] if self.folder else []
        return [f"mbperf: {note}" for note in [*where, *self.notes]]

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count what was left out."""
        self.deselected += len(items)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Iterator[None]:
        """Say what changed, before it is saved, and have it saved lean.

        Nothing measured, nothing to save: pytest-benchmark would warn, and under -W error crash.
        """
        native = getattr(self.config, "_benchmarksession", None)
        if native is not None and (self.folder or SESSION in self.config.stash):
            if native.benchmarks:
                self._tell_changes(native.benchmarks)
                native.storage = _lean_storage(native.storage)
            else:
                native.save = native.autosave = None
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

    @pytest.hookimpl
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any] | None:
        """Hardware alone: the default holds clock frequencies, which differ from run to run."""
        return machine.hardware() if self.folder or SESSION in self.config.stash else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Take the saved run's figures; say in one line if it is another machine's.

        pytest-benchmark would print both machines in full, and crash where the store is not below the
        working directory; it does neither once the two are equal.
        """
        saved = compared_benchmark["machine_info"]
        if self.folder is None and "mbperf" not in compared_benchmark:
            return
        if saved != machine.hardware():
            other = saved.get("name") or saved.get("cpu", {}).get("brand_raw", "unknown hardware")
            self.notes.append(f"the compared run is of another machine ({other}): its times only inform")
        elif "mbperf" in compared_benchmark:
            self._take(compared_benchmark)
        compared_benchmark["machine_info"] = machine_info

    def _take(self, compared: dict[str, Any]) -> None:
        try:
            self.config.stash[BASELINE] = record.validate(compared, "the compared run")
        except record.BadRecord as error:
            self.notes.append(f"{error}: only its times are compared")

    @pytest.hookimpl
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add the facts of the run, and keep what is read in the digits that mean something."""
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
        if any(group.facts.get("device") == "cuda" and group.name in run.samples for group in run.groups):
            output_json["mbperf"]["gpu"] = machine.gpu()
        if self.bench is None:
            output_json["mbperf"]["command"] = shlex.join(["pytest", *self.config.invocation_params.args])
        output_json.update(lean(output_json))

    def incomplete_because(self, saved: list[dict[str, Any]]) -> str:
        """Why this run may not be compared with later, or an empty string."""
        run, session = self.config.stash[SESSION], self.session
        collected = {item.path for item in session.items}
        missing = sorted({*self.bench.glob("bench_*.py")} - collected) if self.bench else []
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


def _lean_storage(storage: Any) -> Any:
    """The same storage, its files lean; one that is no folder stays as it is."""
    from pytest_benchmark.storage.file import FileStorage

    from mbperf.plugin.storage import LeanStorage

    return LeanStorage(storage) if type(storage) is FileStorage else storage


def _unwritable(folder: Path) -> str:
    """Why nothing can be saved in a folder, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error)
