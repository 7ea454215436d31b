"""Two trees in lockstep: what is the same, what 3 % slower looks like, when a group is decided."""

import math

import pytest

from mbperf.measure.covariates import Covariates
from mbperf.measure.lockstep import COMPARED, THAT, THIS, Effort, Lost, compare, decide, verdict
from mbperf.measure.rounds import Rounds
from mbperf.measure.rows import CONTROL
from mbperf.measure.selftest import LEAST_FOUND, MOST_FALSE, fake_trees
from mbperf.measure.statistics import Ratio

pytestmark = [pytest.mark.timed, pytest.mark.usefixtures("few_objects_to_collect")]
RUNS = 100


def test_identical_trees_are_told_apart_in_one_run_of_a_hundred_at_most():
    found = [fake_trees(1.0, seed) for seed in range(RUNS)]
    assert sum(one in ("BETTER", "WORSE") for one in found) <= MOST_FALSE * RUNS
    assert found.count("SAME") > RUNS / 2


def test_three_percent_slower_is_found():
    assert [fake_trees(1.03, seed) for seed in range(RUNS)].count("WORSE") >= LEAST_FOUND * RUNS


def test_three_percent_faster_is_found():
    assert [fake_trees(1 / 1.03, seed) for seed in range(20)].count("BETTER") >= 19


@pytest.mark.parametrize(
    ("ratio", "control", "expected"),
    [
        ((0.97, 0.96, 0.985), (1, 0.995, 1.005), "WORSE"),
        ((0.97, 0.95, 0.995), (1, 0.995, 1.005), "CANNOT TELL"),  # beyond nothing, within nothing
        ((0.97, 0.96, 0.985), (0.98, 0.97, 0.99), "CANNOT TELL"),  # identical trees differ as much
        ((1.03, 1.02, 1.04), (1, 0.995, 1.005), "BETTER"),
        ((1.0, 0.992, 1.008), (1, 0.995, 1.005), "SAME"),
    ],
)
def test_a_verdict_needs_bounds_beyond_the_margin_and_the_control(ratio, control, expected):
    assert verdict(Ratio(*ratio), Ratio(*control)) == expected


def rounds(this_s, that_s):
    seconds = {THIS: [this_s] * 12, CONTROL: [1.0] * 12, THAT: [that_s] * 12}
    return Rounds(seconds, {}, 1, True, 0, seen=[Covariates(0, 0.0)] * 12, round_s=[1.0] * 12)


def test_decided_groups_are_left_alone_and_lost_ones_too():
    passes = {"clear": 0, "wild": 0, "lost": 0}

    def race(group, number):
        passes[group] += 1
        if group == "lost":
            raise Lost("it died")
        return rounds(1.0, 1.0 if group == "clear" else 1 + 0.2 * (number % 2))

    found = compare(list(passes), race, Effort(math.inf, least_processes=4, most_processes=9))
    assert passes == {"clear": 4, "wild": 9, "lost": 1}
    assert found["lost"].lost == "it died"
    assert {name: one.verdict for name, one in decide(found).items()} == {
        "clear": "SAME",
        "wild": "CANNOT TELL",
    }


def test_no_group_begins_after_the_budget():
    now = iter(range(100))
    found = compare(["a", "b"], lambda *_: rounds(1.0, 1.0), Effort(budget_s=5.5), clock=lambda: next(now))
    assert sum(len(one.ratios) for one in found.values()) == 3
    assert {name for _, name in COMPARED} == {THIS}
