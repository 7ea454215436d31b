"""Results of repeated trials: the recommendation, its confidence, candidates that cannot be told apart."""

import math
import random
from dataclasses import replace

import pytest

from mbperf.loader.output.advice import advise, changed_knobs, duration, effect_words, mark_pareto, si
from mbperf.loader.records import Profile, Trial, quantile
from mbperf.loader.search.candidates import Candidates, cost
from mbperf.loader.search.confidence import within_margin
from mbperf.loader.search.model import Consumer
from mbperf.loader.settings import Settings

W = Settings().with_workers


def trial(settings, rate, noise=0.0, draw=None, seconds=1.0, **known):
    draw = draw or random.Random(0)
    blocks = [rate * (1 + draw.gauss(0, noise)) for _ in range(12)]
    mean = sum(blocks) / len(blocks)
    return Trial(settings, rate_samples_per_s=mean, samples=int(mean * seconds), seconds=seconds,
                 blocks=blocks, first_batch_s=0.0, **known)  # fmt: skip


def candidates_of(rates, repeats=3, noise=0.01, consumer=None):
    draw, candidates = random.Random(7), Candidates(consumer or Consumer())
    for _ in range(repeats):
        for settings, rate in rates.items():
            candidates.add(trial(settings, rate, noise, draw))
    return candidates


def advised(candidates, **known):
    profile = Profile(subject={"fixed_words": ["shuffle=True"], "name": "x"}, **known)
    advise(profile, candidates, 0.03)
    return profile


def test_the_cheapest_within_tolerance_of_the_best():
    candidates = candidates_of({W(0): 400, W(2): 800, W(4): 985, W(6): 1000, W(8): 1000})
    assert candidates.recommend(0.03).settings == W(4)
    assert candidates.recommend(0.0005).settings.num_workers >= 6
    assert candidates.recommend(0.7).settings == W(0)


def test_four_and_six_workers_cannot_be_told_apart():
    profile = advised(candidates_of({W(0): 400, W(4): 1000, W(6): 1001}, noise=0.03))
    assert profile.recommendation["num_workers"] == 4
    assert profile.indistinguishable == ["6 workers"]
    assert "cannot distinguish it from 6 workers" in profile.confidence_words
    assert profile.confidence > 0.95


def test_confidence_is_low_where_the_noise_is_large():
    sure = advised(candidates_of({W(2): 1000, W(4): 1030}, noise=0.01))
    unsure = candidates_of({W(2): 1000, W(4): 1000}, repeats=1, noise=0)
    for candidate in unsure.by_settings.values():
        candidate.trials[0].blocks = [500, 1500] * 6
    assert sure.confidence > 0.9
    assert 0.5 < advised(unsure).confidence < 0.75


def test_confidence_is_honest():
    """Among recommendations said to be p sure, about p are right: within 5 % of the truly best."""
    draw = random.Random(11)
    said, right = [], []
    for _ in range(60):
        truth = {W(count): 1000 * draw.uniform(0.85, 1.0) for count in (0, 1, 2, 4)}
        candidates = Candidates(Consumer())
        for _ in range(2):
            for settings, rate in truth.items():
                candidates.add(trial(settings, rate * (1 + draw.gauss(0, 0.04)), 0.04, draw))
        chosen = candidates.recommend(0.03)
        said.append(candidates.confidence(chosen, 0.05))
        right.append(truth[chosen.settings] >= 0.95 * max(truth.values()))
    assert sum(right) / 60 == pytest.approx(sum(said) / 60, abs=0.12)


def test_equivalent_configurations_are_no_reason_to_doubt():
    """Eight equal rates measured to 3 %: one looks best by chance, and any would be right."""
    draw = random.Random(3)
    for _ in range(20):
        logs = [draw.gauss(0, 0.03) for _ in range(8)]
        assert within_margin(logs, [0.03] * 8, first_within(logs, 0.03), 0.05) > 0.85
    assert within_margin([0.0] * 8, [0.01] * 8, 3, 0.05) > 0.97
    assert within_margin([0.0, 0.2], [0.01, 0.01], 0, 0.05) == 0.0
    assert 0.3 < within_margin([0.0, 0.05], [0.03, 0.03], 0, 0.05) < 0.7


def first_within(logs, tolerance):
    return next(k for k, value in enumerate(logs) if value >= max(logs) + math.log1p(-tolerance))


@pytest.mark.parametrize(("lowest", "error"), [(0.5, 0.05), (0.85, 0.02), (0.97, 0.05)])
def test_confidence_is_calibrated(error, lowest):
    """Said and right agree, whether the truth is spread wide or hardly at all."""
    draw, said, right = random.Random(5), [], []
    for _ in range(50):
        truth = [math.log(draw.uniform(lowest, 1)) for _ in range(6)]
        logs = [value + draw.gauss(0, error) for value in truth]
        chosen = first_within(logs, 0.03)
        said.append(within_margin(logs, [error] * 6, chosen, 0.05))
        right.append(truth[chosen] >= max(truth) + math.log(0.95))
    assert sum(said) / 50 == pytest.approx(sum(right) / 50, abs=0.13)


