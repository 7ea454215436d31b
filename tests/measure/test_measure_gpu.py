"""The ruler on a GPU, with a device whose work takes the time it is told to."""

import gc
import random
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from mbperf.measure import gpu
from mbperf.measure.figures import figures
from mbperf.measure.gpu import EagerCalls, GraphCalls, input_sets, timer
from mbperf.measure.gpu_group import Overwrites, measure_on_gpu
from mbperf.measure.group import Group
from mbperf.measure.rounds import Plan
from mbperf.measure.traffic import Traffic

CACHE = 60 << 20


class Work:
    """A call that keeps the fake device busy, from memory or, where it was just there, from cache."""

    def __init__(self, device, seconds, data, warm_share=1.0):
        self.device, self.seconds, self.data, self.warm_share = device, seconds, data, warm_share

    def __call__(self):
        cached = self.data in self.device.cached
        self.device.busy(self.seconds * (self.warm_share if cached else 1.0))
        self.device.touch(self.data)


class FakeGpu:
    """Time passes on the device alone, and by launches on the host's clock."""

    launch_s = 5e-6

    def __init__(self, holds=2, clocks=(1980.0,), noise=0.0):
        self.now, self.host, self.holds, self.cached = 0.0, 0.0, holds, []
        self.clocks, self.asked, self.captured, self.leads = clocks, 0, [], 0
        self.alive, self.left = [], []
        self.rng, self.noise, self.capturing = random.Random(0), noise, False

    def busy(self, seconds):
        self.now += 0.0 if self.capturing else seconds * (1 + self.noise * self.rng.uniform(-1, 1))

    def touch(self, data):
        if not self.capturing:
            self.cached = [*(one for one in self.cached if one != data), data][-self.holds :]

    def capture(self, calls):
        self.captured.append(len(calls))

        def replay():
            self.host += self.launch_s
            for call in calls:
                call()

        return replay

    def release(self):
        gc.collect()
        self.left.append(sum(one() is not None for one in self.alive))

    def event(self):
        device = self

        class Event:
            def record(self):
                self.at = device.now

            def elapsed_time(self, later):
                return (later.at - self.at) * 1e3

        return Event()

    def synchronize(self):
        self.host = max(self.host, self.now)

    def lead(self):
        self.leads += 1
        self.now += 50e-6

    def sm_clock_mhz(self):
        self.asked += 1
        return self.clocks[self.asked % len(self.clocks)] if self.clocks else None

    def cache_bytes(self):
        return CACHE

    def roof(self, traffic, copies):
        return [Work(self, 40e-6, ("roof", k)) for k in range(copies)]


# Calls.


@pytest.mark.parametrize("n", [1, 5, 10, 50, 1000])
def test_a_graph_gives_the_time_of_a_call(n):
    device = FakeGpu()
    calls = GraphCalls([Work(device, 30e-6, k) for k in range(5)], device)
    assert calls.timed(n) == pytest.approx(30e-6 * n)


def test_a_graph_is_long_beside_its_launch():
    device = FakeGpu()
    calls = GraphCalls([Work(device, 2e-6, k) for k in range(5)], device)
    assert calls.calls_a_graph * 2e-6 >= gpu.GRAPH_S
    assert calls.calls_a_graph % 5 == 0
    long = GraphCalls([Work(device, 10e-3, 0)], device)
    assert long.calls_a_graph == 1


def test_the_waiting_before_the_start_is_not_counted():
    device = FakeGpu()
    calls = GraphCalls([Work(device, 30e-6, 0)], device)
    leads = device.leads
    assert calls.timed(1) == pytest.approx(30e-6)
    assert device.leads == leads + 1


def test_a_rotation_finds_nothing_in_the_cache():
    device = FakeGpu(holds=2)
    cold = GraphCalls([Work(device, 30e-6, k, warm_share=0.5) for k in range(5)], device)
    warm = GraphCalls([Work(device, 30e-6, "only", warm_share=0.5)], device)
    assert cold.timed(100) == pytest.approx(3e-3)
    assert warm.timed(100) == pytest.approx(1.5e-3, rel=0.1)  # what the rotation is there to prevent


def test_eager_time_is_the_hosts_until_the_device_is_done():
    device = FakeGpu()

    def launch(work):
        device.host += device.launch_s
        device.now = max(device.now, device.host)
        work()

    calls = [partial(launch, Work(device, 1e-6, k)) for k in range(3)]
    eager = EagerCalls(calls, device, clock=lambda: device.host)
    assert eager.timed(300) == pytest.approx(300 * device.launch_s, rel=0.01)  # launches are the longer part
    slow = EagerCalls([partial(launch, Work(device, 1e-3, 0))], device, clock=lambda: device.host)
    assert slow.timed(10) == pytest.approx(10e-3, rel=0.01)


