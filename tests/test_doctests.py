"""The examples in docstrings run."""

import doctest
import importlib
import os
import pkgutil
from pathlib import Path

import pytest

import mbperf

# Not __main__, which is the command itself, nor the compiled extension.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mbperf.__path__, "mbperf.")
    if module.name.rpartition(".")[2] not in ("__main__", "_C")
]
TIMED = ("mbperf.loader.profiler", "mbperf.measure.selftest")
MODULES += sorted(file.stem for file in (Path(__file__).parents[1] / "tools").glob("*.py"))


def examples(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    return [test for test in found if test.examples]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.timed) if name in TIMED else name for name in MODULES]
)
def test_examples_of(name, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in examples(name):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_public_functions_have_examples():
    for name in mbperf.__all__:
        assert ">>>" in (getattr(mbperf, name).__doc__ or ""), name
