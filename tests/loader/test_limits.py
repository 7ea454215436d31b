"""The loader on pretended machines: 1 core, 64 cores, quotas and memory limits of a container."""

import pytest
from pretended import GIB, pretend
from test_candidates import W

from mbperf.loader.processes.ranks import RanksRunner
from mbperf.loader.processes.runner import TrialRunner
from mbperf.loader.profiler import machine_facts
from mbperf.loader.search import limits
from mbperf.loader.search.model import Consumer, Model
from mbperf.loader.search.space import Space
from mbperf.loader.search.sweep import Budget, Sweep
from mbperf.loader.shard import Shard
from mbperf.loader.source import Source
from mbperf.loader.trial.probe import Costs

MIB = 1 << 20


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("cores", "quota", "cpus", "most"),
    [(1, None, 1.0, 4), (64, None, 64.0, 128), (64, 8.0, 8.0, 16), (64, 1.5, 1.5, 4), (64, 0.5, 0.5, 4)],
)
def test_processors_decide_how_many_workers_are_tried(
    cores, quota, cpus, most, version, tmp_path, monkeypatch
):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota, version=version)
    assert limits.usable_cpus() == cpus
    assert machine_facts()["usable_cpus"] == cpus
    assert machine_facts()["cgroup_quota"] == quota
    assert Space().worker_counts(limits.usable_cpus(), 0.0)[-1] == most
    sweep = Sweep(None, Consumer(), Budget(60.0), 0.03, 0, lambda event, payload: None)
    assert sweep.model.cpus == cpus


@pytest.mark.parametrize(("cores", "quota", "best"), [(1, None, 1), (64, None, 8), (64, 2.0, 2)])
def test_work_of_the_processor_is_predicted_to_scale_as_far_as_there_are_some(
    cores, quota, best, tmp_path, monkeypatch
):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota)
    costs = Costs(getitem_s=1e-2, getitem_cpu_s=1e-2, samples=100, batch_size=64)
    model = Model(costs, limits.usable_cpus())
    rates = {workers: model.rate(W(workers)) for workers in (1, 2, 4, 8)}
    assert rates[8] == pytest.approx(best * rates[1], rel=0.05)
    assert min(workers for workers in rates if rates[workers] > 0.95 * rates[8]) == best


@pytest.mark.parametrize(
    ("cores", "quota", "ranks", "each"),
    [(64, None, 8, 8.0), (64, 16.0, 8, 2.0), (1, None, 2, 0.5), (64, 1.0, 4, 0.25)],
)
def test_ranks_share_processors_and_quota(cores, quota, ranks, each, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, cores=cores, quota=quota)
    runner = RanksRunner.here(Source(live=[0]), 1.0, ranks)
    assert runner.cpus == each
    assert runner.cpus_of_all == ranks * each
    runner.close()
    alone = TrialRunner(Source(live=[0]), shard=Shard(0, ranks))
    assert alone.cpus == ranks * each
    alone.close()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "fits"),
    [
        (None, 0, 0, True),
        (1 * GIB, 0, 0, True),
        (1 * GIB, GIB - 40 * MIB, 0, False),
        (1 * GIB, GIB - 40 * MIB, 30 * MIB, True),
        (40 * MIB, 0, 0, False),
    ],
)
def test_batches_in_flight_have_to_fit_into_the_control_groups_memory(
    limit, used, cached, fits, version, tmp_path, monkeypatch
):
    """/dev/shm counts as the group's memory: a container may have more of it than it may use."""
    pretend(monkeypatch, tmp_path, cores=64, memory_bytes=limit, used_bytes=used, cached_bytes=cached,
            version=version)  # fmt: skip
    monkeypatch.setattr(limits, "shared_memory_free", lambda: 64 * GIB)
    found = limits.foreseen(W(2), 10 * MIB, 1)  # 2 workers x prefetch 2, and the one that is consumed: 50 MiB
    assert ("memory" in found) == (not fits)
    if not fits:
        assert found["memory"].startswith("needs up to 52 MB of shared memory (batch x prefetch x workers)")
        assert "the control group leaves 42 MB of memory" in found["memory"]
    assert limits.foreseen(W(0), 10 * MIB, 1) == {}
