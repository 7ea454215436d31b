"""A group in two ranks: rounds enough for an interval, and what of the subject's time is its collectives."""

import math
import time
from functools import partial

import pytest
import ranks  # noqa: F401  the fixture that ends the server of ranks looks for it
import torch
from torch import distributed as dist

from mbperf.measure import heap
from mbperf.measure.group import Group
from mbperf.measure.ranks import measure_in_ranks
from mbperf.measure.rounds import Plan
from mbperf.measure.statistics import LEAST_ROUNDS, paired_ratio

SLEEP_S = 0.02


def all_gather(x):
    c10d, world = torch.ops._c10d_functional, dist.group.WORLD
    return (c10d.wait_tensor(c10d.all_gather_into_tensor(x, world.size(), world.group_name)),)


def sleep_and_gather(x):
    time.sleep(SLEEP_S)
    return all_gather(x)


def all_reduce(x):
    dist.all_reduce(x.clone())
    return all_gather(x)


def gathered(x):
    return (torch.cat([x] * 2),)


def group(subject):
    return Group(
        "gather", "1000", make_inputs, {"mine": subject, "theirs": sleep_and_gather}, gathered,
        measured_by=partial(measure_in_ranks, build=partial(group, subject), ranks=2),
    )  # fmt: skip


def make_inputs():
    return (torch.arange(1000.0),)


def measured(subject):
    plan = Plan(budget_s=0.1, min_rounds=LEAST_ROUNDS, max_rounds=LEAST_ROUNDS, patience_s=30)
    its = group(subject)
    return its.measured_by(its, plan)


@pytest.mark.parametrize(("subject", "least", "most"), [(all_gather, 0.5, 2.0), (sleep_and_gather, 0.0, 0.5)])
def test_the_share_of_collectives_is_measured_in_the_same_rounds(subject, least, most):
    samples = measured(subject)
    assert not samples.wrong
    assert not samples.failed
    facts = samples.extra_metrics["mine"]
    assert (facts["collectives"], facts["sent_bytes"], facts["world_size"]) == (1, 4000, 2)
    assert least < facts["collectives_share"] < most
    assert 0 < facts["collectives_s"] < SLEEP_S
    assert math.isfinite(paired_ratio(samples.seconds["theirs"], samples.seconds["mine"]).high)
    assert samples.heap == (heap.RECYCLED if heap.has_states() else "")
    assert samples.page_faults.keys() == samples.seconds.keys() == {"mine", "again", "theirs", "null"}


def test_a_subject_that_reduces_is_refused():
    assert "NotImplementedError: measure_in_ranks: a subject may all-gather" in measured(all_reduce).failed