def test_input_sets_leave_the_cache():
    assert input_sets(Traffic(4 << 20, 0), CACHE) == 75
    assert input_sets(Traffic(300 << 20, 0), CACHE) == 1
    assert input_sets(Traffic(299 << 20, 0), CACHE) == 2


def test_only_calls_that_time_themselves_are_timed():
    with pytest.raises(AssertionError):
        timer(int, 3)


# Groups.


def double(device, seconds, x):
    Work(device, seconds, x.data_ptr(), 0.5)()
    return (x * 2,)


def group(device, **seconds):
    return Group(
        "double", "1", lambda: (torch.randn(8),),
        {name: partial(double, device, s) for name, s in seconds.items()},
        lambda x: [x.double() * 2],
        traffic=Traffic(100 << 20, 0),
    )  # fmt: skip


PLAN = Plan(budget_s=3, min_rounds=12, max_rounds=24, seed=1)


def test_a_known_ratio_is_recovered():
    device = FakeGpu(holds=1, noise=0.02)
    samples = measure_on_gpu(group(device, mine=50e-6, theirs=80e-6), PLAN, eager=False, device=device)
    assert set(samples.seconds) == {"mine", "again", "theirs", "roof", "null"}
    assert samples.inner_calls % 3 == 0  # three input sets of 100 MiB are five caches
    row = figures(group(device, mine=1, theirs=1), [samples])["mine"]
    assert row["ratios"]["theirs"]["ratio"] == pytest.approx(1.6, rel=0.02)
    assert row["ratios"]["theirs"]["verdict"] == "FASTER"
    assert row["ratios"]["roof"]["ratio"] == pytest.approx(0.8, rel=0.02)
    assert row["clean_control"]


def test_the_clock_is_recorded_in_every_round():
    device = FakeGpu(clocks=(1980.0, 1755.0))
    samples = measure_on_gpu(group(device, mine=50e-6), PLAN, eager=False, device=device)
    assert len(samples.sm_clock_mhz) >= 2 * 12
    row = figures(group(device, mine=1), [samples])["mine"]
    assert (row["sm_clock_hz"]["low"], row["sm_clock_hz"]["high"]) == (1755e6, 1980e6)


def test_a_machine_that_tells_no_clock_is_measured_all_the_same():
    device = FakeGpu(clocks=())
    samples = measure_on_gpu(group(device, mine=50e-6), PLAN, eager=False, device=device)
    assert samples.sm_clock_mhz == []
    assert "sm_clock_hz" not in figures(group(device, mine=1), [samples])["mine"]


def test_nothing_of_the_last_group_is_alive_when_the_next_begins():
    device = FakeGpu()

    def inputs():
        x = torch.randn(8)
        device.alive.append(weakref.ref(x))
        return (x,)

    for _ in range(2):
        one = replace(group(device, mine=50e-6), make_inputs=inputs)
        measure_on_gpu(one, PLAN, eager=False, device=device)
    assert len(device.alive) > 4
    assert device.left == [0, 0]


def test_a_wrong_contender_loses_its_timing():
    device = FakeGpu()
    good = group(device, mine=50e-6)
    contenders = {**good.contenders, "wrong": lambda x: (x * 3,), "nothing": lambda x: ()}
    bad = Group("double", "1", good.make_inputs, contenders, good.expected, traffic=good.traffic)
    samples = measure_on_gpu(bad, PLAN, eager=False, device=device)
    assert set(samples.wrong) == {"wrong", "nothing"}
    assert "wrong" not in samples.seconds
    assert "nothing" not in samples.seconds


def test_a_contender_that_overwrites_its_input_spoils_nobody_elses():
    device = FakeGpu()
    good = group(device, mine=50e-6)

    def in_place(x):
        Work(device, 60e-6, x.data_ptr())()
        return (x.mul_(2),)

    contenders = {**good.contenders, "in place": Overwrites(in_place)}
    mixed = Group("double", "1", good.make_inputs, contenders, good.expected, traffic=good.traffic)
    samples = measure_on_gpu(mixed, PLAN, eager=False, device=device)
    assert samples.wrong == {}
    assert "in place" in samples.seconds
    unmarked = {**good.contenders, "in place": in_place}
    spoiled = Group("double", "1", good.make_inputs, unmarked, good.expected, traffic=good.traffic)
    assert "in place" in measure_on_gpu(spoiled, PLAN, eager=False, device=device).wrong
