"""Where the runs of these benchmarks are kept; epochs in one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mbperf.plugin.store import keep_results_in

BENCH = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    keep_results_in(config, BENCH.parent / "results", BENCH)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers of 50 units gain nothing from a second thread, and the cores belong to the workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
