"""Cold groups: what is called cold comes from memory, whatever the cache, within bounds that always hold."""

import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from mbperf import processors
from mbperf.measure import cold, machine
from mbperf.measure.cold import ColdCalls, evict, tensors_read
from mbperf.measure.group import SEED, Group, make, measure
from mbperf.measure.roof import roof_call
from mbperf.measure.rounds import Plan
from mbperf.measure.traffic import Traffic, copy_traffic

sys.path.append(str(Path(__file__).parents[2] / "bench"))

pytestmark = [pytest.mark.timed, pytest.mark.usefixtures("few_objects_to_collect")]

MIB = 1 << 20
# A small virtual machine, Zen 4, Sapphire Rapids as guests see it, Genoa-X; a system that tells nothing.
CACHES = {"1M": MIB, "32M": 32 * MIB, "300M": 300 * MIB, "1179648K": 1152 * MIB, None: None}
PLAN = Plan(budget_s=0.05, min_rounds=4, max_rounds=9)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other beside other tests take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CACHES, ids=str)
def last_cache(request, tmp_path, monkeypatch):
    """A machine whose last cache has this size, or whose system does not say."""
    if request.param:
        (tmp_path / "index3").mkdir()
        (tmp_path / "index3/size").write_text(f"{request.param}\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    forget(monkeypatch)
    return CACHES[request.param]


@pytest.fixture
def no_instruction(monkeypatch):
    """A processor that cannot evict; what a probe would see is another test's matter."""
    monkeypatch.setattr(cold, "_evict_lines", lambda tensors: False)
    monkeypatch.setattr(cold, "_probe", lambda: (1.0, 9.0))
    forget(monkeypatch)


WHY_NOT, LARGER = cold.why_not.__wrapped__, cold._larger_than_the_caches.__wrapped__


def forget(monkeypatch):
    """Ask the machine again, here and in the next test."""
    monkeypatch.setattr(cold, "why_not", cache(WHY_NOT))
    monkeypatch.setattr(cold, "_larger_than_the_caches", cache(LARGER))


def memory_left(monkeypatch, count):
    monkeypatch.setattr(machine, "available_bytes", lambda: count)


def doubles(size, made=None):
    """A cold group on `size` float32 numbers."""

    def inputs():
        if made is not None:
            made.append(torch.initial_seed() - SEED)
        return (torch.randn(size),)

    contenders = {"mine": lambda x: (x + x,), "theirs": lambda x: (x * 2,)}
    return Group(
        "double", f"{size} cold", inputs, contenders, lambda x: (x * 2,), copy_traffic(4 * size), cold=True
    )


# Cold is cold.


def test_what_was_evicted_comes_from_memory(say):
    cached_s, evicted_s = cold._probe()
    say(f"64 KiB: {cached_s * 1e6:.2f} us from the caches, {evicted_s * 1e6:.2f} us evicted")
    assert evicted_s > cold.LEAST_SLOWDOWN * cached_s


TENSORS = {"dense": torch.rand(5), "strided": torch.rand(6, 4)[::2, 1:], "empty": torch.rand(0)}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_eviction_changes_nothing(tensor):
    before = tensor.clone()
    evict([tensor, tensor.clone().requires_grad_(), torch.tensor(1)])
    assert torch.equal(tensor, before)


def test_every_call_between_two_evictions_has_an_input_of_its_own():
    log = []
    calls = ColdCalls([partial(log.append, k) for k in range(4)], lambda: log.append("evict"))
    calls.timed(6)
    calls()  # as before each contender's timed calls
    calls.timed(4)
    assert log == ["evict", 0, 1, 2, 3, "evict", 0, 1, 2, "evict", 3, 0, 1, 2]


def test_the_eviction_is_not_timed():
    calls = ColdCalls([int], lambda: time.sleep(0.02))
    assert calls.timed(3) < 0.02


def test_contenders_and_the_memory_limit_are_as_cold_as_each_other(monkeypatch):
    evicted = []
    monkeypatch.setattr(cold, "evict", evicted.extend)
    group = doubles(5_000)
    sets = [[make(group, k) for k in range(3)] for _ in range(2)]
    calls = cold.calls(group, {"mine": group.contenders["mine"]}, sets)
    for name, expected in {"mine": 3 * 20_000, "roof": 3 * 20_000, "null": 0}.items():
        evicted.clear()
        cold.timer(calls[name][0], 3)
        assert len({t.data_ptr() for t in evicted}) == (3 if expected else 0)
        assert sum(t.nbytes for t in evicted) == expected


def test_the_pilot_of_the_memory_limit_is_cold_too():
    seen = []

    def timer(call, n):
        seen.append(call)
        return cold.timer(call, n)

    copies = []

    def in_turn(moves, sources):
        copies.append(len(sources))
        return ColdCalls(moves, partial(evict, sources))

    roof_call(Traffic(4096, 64), copies=3, in_turn=in_turn, timer=timer)
    assert copies == [3, 3]
    assert len({id(call) for call in seen}) == 2


def test_a_group_may_say_what_its_calls_read():
    rows = torch.rand(10, 3)
    group = Group("rows", "cold", tuple, {}, list, reads=lambda index: [rows[i] for i in index], cold=True)
    assert [t.data_ptr() for t in tensors_read(group, [([4],), ([7],)])] == [
        rows[4].data_ptr(),
        rows[7].data_ptr(),
    ]


@pytest.mark.parametrize("batch_size", [64, 1_024])
def test_no_two_cold_batches_of_the_gather_share_a_row(batch_size):
    import bench_gather

    rows = [
        i
        for k in range(cold.MOST_INPUTS)
        for i in batch(bench_gather.group("uint8", batch_size, cold=True), k)
    ]
    assert len(rows) == len(set(rows)) == cold.MOST_INPUTS * batch_size


def batch(group, number):
    return make(group, number)[0]


# Any machine.


@pytest.mark.parametrize("size", [16, 12_544, 1 << 20])
def test_inputs_are_few_and_small_whatever_the_cache(last_cache, size):
    made = []
    samples = measure(doubles(size, made), PLAN)
    contenders, count = 3, len(made)
    assert samples.wrong == {}
    assert samples.not_measured == ""
    assert made == list(range(count))  # of each, the other contenders have copies
    assert count <= cold.MOST_INPUTS
    assert count == 1 or count * contenders * 4 * size <= cold.MOST_BYTES
    assert samples.inner_calls % count == 0


def test_inputs_whose_check_is_slow_are_fewer():
    group = doubles(16)
    made = []

    def slow(x):
        time.sleep(cold.MOST_CHECK_S / 4)
        return (x * 2,)

    slow_to_check = Group(
        "double", "cold", lambda: (made.append(1), (torch.randn(16),))[1], group.contenders, slow,
        group.traffic, cold=True,
    )  # fmt: skip
    start = time.monotonic()
    measure(slow_to_check, PLAN)
    assert len(made) <= 3 * 4
    assert time.monotonic() - start < 10 * cold.MOST_CHECK_S


def test_inputs_are_fewer_where_memory_is_short(monkeypatch):
    made = []
    memory_left(monkeypatch, 16 * MIB)
    measure(
        doubles(MIB // 4, made), PLAN
    )  # 1 MiB for each of three contenders, the reference twice, the limit
    assert max(made) == 0


@pytest.mark.usefixtures("no_instruction")
def test_without_an_instruction_twice_the_cache_is_read_or_the_row_says_why_not(last_cache, monkeypatch):
    read = []
    memory_left(monkeypatch, 3 << 30)
    monkeypatch.setattr(cold, "_read", lambda tensor: read.append(tensor.nbytes))
    samples = measure(doubles(1_000), PLAN)
    if last_cache is None:
        assert "does not tell how large a cache" in samples.not_measured
    elif 2 * last_cache > (3 << 30) // cold.MEMORY_SHARE:
        assert "twice its last cache (1152 MiB) is no small share of the memory" in samples.not_measured
    else:
        assert samples.not_measured == ""
        assert set(read) == {2 * last_cache}
    assert bool(samples.seconds) == (not samples.not_measured)
    assert samples.wrong == {}


@pytest.mark.usefixtures("no_instruction")
def test_reading_that_takes_long_is_a_reason(monkeypatch):
    memory_left(monkeypatch, 64 << 30)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 64)
    monkeypatch.setattr(cold, "_read", lambda _: time.sleep(1.5 * cold.MOST_READING_S))
    assert "takes 0.1" in cold.why_not()


def test_an_eviction_that_does_nothing_is_found_out(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(cold, "_evict_lines", lambda tensors: True)
    assert "64 KiB taken out of the caches are read in" in cold.why_not()


def test_a_group_that_is_wrong_says_so_even_where_it_cannot_be_cold(monkeypatch):
    monkeypatch.setattr(cold, "why_not", lambda: "too new")
    group = doubles(16)
    wrong = Group(
        "double", "cold", group.make_inputs, {**group.contenders, "mine": lambda x: (x * 3,)},
        group.expected, group.traffic, cold=True,
    )  # fmt: skip
    samples = measure(wrong, PLAN)
    assert "mine" in samples.wrong
    assert samples.not_measured == "too new"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max\n"}, 8 << 30),
        ({"memory.max": f"{256 * MIB}\n"}, 256 * MIB),
        ({"memory/memory.limit_in_bytes": f"{512 * MIB}\n"}, 512 * MIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 << 30),
        ({}, 8 << 30),
    ],
)
def test_memory_within_the_limits_of_control_groups(files, expected, tmp_path, monkeypatch):
    import psutil

    version_1 = any(name.startswith("memory/") for name in files)
    (tmp_path / "self").write_text("4:memory:/\n3:cpu,cpuacct:/\n" if version_1 else "0::/\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(processors, "CGROUP_FILE", tmp_path / "self")
    monkeypatch.setattr(processors, "CGROUP_ROOT", tmp_path)
    left = type("Left", (), {"available": 8 << 30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    assert machine.available_bytes() == expected


def test_a_system_that_does_not_tell_its_cache_has_none_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CACHES", tmp_path / "missing")
    assert machine.last_cache_bytes() is None
    assert machine.hardware()["last_cache_bytes"] is None
    (tmp_path / "missing/index0").mkdir(parents=True)
    (tmp_path / "missing/index0/size").write_text("unknown")
    assert machine.last_cache_bytes() is None
