"""`mbperf doctor --paths`: the instruction sets are raced, and a better one than the chosen is found."""

import time

import pytest
from click.testing import CliRunner
from retrying import retried

from mbperf.doctor import paths
from mbperf.doctor.command import doctor
from mbperf.doctor.paths import comparisons
from mbperf.extension import _C
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import Ratio

PLAN = Plan(budget_s=0.02, min_rounds=9, max_rounds=12)


class Sets:
    """An extension of two instruction sets, of which one takes longer."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, "wide"

    def instruction_sets(self):
        return list(self.seconds)

    def instruction_set(self):
        return self.now

    def set_instruction_set(self, name):
        self.now = name

    def work(self):
        time.sleep(self.seconds[self.now])


@pytest.mark.parametrize(("wide_s", "narrow_s", "better"), [(2e-2, 5e-4, ["narrow"]), (2e-3, 4e-3, [])])
@retried
def test_a_choice_that_is_not_the_fastest_is_found(wide_s, narrow_s, better, monkeypatch):
    sets = Sets({"wide": wide_s, "narrow": narrow_s})
    monkeypatch.setattr(paths, "SHAPES", [(8, 10)])
    monkeypatch.setattr(paths, "DTYPES", ["float32"])
    monkeypatch.setattr(paths, "_forward_backward", lambda shape, dtype: sets.work)
    (found,) = comparisons(sets, PLAN)
    assert found.better == better
    assert str(found).startswith("SLOWER" if better else "ok")
    assert sets.now == "wide"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.5, 2.0, "CANNOT TELL"), (0.96, 9.0, "ok"), (0.5, 0.94, "SLOWER")]
)
def test_an_interval_that_holds_both_tells_nothing(low, high, verdict):
    found = paths.Comparison((8, 10), "float32", "wide", {"narrow": Ratio(low, low, high)})
    assert found.verdict == verdict


def test_the_command_races_what_is_built_and_leaves_the_choice_as_it_was(monkeypatch):
    monkeypatch.setattr(paths, "SHAPES", [(8, 10)])
    before = _C.instruction_set()
    outcome = CliRunner().invoke(doctor, ["--paths"])
    assert outcome.exit_code in (0, 1), outcome.exception
    assert f"8x10 float32: {before} chosen" in outcome.output
    assert "8x10 bfloat16" in outcome.output
    assert _C.instruction_set() == before