def test_infeasible_configurations_are_never_recommended():
    candidates = candidates_of({W(0): 400, W(4): 1000})
    candidates.add(Trial(W(4), infeasible="out of shared memory", cause="shared_memory"))
    assert candidates.recommend(0.03).settings == W(0)
    assert Candidates(Consumer()).recommend(0.03) is None


def test_a_consumer_with_a_step_needs_fewer_workers():
    rates = {W(0): 400, W(2): 800, W(4): 1600, W(8): 3200}
    assert candidates_of(rates).recommend(0.03).settings == W(8)
    consumer = Consumer(step_time_s=0.1, batch_size=64)  # takes 640 samples/s
    profile = advised(candidates_of(rates, consumer=consumer), step_time_s=0.1)
    assert profile.recommendation["num_workers"] == 2
    assert profile.bound == "compute"
    assert profile.verdict.startswith("Compute-bound: at 100 ms per step the consumer idles 0 %")


def paced(settings, idle, step_time_s, draw=None, noise=0.0, seconds=1.0, batch=64):
    """A paced trial whose consumer waited `idle` of its time."""
    rate = batch * (1 - idle) / step_time_s
    return replace(
        trial(settings, rate, noise, draw, seconds), mode="paced", idle_fraction=idle, step_time_s=step_time_s
    )


def test_workers_that_take_turns_evenly_hand_over_no_slower():
    """Drained, two such make every wait half a batch's time; a paced consumer finds batches ready."""
    candidates = Candidates(Consumer(step_time_s=0.1, batch_size=64))
    candidates.add(replace(trial(W(2), 640), wait_p10_s=0.1))
    assert candidates.consumer.idle(W(2), 640) == pytest.approx(0.5)
    candidates.add(replace(paced(W(2), 0.01, 0.1), wait_p10_s=0.001))
    assert candidates.consumer.idle(W(2), 640) == pytest.approx(0.01, abs=0.001)


def test_what_a_paced_trial_saw_overrules_the_prediction():
    consumer = Consumer(step_time_s=0.1, batch_size=64)
    candidates = candidates_of({W(2): 800, W(4): 1600}, consumer=consumer)
    candidates.add(paced(W(2), 0.3, 0.1))
    assert candidates.recommend(0.03).settings == W(4)
    candidates.add(paced(W(4), 0.01, 0.1))
    profile = advised(candidates, step_time_s=0.1)
    assert profile.idle_fraction == profile.idle_measured == 0.01
    assert profile.idle_from_rate == 0.0


def test_idle_shares_of_paced_trials_combine_as_shares_of_time():
    candidates = candidates_of({W(2): 320}, consumer=Consumer(step_time_s=0.1, batch_size=64))
    candidates.add(paced(W(2), 0.6, 0.1, seconds=1.0))
    candidates.add(paced(W(2), 0.4, 0.1, seconds=3.0))
    candidate = candidates.by_settings[W(2)]
    assert candidates.expected_idle(candidate) == pytest.approx(0.45)
    low, high = candidates.idle_interval(candidate)
    assert low < 0.45 < high
    assert high - low > 0.15  # two trials that differ by 20 points


def test_the_idle_interval_holds_the_truth():
    """95 % of intervals, from three paced trials or from drained ones alone; here of 60, so 52 at least."""
    draw, consumer = random.Random(2), Consumer(step_time_s=0.1, batch_size=64)
    held = {"paced": 0, "drained": 0}
    for _ in range(60):
        candidates = candidates_of({}, consumer=consumer)
        for _ in range(3):
            rate = 320 * math.exp(draw.gauss(0, 0.04))  # so the true idle share is a half
            candidates.add(trial(W(2), rate, 0.02, draw))
            candidates.add(trial(W(4), rate, 0.02, draw))
            candidates.add(paced(W(4), 1 - 0.1 * rate / 64, 0.1, draw, 0.02))
        for kind, settings in (("drained", W(2)), ("paced", W(4))):
            low, high = candidates.idle_interval(candidates.by_settings[settings])
            held[kind] += low < 0.5 < high
            assert high - low < {"paced": 0.2, "drained": 0.4}[kind]
    assert min(held.values()) >= 52


def test_a_consumer_that_never_waits_is_sure_of_it():
    """Its own step is the limit: that the loader's rate varies does not make its idle share vary."""
    draw, consumer = random.Random(3), Consumer(step_time_s=0.1, batch_size=64)
    candidates = candidates_of({W(2): 1600}, noise=0.1, consumer=consumer)
    for _ in range(3):
        candidates.add(paced(W(2), 0.0, 0.1, draw))
    low, high = candidates.idle_interval(candidates.by_settings[W(2)])
    assert low == 0.0
    assert high < 0.02


