"""`mbperf doctor --paths`: instruction sets and paths are raced, a better one than the chosen is found."""

import time

import pytest
import torch
from click.testing import CliRunner
from retrying import retried

from mbperf.doctor import paths
from mbperf.doctor.command import doctor
from mbperf.doctor.paths import Candidate, Case, Problem, comparisons
from mbperf.extension import _C
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import Ratio

pytestmark = pytest.mark.timed

PLAN = Plan(budget_s=0.02, min_rounds=9, max_rounds=12)


class Sets:
    """An extension of two instruction sets with two paths, some of which take longer."""

    def __init__(self, seconds):
        self.seconds, self.now, self.path = seconds, "wide", None

    def instruction_sets(self):
        return list(dict.fromkeys(name for name, _ in self.seconds))

    def instruction_set(self):
        return self.now

    def set_instruction_set(self, name):
        self.now = name

    def cross_entropy_paths(self, input, target):
        assert self.path is None  # one that is forced would count as the choice
        return [path for name, path in self.seconds if name == self.now]

    def set_cross_entropy_path(self, name):
        self.path = name

    def work(self):
        time.sleep(self.seconds[self.now, self.path])


WIDE_ROWS, WIDE_TILES, NARROW = (
    Candidate("wide", "rows"),
    Candidate("wide", "tiles"),
    Candidate("narrow", "rows"),
)


@pytest.mark.parametrize(
    ("seconds", "better"),
    [
        ({WIDE_ROWS: 2e-2, NARROW: 5e-4}, [NARROW]),
        ({WIDE_ROWS: 2e-3, NARROW: 4e-3}, []),
        ({WIDE_ROWS: 2e-2, WIDE_TILES: 5e-4, NARROW: 4e-2}, [WIDE_TILES]),
        ({WIDE_ROWS: 2e-3, WIDE_TILES: 4e-3, NARROW: 4e-3}, []),
    ],
)
@retried
def test_a_choice_that_is_not_the_fastest_is_found(seconds, better, monkeypatch):
    sets = Sets(seconds)
    monkeypatch.setattr(paths, "CASES", [Case((8, 10))])
    monkeypatch.setattr(paths, "DTYPES", ["float32"])
    monkeypatch.setattr(paths, "_problem", lambda shape, dtype: Problem(None, None, sets.work))
    (found,) = comparisons(sets, PLAN)
    assert found.chosen == WIDE_ROWS
    assert list(found.others) == [candidate for candidate in seconds if candidate != WIDE_ROWS]
    assert found.better == better
    assert str(found).startswith("SLOWER" if better else "ok")
    assert (sets.now, sets.path) == ("wide", None)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.5, 2.0, "CANNOT TELL"), (0.96, 9.0, "ok"), (0.5, 0.94, "SLOWER")]
)
def test_an_interval_that_holds_both_tells_nothing(low, high, verdict):
    found = paths.Comparison((8, 10), "float32", 1, WIDE_ROWS, {NARROW: Ratio(low, low, high)})
    assert found.verdict == verdict


def test_each_path_is_chosen_for_some_case_and_raced_against_all_that_serve():
    before, threads = _C.instruction_set(), torch.get_num_threads()
    chosen = set()
    try:
        for case in paths.CASES:
            torch.set_num_threads(2 if case.all_threads else 1)
            problem = paths._problem(case.shape, "float32")
            first, *others = paths._candidates(_C, before, problem)
            chosen.add(first.path)
            _C.set_instruction_set(before)
            raced = [first.path, *(other.path for other in others if other.instruction_set == before)]
            assert raced == _C.cross_entropy_paths(problem.input, problem.target)
            assert {other.instruction_set for other in others} | {before} == set(_C.instruction_sets())
    finally:
        torch.set_num_threads(threads)
        _C.set_instruction_set(before)
    assert chosen == {"rows", "groups", "tiles", "columns"}


def test_the_command_races_what_is_built_and_leaves_the_choice_as_it_was(monkeypatch):
    monkeypatch.setattr(paths, "CASES", [Case((8, 10)), Case((2, 5, 3), all_threads=True)])
    before, threads = _C.instruction_set(), torch.get_num_threads()
    problem = paths._problem((8, 10), "float32")
    serving = _C.cross_entropy_paths(problem.input, problem.target)
    outcome = CliRunner().invoke(doctor, ["--paths"])
    assert outcome.exit_code in (0, 1), outcome.exception
    (line,) = [line for line in outcome.output.splitlines() if "8x10 float32" in line]
    assert f"8x10 float32: {before} {serving[0]} chosen" in line
    assert all(f"{before} {path} " in line for path in serving)
    assert "8x10 bfloat16" in outcome.output
    assert (f"2x5x3 float32 on {threads} threads" in outcome.output) == (threads > 1)
    assert (_C.instruction_set(), torch.get_num_threads()) == (before, threads)
    assert _C.cross_entropy_paths(problem.input, problem.target) == serving
