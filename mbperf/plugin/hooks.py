"""The `race` fixture: measure a group once, interleaved, and replay each contender into pytest-benchmark.

Replaying on a virtual clock keeps everything native working: table, JSON, comparison, histogram. Without a
test that uses the fixture this plugin does nothing.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mbperf.measure.group import Group
    from mbperf.plugin.session import Session
    from mbperf.plugin.store import ResultStore

PROFILE_NAMES = ("smoke", "default", "long")
SESSION: pytest.StashKey["Session"] = pytest.StashKey()
STORE: pytest.StashKey["ResultStore"] = pytest.StashKey()
BASELINE: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
FAILURES: pytest.StashKey[list[str]] = pytest.StashKey()


class VirtualClock:
    """A timer that shows what the replay sets it to."""

    __name__ = "interleaved_rounds"

    def __init__(self) -> None:
        """Start at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time shown."""
        return self.now

    def replay(self, benchmark: Any, seconds: Sequence[float], call: Callable[[], Any]) -> None:
        """Let pytest-benchmark time `seconds`, one round each; `call` is what it would have timed."""
        samples = iter(seconds)

        def rewind() -> None:
            # Each round starts at zero, so that the difference of two readings is the sample to the last bit.
            self.now = 0.0

        def round_() -> None:
            self.now = next(samples)

        if benchmark.disabled:
            benchmark.pedantic(call)
        else:
            benchmark.pedantic(round_, setup=rewind, rounds=len(seconds))


@dataclass(frozen=True)
class Entry:
    """One row: a contender of a group, with the clock its test was marked with."""

    group: "Group"
    contender: str
    clock: VirtualClock


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the ruler."""
    options = parser.getgroup("mbperf", "interleaved measurement (mbperf)")
    options.addoption(
        "--mbperf-profile",
        choices=PROFILE_NAMES,
        default="default",
        help="smoke: does it run; default: three processes a group, some 7 minutes; long: five, 20.",
    )
    options.addoption("--mbperf-budget", type=float, metavar="SECONDS", help="Time for all groups together.")
    options.addoption(
        "--mbperf-with",
        default="",
        metavar="NAMES",
        help="Optional contenders to include, separated by commas.",
    )
    options.addoption(
        "--mbperf-compile",
        action="store_true",
        help="Include torch.compile: short for --mbperf-with=compiled; compiling costs minutes.",
    )
    options.addoption(
        "--mbperf-gate",
        action="store_true",
        help="Fail on a missed floor (exit 11) or a confirmed slow-down since the saved run (exit 12).",
    )
    options.addoption(
        "--mbperf-fail-on-worse",
        action="store_true",
        help="Fail (exit 1) on every row that is surely worse than in the compared run.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the store, and catch the one slip that would silently measure nothing."""
    config.addinivalue_line("markers", "race(groups): contenders of these groups, one test each (mbperf).")
    if config.pluginmanager.hasplugin("benchmark"):
        from mbperf.plugin.store import ResultStore

        config.stash[STORE] = ResultStore(config)
        config.pluginmanager.register(config.stash[STORE], "mbperf-store")
    run = config.getoption("benchmark_compare", None)
    if isinstance(run, str) and (Path(run).is_dir() or run.partition("::")[0].endswith(".py")):
        raise pytest.UsageError(
            f"--benchmark-compare took {run!r} for the run to compare with, so nothing under it would be "
            f"measured; write: pytest {run} --benchmark-compare"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that uses `race` one parameter per contender of its groups."""
    if "race" not in metafunc.fixturenames:
        return
    groups = _groups_of(metafunc.definition)
    asked = metafunc.config.getoption("mbperf_with").split(",")
    asked += ["compiled"] * metafunc.config.getoption("mbperf_compile")
    groups = [group.with_optional(asked) for group in groups]
    entries = [_parameter(group, name) for group in groups for name in group.lineup()]
    metafunc.parametrize("race", entries, indirect=True)


def _groups_of(test: pytest.Item) -> "list[Group]":
    """Return the groups that a test is marked with.

    Raises:
        pytest.Collector.CollectError: it has no marker, or one without groups that can be measured.
    """
    from mbperf.measure.group import Group
    from mbperf.measure.rows import CONTROL, NULL, ROOF

    marker = test.get_closest_marker("race")
    if marker is None or len(marker.args) != 1 or marker.kwargs:
        raise pytest.Collector.CollectError(
            f"{test.nodeid}: race needs @pytest.mark.race([Group(...), ...]), one list of groups"
        )
    if not isinstance(marker.args[0], list | tuple) or not marker.args[0]:
        raise pytest.Collector.CollectError(
            f"{test.nodeid}: @pytest.mark.race takes a list of groups, got {_short(marker.args[0])}"
        )
    names: set[str] = set()
    for group in marker.args[0]:
        if not isinstance(group, Group):
            problem = f"@pytest.mark.race takes a list of groups, and in it is {_short(group)}"
        elif not group.contenders:
            problem = f"group {group.name!r} has no contenders; give at least the function to be proved"
        elif taken := {CONTROL, ROOF, NULL} & {*group.contenders, *group.optional}:
            problem = f"group {group.name!r} has a contender {min(taken)!r}, a name that mbperf uses itself"
        elif wrong := [name for name, function in group.contenders.items() if not callable(function)]:
            problem = f"group {group.name!r}: contender {wrong[0]!r} is no function"
        elif group.name in names:
            problem = f"two groups are called {group.name!r}; op and case have to tell them apart"
        else:
            names.add(group.name)
            continue
        raise pytest.Collector.CollectError(f"{test.nodeid}: {problem}")
    return list(marker.args[0])


def _short(value: Any) -> str:
    """A value that was given in place of a group, without its address."""
    return repr(value) if isinstance(value, str | int | list | tuple) else f"a {type(value).__name__}"


def _parameter(group: "Group", name: str) -> Any:
    clock = VirtualClock()
    return pytest.param(
        Entry(group, name, clock),
        id=f"{group.case.replace(' ', '-')}-{name}",
        marks=pytest.mark.benchmark(group=group.name, timer=clock),
    )


def entries(items: Sequence[pytest.Item]) -> list[Entry]:
    """Return the rows among collected tests."""
    params = (getattr(item, "callspec", None) for item in items)
    found = (spec.params.get("race") for spec in params if spec is not None)
    return [entry for entry in found if isinstance(entry, Entry)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Know all groups before the first is measured: the budget is shared among them."""
    groups = {entry.group.name: entry.group for entry in entries(session.items)}
    if not groups or session.config.option.collectonly:
        return
    from mbperf.plugin.session import PROFILES, Session

    option = session.config.getoption
    profile = PROFILES[option("mbperf_profile")]
    if option("mbperf_budget"):
        profile = replace(profile, budget_s=option("mbperf_budget"))
    announce = _announcer(session.config)
    session.config.stash[SESSION] = Session(profile, list(groups.values()), announce)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Measure before the first test: no time-out and no thread of a test gets in the way."""
    run = session.config.stash.get(SESSION, None)
    if run is None or session.testsfailed or session.config.getoption("benchmark_disable"):
        return
    run.measure_all()
    _write(session.config, run.account())


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[], None]]:
    """Measure the group of this test, if no earlier test has, and replay this test's contender."""
    run = request.config.stash[SESSION]
    entry: Entry = request.param

    def replay() -> None:
        from mbperf.measure.figures import over_roof

        if benchmark.disabled:
            _check_only(run, entry, benchmark)
            return
        if message := run.wrong(entry.group, entry.contender):
            pytest.fail(f"{entry.group.name}: {entry.contender} is wrong: {message}", pytrace=False)
        if message := run.failed(entry.group):
            pytest.fail(f"{entry.group.name}: not measured: {message}", pytrace=False)
        rows = run.rows_of(entry.group)
        if entry.contender not in rows:
            if reason := run.not_measured(entry.group):
                pytest.skip(f"{entry.group.name}: not measured here: {reason}")
            pytest.skip(f"{entry.group.name}: no contender was right, so {entry.contender} was not timed")
        benchmark.extra_info.update(rows[entry.contender])
        # What groups and files are made of: the parameter itself would be written with its addresses.
        benchmark.param = entry.contender
        benchmark.params = {**benchmark.params, "race": entry.contender}
        entry.clock.replay(benchmark, run.seconds_of(entry.group, entry.contender), lambda: None)
        if over_roof(rows[entry.contender]):
            share = rows[entry.contender]["ratios"]["roof"]["ratio"]
            pytest.fail(
                f"{entry.group.name}: {entry.contender} reached {share:.0%} of the memory limit: "
                "its bytes are miscounted, or it skips work",
                pytrace=False,
            )

    yield replay
    if not benchmark._mode:
        benchmark.skipped = True


def _check_only(run: "Session", entry: Entry, benchmark: Any) -> None:
    """With --benchmark-disable: run the contender once on checked inputs, no clock."""
    from mbperf.measure.group import check

    message = check(entry.group, entry.contender)
    entry.clock.replay(benchmark, [], lambda: None)
    if message:
        pytest.fail(f"{entry.group.name}: {entry.contender} is wrong: {message}", pytrace=False)


def _announcer(config: pytest.Config) -> Any:
    def announce(group: "Group", number: int, count: int, left_s: float) -> None:
        minutes, seconds = divmod(round(left_s), 60)
        _write(config, f"[{number}/{count}] {group.name}, about {minutes}:{seconds:02} left", rewrite=True)

    return announce


def _write(config: pytest.Config, text: str, rewrite: bool = False) -> None:
    """Say how far the run is: in place on a terminal, a line each elsewhere."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if reporter is None or capture is None:
        return
    with capture.global_and_fixture_disabled():
        if rewrite and reporter.isatty:
            reporter.rewrite(f"mbperf {text} ", erase=True)
        else:
            reporter.ensure_newline()
            reporter.write_line(f"mbperf {text}")
        sys.stdout.flush()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge the run if asked to."""
    config = session.config
    run = config.stash.get(SESSION, None)
    if run is None:
        return
    if config.getoption("mbperf_fail_on_worse"):
        from mbperf.measure.change import findings

        config.stash[FAILURES] = findings(run.subject_rows())
        if config.stash[FAILURES]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("mbperf_gate") and session.exitstatus == 0:
        from mbperf.plugin.gate import judge

        code, config.stash[FAILURES] = judge(run, config.stash.get(BASELINE, None))
        session.exitstatus = code or session.exitstatus


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """Show ratios and verdicts after the native table, also where that one raises."""
    try:
        return (yield)
    finally:
        run = config.stash.get(SESSION, None)
        if run is not None and run.rows:
            from mbperf.plugin.summary import show

            show(terminalreporter, run, config.stash.get(BASELINE, None), config.stash.get(FAILURES, []))
