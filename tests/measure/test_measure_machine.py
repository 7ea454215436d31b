"""What is read of a machine, on pretended ones: 1 core, 64 cores, quotas, memory limits."""

from types import SimpleNamespace

import pytest
import torch
from pretended import GIB, pretend

from mbperf import processors
from mbperf.doctor import heap, processor
from mbperf.measure import cold, machine
from mbperf.plugin import session
from mbperf.plugin.session import PROFILES, Session


def test_a_gpu_is_told_in_base_units(monkeypatch):
    told = SimpleNamespace(
        name="NVIDIA Test 1", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
        L2_cache_size=50 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    assert machine.gpu() == {
        "name": "NVIDIA Test 1", "machine": "nvidia-test-1", "compute_capability": "9.0",
        "multiprocessors": 132, "memory_bytes": 80 << 30, "last_cache_bytes": 50 << 20,
    }  # fmt: skip


VERSIONS = pytest.mark.parametrize("version", [1, 2])


@VERSIONS
@pytest.mark.parametrize(
    ("cores", "quota", "usable"),
    [(1, None, 1), (64, None, 64), (64, 2.0, 2), (64, 1.5, 2), (64, 0.25, 1), (1, 4.0, 1)],
)
def test_processors(cores, quota, usable, version, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota, version=version)
    assert processors.affinity() == cores
    assert processors.quota() == quota
    assert processors.usable() == usable
    # The name is the hardware's: a quota comes and goes with the container.
    assert f"-{cores}c-" in machine.name()
    assert machine.hardware()["cores"] == cores
    assert machine.hardware()["name"] == machine.name()


@VERSIONS
@pytest.mark.parametrize(
    ("limit", "used", "cached", "expected"),
    [
        (None, 0, 0, 8 * GIB),
        (16 * GIB, 0, 0, 8 * GIB),
        (4 * GIB, 0, 0, 4 * GIB),
        (4 * GIB, 3 * GIB, 0, 1 * GIB),
        (4 * GIB, 3 * GIB, 2 * GIB, 3 * GIB),  # cached files give way
        (4 * GIB, 1 * GIB, 2 * GIB, 4 * GIB),
        (4 * GIB, 5 * GIB, 0, 0),
    ],
)
def test_memory(limit, used, cached, expected, version, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=2, memory_bytes=limit, used_bytes=used, cached_bytes=cached,
            version=version)  # fmt: skip
    assert machine.available_bytes() == expected
    monkeypatch.setattr(heap, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {8 << 20} kB\n")
    assert heap.available_bytes() == expected


def test_the_tightest_of_nested_groups_counts(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=64, quota=8.0, memory_bytes=6 * GIB, used_bytes=4 * GIB)
    (tmp_path / "self").write_text("0::/pod/box\n")
    for name, limit in (("pod", "400000 100000"), ("pod/box", "max 100000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.max").write_text(limit)
    (tmp_path / "pod/box/memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "pod/box/memory.current").write_text(f"{GIB // 2}\n")
    assert processors.quota() == 4.0
    assert machine.available_bytes() == 2 * GIB


def test_a_system_without_control_groups(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=64)
    monkeypatch.setattr(processors, "CGROUP_FILE", tmp_path / "missing")
    monkeypatch.setattr(processors, "CGROUP_ROOT", tmp_path / "missing")
    assert (processors.quota(), processors.memory_left()) == (None, None)
    assert processors.usable() == 64
    assert machine.available_bytes() == 8 * GIB


@pytest.mark.parametrize(
    ("cores", "quota", "memory", "judges"),
    [(1, None, None, 1), (64, None, None, 2), (64, 1.0, None, 1), (64, 2.0, None, 2), (64, None, 1 << 20, 1)],
)
def test_groups_are_judged_side_by_side_where_there_is_room(
    cores, quota, memory, judges, tmp_path, monkeypatch
):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota, memory_bytes=memory)
    _, found = judged(monkeypatch, {"one": 1 << 20})
    assert found["one"][0] == judges


def test_a_group_that_needs_half_of_the_memory_is_judged_alone_and_keeps_none(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=64)
    most = 8 * GIB // 2 // session.JUDGE_COPIES
    run, found = judged(monkeypatch, {"fits": most, "does not": most + 1})
    assert found == {"fits": (2, True), "does not": (1, False)}
    fits, large = run.groups
    assert ([*run.states(fits, 0)], [*run.states(large, 0)]) == (["recycled"], ["fresh"])


def judged(monkeypatch, sizes):
    """A run of groups of these sizes; for each how many judges there may be, and whether they keep pages."""
    monkeypatch.setattr(session, "_bytes", lambda group: sizes[group.name])
    groups = [SimpleNamespace(name=name, also_fresh=False) for name in sizes]
    run, found = Session(PROFILES["default"], groups, lambda *told: None), {}

    def judge(groups, at_once, recycled):
        found.update(dict.fromkeys([group.name for group in groups], (at_once, recycled)))

    monkeypatch.setattr(run, "_judge_at_once", judge)
    run._judge(groups)
    return run, found


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "state"),
    [
        (1, None, 1, "ok"),
        (1, None, 2, "wrong"),
        (64, None, 64, "ok"),
        (64, None, 1, "note"),
        (64, 2.0, 64, "wrong"),
    ],
)
def test_the_doctor_sees_threads_and_processors(cores, quota, threads, state, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert processor.threads().state == state


def test_reading_through_a_cache_wants_a_small_share_of_the_memory_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "_evict_lines", lambda tensors: False)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 300 << 20)
    pretend(monkeypatch, tmp_path, cores=64, memory_bytes=4 * GIB, used_bytes=3 * GIB)
    assert "is no small share of the memory" in cold._why_not_by_reading()
