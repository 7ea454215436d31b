"""Fixtures shared by several test files, and how long property tests run."""

import gc
import os
import sys

# Before torch loads: threads that wait for work sleep. Where anything else runs, those that spin make the
# gradient checks take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from devices import DEVICES, on
from hypothesis import HealthCheck, settings

from mbperf.extension import _C
from mbperf.lesson import get_data

# No deadline for one example: on a shared machine the clock says nothing about the code. "fuzz" is
# `make fuzz`, with 50 times as many examples, and other ones every time.
PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("tests", derandomize=True, **PATIENT)
settings.register_profile("fuzz", max_examples=5_000, **PATIENT)
settings.load_profile("tests")


SAID: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_configure(config):
    """Register the marker that CI selects by."""
    config.addinivalue_line("markers", "every_instruction_set: forces each instruction set in turn.")


def pytest_collection_modifyitems(items):
    """Mark what takes the fixture that forces instruction sets."""
    for item in items:
        if "instruction_set" in getattr(item, "fixturenames", ()):
            item.add_marker("every_instruction_set")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four processes that form worlds of one to four ranks."""
    from ranks import world_of

    with world_of(4, tmp_path_factory.mktemp("stores")) as ranks:
        yield ranks


@pytest.fixture(scope="module", autouse=True)
def _no_server_of_ranks_is_left():
    """It would keep the resource tracker alive, for whose end other tests wait."""
    yield
    if "ranks" in sys.modules:
        sys.modules["ranks"].end_server()


@pytest.fixture
def say(request):
    """A function whose lines stand at the end of the run, also of one that passes."""
    return request.config.stash.setdefault(SAID, []).append


def pytest_terminal_summary(terminalreporter, config):
    """Show what tests have said."""
    for line in config.stash.get(SAID, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def digits():
    """x_train, y_train, x_valid, y_valid of the embedded digits; read only."""
    return get_data("embedded")


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU and, where there is one, the GPU: helpers of the tests put their tensors there."""
    yield from on(request.param)


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    """One of the instruction sets of this processor, in use."""
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(_C.instruction_sets()[0])


@pytest.fixture(scope="module")
def few_objects_to_collect():
    """Rounds begin with a collection, which walks all that torch and pytest have loaded: 0.3 s each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def born_here(monkeypatch):
    """The profiler's trials are forked from the test's own process: no seconds for starting a fresh one."""
    from mbperf.loader.source import Source

    def source_of(dataset, fixed):
        return Source(live=dataset, fixed=fixed)

    for user in ("mbperf.loader.profiler", "mbperf.loader.source"):
        monkeypatch.setattr(f"{user}.source_of", source_of)
