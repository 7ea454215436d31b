"""Where the runs of these benchmarks are kept, and what distributed rows show beside their times."""

import os
from pathlib import Path
from typing import Any

import pytest

from mbperf.measure.launch import is_first_rank
from mbperf.plugin.hooks import SESSION
from mbperf.plugin.store import keep_results_in
from mbperf.report.tables import ratio

BENCH = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    keep_results_in(config, BENCH.parent / "results", BENCH)
    if not is_first_rank():
        _save_nothing(config.option)


def _save_nothing(option: Any) -> None:
    option.benchmark_autosave = option.benchmark_save = option.benchmark_json = None
    option.benchmark_save_data, option.benchmark_compare = False, []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not is_first_rank():
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115  pytest writes until the process ends


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(SESSION, None)
    rows = [row for its in (run.rows if run else {}).values() for row in its.values() if "collectives" in row]
    if not rows:
        return
    terminalreporter.section("ranks: the slowest one's time, and what each sends", sep="-")
    terminalreporter.write_line(
        f"{'':58} {'ms':>9} {'as long as ours':>24} {'collectives':>12} {'alone %':>8} {'B sent a row':>13} "
        f"{'peak MB':>8}"
    )
    for row in rows:
        fused = run.rows[f"{row['op']} {row['case']}"][row["subject"]]
        share = f"{100 * row['collectives_share']:.0f}" if "collectives_share" in row else ""
        peak = f"{row['peak_memory_bytes'] / 1e6:8.1f}" if "peak_memory_bytes" in row else ""
        terminalreporter.write_line(
            f"{row['op'] + ' ' + row['case'] + ' ' + row['contender']:58} {row['time_s'] * 1e3:9.2f} "
            f"{ratio(fused['ratios'].get(row['contender']), wide=True):>24} "
            f"{row['collectives']:12} {share:>8} {row['sent_bytes'] / row['facts']['N']:13.1f} {peak}"
        )
