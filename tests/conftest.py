"""Fixtures shared by several test files, and how long property tests run."""

import gc
import os
import sys
from functools import partial

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


BEGUN: pytest.StashKey[bool] = pytest.StashKey()
YIELDING = 10  # niceness of the worker beside the one that measures: a tenth of the other's weight


def pytest_configure(config):
    """Register markers; let a pytest that a test starts be none of this one's workers."""
    config.addinivalue_line("markers", "every_instruction_set: forces each instruction set in turn.")
    config.addinivalue_line(
        "markers", "timed: reads the clock or looks at the whole machine; one worker runs all of these."
    )
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing where it is set


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its marker
def pytest_collection_modifyitems(config, items):
    """Mark what takes the fixture that forces instruction sets, and say what one worker has to run."""
    for item in items:
        if "instruction_set" in getattr(item, "fixturenames", ()):
            item.add_marker("every_instruction_set")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not is_timed(item))  # so that these begin at once, on one worker
        for item in items:
            item.add_marker(pytest.mark.xdist_group("timed" if is_timed(item) else item.path.stem))


def is_timed(item):
    """Return whether a test is marked as timed."""
    return item.get_closest_marker("timed") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Let the worker that does not begin with what is timed give way to the one that does."""
    if hasattr(item.config, "workerinput") and not item.config.stash.setdefault(BEGUN, False):
        item.config.stash[BEGUN] = True
        if not is_timed(item):
            os.nice(YIELDING)


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
def say(record_property):
    """A function whose lines stand at the end of the run, also of one that passes."""
    return partial(record_property, "said")


def pytest_terminal_summary(terminalreporter):
    """Show what tests have said."""
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, line in report.user_properties:
            if name == "said":
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
