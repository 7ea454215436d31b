"""The arithmetic of the ruler: ratios, intervals, verdicts, covariates, orders."""

import math
import random
import statistics

import pytest

from mbperf.measure.covariates import Covariates, disturbed
from mbperf.measure.rounds import Plan, latin_square, run_rounds
from mbperf.measure.selftest import FakeMachine, fake_ratio, held_share
from mbperf.measure.statistics import (
    NO_PRIOR,
    Ratio,
    Verdict,
    across_processes,
    disagree,
    geometric_mean,
    geometric_mean_across,
    is_clean,
    paired_ratio,
    prior,
    reach,
    verdict,
)

pytestmark = pytest.mark.usefixtures("few_objects_to_collect")


def undisturbed():
    return Covariates(0, 0.0)


def test_ratio_is_above_one_where_x_is_faster():
    assert paired_ratio([3.0] * 9, [1.0] * 9).ratio == pytest.approx(3.0)


def test_interval_is_the_sign_tests():
    # n = 20 at 99 %: order statistics 4 and 17, as tables of the sign test give.
    logs = list(range(20))
    ratio = paired_ratio([math.exp(one) for one in logs], [1.0] * 20)
    assert (math.log(ratio.low), math.log(ratio.high)) == (pytest.approx(3), pytest.approx(16))


def test_drift_shared_by_both_cancels():
    drift = [1.0 + 0.5 * i for i in range(20)]
    ratio = paired_ratio([2 * d for d in drift], drift)
    assert ratio.low == pytest.approx(2) == ratio.high


def test_too_few_rounds_have_no_interval():
    ratio = paired_ratio([2.0] * 4, [1.0] * 4)
    assert (ratio.low, ratio.high) == (0.0, math.inf)
    assert verdict(ratio, reach=1.0) is Verdict.CANNOT_TELL


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="equally many rounds, got 2 and 3"):
        paired_ratio([1.0] * 2, [1.0] * 3)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (Ratio(1.05, 1.03, 1.07), Verdict.FASTER),
        (Ratio(0.95, 0.93, 0.97), Verdict.SLOWER),
        (Ratio(1.001, 0.995, 1.008), Verdict.SAME),
        (Ratio(1.05, 0.99, 1.10), Verdict.CANNOT_TELL),
        (Ratio(1.008, 1.004, 1.012), Verdict.CANNOT_TELL),  # surely different, by less than anyone cares
        (Ratio(1.012, 1.002, 1.022), Verdict.CANNOT_TELL),  # no more than the control's own interval
    ],
)
def test_verdicts(ratio, expected):
    assert verdict(ratio, reach=1.005) is expected


@pytest.mark.parametrize(
    ("control", "clean"),
    [
        (Ratio(1.0, 0.99, 1.01), True),
        (Ratio(1.004, 1.001, 1.008), False),  # excludes 1
        (Ratio(1.02, 0.90, 1.10), False),  # more than 1 % off
    ],
)
def test_a_dirty_control_is_seen(control, clean):
    assert is_clean(control) is clean


def test_a_control_hides_differences_of_its_size_and_no_others():
    bar = reach(Ratio(1.05, 1.02, 1.08))
    assert verdict(Ratio(1.06, 1.05, 1.07), bar) is Verdict.CANNOT_TELL
    assert verdict(Ratio(0.94, 0.93, 0.95), bar) is Verdict.CANNOT_TELL
    assert verdict(Ratio(1.0, 0.999, 1.001), bar) is Verdict.CANNOT_TELL
    assert verdict(Ratio(10.0, 9.0, 11.0), bar) is Verdict.FASTER
    assert verdict(Ratio(0.5, 0.4, 0.6), bar) is Verdict.SLOWER


@pytest.mark.parametrize("control", [None, Ratio(1.0, 0.0, math.inf)])
def test_without_a_usable_control_nothing_can_be_told(control):
    assert verdict(Ratio(10.0, 9.0, 11.0), reach(control)) is Verdict.CANNOT_TELL


def of(*ratios):
    return [Ratio(one, 0.0, math.inf) for one in ratios]


def test_processes_combine_to_their_mean_with_students_interval():
    combined = across_processes(of(1.0, 2.0, 4.0))
    reach = 9.925 * math.log(2) / math.sqrt(3)  # t of 2 degrees of freedom at 99 %, tables
    assert combined.ratio == pytest.approx(2)
    assert math.log(combined.high / 2) == pytest.approx(reach, rel=1e-3)
    assert math.log(2 / combined.low) == pytest.approx(reach, rel=1e-3)
    alone = Ratio(2.0, 1.8, 2.2)
    assert across_processes([alone]) == alone


def test_rounds_are_a_floor_under_the_difference_of_processes():
    wide = [Ratio(1.0, 0.9, 1.1)] * 3  # alike by chance
    reach = 9.925 * math.log(1.1 / 0.9) / (2 * 2.576) / math.sqrt(3)
    assert math.log(across_processes(wide).high) == pytest.approx(reach, rel=1e-3)


def made_up_groups(rng, count, sd):
    """Log ratios of three processes each; their standard deviations differ from group to group."""
    return [[rng.gauss(0, sd * math.exp(rng.gauss(0, 0.3))) for _ in range(3)] for _ in range(count)]


