"""Where the runs of these benchmarks are kept."""

from pathlib import Path

import pytest

from mbperf.plugin.store import keep_results_in

BENCH = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    keep_results_in(config, BENCH.parent / "results", BENCH)