def test_what_pacing_showed_of_one_is_expected_of_others():
    """A configuration no consumer was paced on is no better for that."""
    kept = Settings(persistent_workers=True).with_workers(2)
    candidates = candidates_of({W(2): 500, kept: 500}, consumer=Consumer(step_time_s=0.1, batch_size=64))
    candidates.add(paced(W(2), 0.45, 0.1))
    assert candidates.recommend(0.03).settings == W(2)
    assert candidates.expected_idle(candidates.by_settings[kept]) == pytest.approx(0.45, abs=0.02)


def test_verdicts():
    loader = advised(candidates_of({W(2): 320}, consumer=Consumer(0.1, 64)), step_time_s=0.1)
    assert loader.bound == "loader"
    assert loader.verdict.startswith("Loader-bound: at 100 ms per step the consumer idles 50 %")
    unknown = advised(candidates_of({W(2): 640}))
    assert unknown.bound == "step-dependent"
    assert "shorter than 100 ms per batch" in unknown.verdict
    hurt = advised(candidates_of({W(0): 6400, W(2): 640}))
    assert "shorter than 190 ms per batch" in hurt.verdict  # 10 ms of loading is 5 % of 200 ms
    assert hurt.verdict.endswith("workers are slower.")
    assert "--step-time" in advised(candidates_of({W(0): 6400, W(2): 6400})).verdict
    candidates = candidates_of({W(2): 6400}, consumer=Consumer(samples=6400))
    for t in candidates.by_settings[W(2)].trials:
        t.first_batch_s = 5.0
    start = advised(candidates)
    assert start.bound == "start-up"
    assert start.verdict.startswith("Start-up-bound")
    assert start.recommendation["persistent_workers"] is True
    kept = trial(Settings(persistent_workers=True).with_workers(2), 6400)
    kept.first_batch_s = kept.later_first_batch_s = 5.0  # tried, and no better
    candidates.add(kept)
    assert advised(candidates).recommendation["persistent_workers"] is False


def test_a_batch_sampler_leaves_no_batch_size_to_paste():
    subject = {"fixed_words": ["batch_sampler=mine"], "fixed_batches": True, "loader_class": "Mine"}
    profile = Profile(subject=subject)
    advise(profile, candidates_of({Settings(batch_size=None): 1000}), 0.03)
    assert profile.call == "Mine(dataset, batch_sampler=mine, num_workers=0)"
    assert "batch_size" not in profile.recommendation


def test_knobs_that_made_no_difference_are_named():
    other = Settings(prefetch_factor=4).with_workers(2)
    profile = advised(candidates_of({W(2): 1000, other: 1004, W(0): 500}, noise=0.005, repeats=6))
    by_knob = {effect["knob"]: effect["words"] for effect in profile.knobs}
    assert by_knob == {"prefetch_factor": "no difference", "num_workers": "slower"}
    assert effect_words(1.1, 1.3, 0.03) == "faster"
    assert effect_words(0.8, 1.2, 0.03) == "cannot tell"


def test_order_is_given_up_only_for_a_real_gain():
    loose = Settings(in_order=False).with_workers(2)
    assert candidates_of({W(2): 1000, loose: 1040}, noise=0.05).recommend(0.03).settings == W(2)
    assert candidates_of({W(2): 1000, loose: 1400}, noise=0.01).recommend(0.03).settings == loose


def test_pareto_rows():
    rows = [
        {"value_samples_per_s": value, "settings": {"num_workers": workers}, "memory_bytes": memory}
        for value, workers, memory in [(10, 2, 100), (9, 3, 90), (9, 3, 110), (5, 0, 50)]
    ]
    mark_pareto(rows)
    assert [row["pareto"] for row in rows] == [True, True, False, True]


def test_cost_counts_workers_first():
    assert cost(W(1)) < cost(W(2)) < cost(Settings(prefetch_factor=4).with_workers(2))
    assert cost(W(2)) < cost(Settings(in_order=False).with_workers(2))
    assert changed_knobs(W(0), W(2)) == ["num_workers"]


def test_exit_codes():
    assert Profile().exit_code == 3
    assert Profile(interrupted=True).exit_code == 130
    assert Profile(recommendation={}, confidence=0.9).exit_code == 0
    assert Profile(recommendation={}, confidence=0.2).exit_code == 4


def test_numbers_in_words():
    assert [si(v) for v in (12.34, 1234.5, 12345, 2.5e6)] == ["12.3", "1,234", "12.3 k", "2.5 M"]
    assert [duration(v) for v in (2.0, 0.0123, 4.5e-6, None)] == ["2 s", "12.3 ms", "4.5 us", "-"]
    assert quantile([1, 2, 3, 4], 0.5) == 2
    assert quantile([], 0.5) is None


def test_a_dataset_shorter_than_a_batch_makes_short_batches():
    profile = advised(candidates_of({W(0): 1000}, consumer=Consumer(batch_size=64, samples=5)))
    assert profile.rate_batches_per_s == pytest.approx(200, rel=0.02)
    assert "num_workers=0 adds 5 ms to each" in profile.verdict