def test_what_all_groups_know_narrows_the_interval_of_each_and_it_still_holds():
    rng = random.Random(11)
    groups = made_up_groups(rng, 2_000, 0.005)
    known = prior(groups)
    assert known.variance == pytest.approx(0.005**2, rel=0.4)
    found = [across_processes(of(*map(math.exp, logs)), known) for logs in groups]
    missed = sum(one.excludes(1.0) for one in found) / len(found)
    assert 0.002 < missed < 0.02
    alone = [across_processes(of(*map(math.exp, logs))) for logs in groups]
    assert statistics.median(one.width for one in found) < statistics.median(one.width for one in alone) / 2


def test_processes_of_two_states_say_so_and_get_a_wide_interval():
    rng = random.Random(3)
    rounds = [[math.log(r) + rng.gauss(0, 0.01) for _ in range(5)] for r in (16, 16, 4)]
    assert disagree(rounds)
    assert not disagree([[rng.gauss(0, 0.01) for _ in range(5)] for _ in range(3)])
    known = prior(made_up_groups(rng, 80, 0.005))
    assert across_processes(of(16, 16, 4), known).width > 1


def test_few_groups_know_nothing_of_each_other():
    assert prior([[0.0, 0.1, 0.2]] * 2) == NO_PRIOR


def test_the_mean_over_groups_allows_for_their_processes():
    logs = [[math.log(2) + d for d in (-0.01, 0, 0.01)], [math.log(8) + d for d in (-0.01, 0, 0.01)]]
    mean = geometric_mean_across(logs)
    assert mean.ratio == pytest.approx(4)
    assert 1.005 < mean.high / mean.ratio < 1.05


def test_geometric_mean_has_an_interval_around_it():
    rng = random.Random(1)
    groups = [([2 * math.exp(rng.gauss(0, 0.1)) for _ in range(30)], [1.0] * 30) for _ in range(4)]
    mean = geometric_mean(groups)
    assert mean.low < mean.ratio < mean.high
    assert not mean.excludes(2.0)
    assert mean == geometric_mean(groups)


def test_a_block_puts_every_contender_in_every_place():
    square = latin_square(["a", "b", "c", "d"], random.Random(3))
    for place in range(4):
        assert sorted(order[place] for order in square) == ["a", "b", "c", "d"]


def test_blocks_are_permuted_afresh():
    rng = random.Random(3)
    assert len({str(latin_square("abcdef", rng)) for _ in range(10)}) == 10


def test_rounds_are_dropped_for_covariates_never_for_values():
    seen = [Covariates(3, 0.0)] * 8 + [Covariates(4, 0.0), Covariates(0, 0.02)]
    flags, noisy = disturbed(seen, [0.01] * 10)
    assert flags == [False] * 8 + [True] * 2
    assert not noisy


def test_over_thirty_percent_disturbed_keeps_all_and_is_noisy():
    flags, noisy = disturbed([Covariates(5, 0.0)] * 4 + [Covariates(0, 0.0)] * 6, [0.01] * 10)
    assert noisy
    assert not any(flags)


@pytest.mark.parametrize("true_ratio", [1.0, 1.03, 8.0])
def test_known_ratio_is_recovered_from_a_drifting_noisy_clock(true_ratio):
    assert fake_ratio(true_ratio, seed=7).ratio == pytest.approx(true_ratio, rel=0.01)


def test_interval_holds_the_true_ratio():
    assert held_share(1.03, runs=20) >= 0.95


def test_identical_contenders_on_a_fake_machine_are_not_told_apart():
    verdicts = [verdict(fake_ratio(1.0, seed), reach(fake_ratio(1.0, seed + 100))) for seed in range(12)]
    assert not {Verdict.FASTER, Verdict.SLOWER} & {*verdicts}


def test_every_contender_makes_the_same_number_of_calls():
    fake = FakeMachine(random.Random(0))
    counts = {"fast": 0, "slow": 0}

    def counted(name, seconds):
        cost = fake.contender(seconds)

        def call():
            counts[name] += 1
            cost()

        return call

    calls = {"fast": [counted("fast", 1e-4)], "slow": [counted("slow", 3e-3)]}
    plan = Plan(budget_s=10, max_rounds=20, width=0)
    rounds = run_rounds(calls, [("slow", "fast")], plan, clock=fake.clock, read=undisturbed)
    assert rounds.inner_calls == pytest.approx(10, abs=4)
    assert len(rounds.seconds["fast"]) == len(rounds.seconds["slow"]) == 20


def test_stops_when_narrow_and_not_before_the_least_rounds():
    fake = FakeMachine(random.Random(0), drift=0.0, burst_share=0.0)
    calls = {"a": [fake.contender(1e-3)], "b": [fake.contender(1e-3)]}
    plan = Plan(budget_s=100, width=0.05, min_rounds=12, max_rounds=1000)
    rounds = run_rounds(calls, [("a", "b")], plan, clock=fake.clock, read=undisturbed)
    assert 12 <= len(rounds.seen) < 100


def test_stops_when_the_budget_is_spent():
    fake = FakeMachine(random.Random(0))
    calls = {"a": [fake.contender(1e-2)], "b": [fake.contender(1e-2)]}
    plan = Plan(budget_s=1.0, width=0.0, min_rounds=4, max_rounds=10_000)
    rounds = run_rounds(calls, [("a", "b")], plan, clock=fake.clock, read=undisturbed)
    assert 1.0 <= fake.now < 1.5
    assert len(rounds.seen) < 60


def test_calls_per_round_are_a_multiple_of_the_rotation():
    fake = FakeMachine(random.Random(0))
    plan = Plan(budget_s=1.0, multiple=7)
    rounds = run_rounds({"a": [fake.contender(1e-4)]}, [], plan, clock=fake.clock, read=undisturbed)
    assert rounds.inner_calls % 7 == 0
