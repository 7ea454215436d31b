"""The model of the rate, the consumer's formulas, what the machine allows, the space of configurations."""

import pytest

from mbperf import processors
from mbperf.loader.search import limits
from mbperf.loader.search.model import Consumer, Model
from mbperf.loader.search.space import Space, grid, near_the_optimum, variants
from mbperf.loader.settings import Settings
from mbperf.loader.trial.probe import Costs

W = Settings().with_workers


def costs(getitem_s=1e-3, cpu_s=1e-3, collate_s=1e-4, batch_bytes=0):
    return Costs(getitem_s=getitem_s, getitem_cpu_s=cpu_s, batch_size=64, collate_s={"torch": collate_s},
                 batch_bytes=batch_bytes, samples=10)  # fmt: skip


def test_processor_bound_work_stops_at_the_processors():
    model = Model(costs(), cpus=2)
    rates = [model.rate(W(count)) for count in (0, 1, 2, 4, 8)]
    assert rates[0] == pytest.approx(64 / (0.064 + 1e-4))
    assert rates[1] < rates[0]
    assert rates[2] == pytest.approx(2 * rates[0], rel=0.05)
    assert rates[4] == pytest.approx(rates[2], rel=0.02)


def test_waiting_scales_with_workers():
    model = Model(costs(cpu_s=0.0), cpus=2)
    assert model.rate(W(8)) == pytest.approx(8 * model.rate(W(1)), rel=0.01)


def test_transport_makes_tiny_samples_slower_with_workers():
    model = Model(costs(getitem_s=1e-6, cpu_s=1e-6, collate_s=5e-5, batch_bytes=200_000), cpus=2)
    assert model.rate(W(0)) > max(model.rate(W(count)) for count in (1, 2, 4, 8))


def test_a_measured_rate_corrects_the_transport():
    model = Model(costs(getitem_s=1e-6, cpu_s=1e-6), cpus=2)
    model.correct(W(2), 20_000)
    assert model.rate(W(2)) == pytest.approx(20_000, rel=1e-3)


def test_a_measured_rate_without_workers_corrects_the_work():
    """The probe's samples are warm: real batches take three times as long, and so do they in workers."""
    model = Model(costs(), cpus=8)
    before = model.rate(W(0)), model.rate(W(2))
    model.correct(W(0), before[0] / 3)
    assert model.rate(W(0)) == pytest.approx(before[0] / 3)
    assert model.rate(W(2)) == pytest.approx(before[1] / 3, rel=0.02)
    model.correct(W(2), 500)
    assert model.rate(W(0)) == pytest.approx(before[0] / 3)  # whose work the transport does not touch


def test_idle_with_and_without_workers():
    consumer = Consumer(step_time_s=0.01)
    assert consumer.idle(W(2), 64 / 0.02) == pytest.approx(0.5)  # max(0, 1 - T * rate)
    assert consumer.idle(W(2), 64 / 0.005) == 0.0
    assert consumer.idle(W(0), 64 / 0.01) == pytest.approx(0.5)  # load and step follow each other
    assert Consumer(step_time_s=0.009, hand_over_s=0.001).idle(W(2), 64 / 0.005) == pytest.approx(0.1)


def test_start_up_counts_where_epochs_are_short():
    consumer = Consumer(samples=640)
    assert consumer.value(W(0), 1000.0, 0.064) == pytest.approx(1000)
    assert consumer.value(W(2), 1000.0, 0.128 + 0.64) == pytest.approx(500)
    assert Consumer().value(W(2), 1000.0, 5.0) == pytest.approx(1000)


def test_a_step_takes_as_long_as_its_batch_is_large():
    consumer = Consumer(step_time_s=0.01, batch_size=64)
    assert consumer.step_s(Settings(batch_size=128)) == pytest.approx(0.02)


def test_usable_cpus_is_the_smaller(monkeypatch):
    monkeypatch.setattr(processors, "affinity", lambda: 4)
    monkeypatch.setattr(processors, "quota", lambda: 2.5)
    assert limits.usable_cpus() == 2.5
    monkeypatch.setattr(processors, "quota", lambda: 64.0)
    assert limits.usable_cpus() == 4.0


def test_shortages_are_foreseen(monkeypatch):
    monkeypatch.setattr(limits, "shared_memory_free", lambda: 64 << 20)
    monkeypatch.setattr(limits, "descriptor_limit", lambda: 256)
    assert limits.foreseen(W(0), 100 << 20, 100) == {}
    shared, descriptors = limits.foreseen(W(4), 10 << 20, 40).values()
    assert "94 MB of shared memory" in shared  # 10 MiB x (4 workers x prefetch 2 + 1)
    assert "67 MB free" in shared
    assert "416 file descriptors" in descriptors
    assert "ulimit -n 512" in descriptors


def test_many_workers_only_for_datasets_that_wait():
    space = Space()
    assert space.worker_counts(2, 0.0) == [0, 1, 2, 3, 4]
    assert space.worker_counts(2, 0.9) == [0, 1, 2, 3, 4, 6, 8]
    assert Space(workers=[4, 0, 4]).worker_counts(2, 0.9) == [0, 4]


def test_the_order_starts_at_the_optimum_and_leaves_out_the_hopeless():
    model = Model(costs(cpu_s=0.0), cpus=2)
    configurations = grid([Settings()], [0, 1, 2, 4, 8], [64])
    order = near_the_optimum(configurations, model, Consumer(step_time_s=0.016), 0.6, False)
    assert [s.num_workers for s in order] == [4, 8]  # 4 workers hide a load of 64 ms behind steps of 16 ms
    order = near_the_optimum(configurations, model, Consumer(), 0.6, True)
    assert [s.num_workers for s in order] == [8, 4, 2, 1, 0]


def test_variants_change_one_knob_each():
    found = variants(W(2), Space(prefetch=(2, 4), contexts=(None, "spawn")), accelerator=False)
    assert [s.label() for s in found] == [
        "2 workers, batch 64, prefetch 4",
        "2 workers, batch 64, any order",
        "2 workers, batch 64, spawn",
        "2 workers, batch 64, persistent",
    ]
    assert [s.pin_memory for s in variants(W(0), Space(), accelerator=True)] == [True]


def test_settings_as_keywords_and_as_a_call():
    settings = Settings(in_order=False, persistent_workers=True, collate="mbperf").with_workers(2)
    assert settings.keywords() == {"batch_size": 64, "num_workers": 2, "prefetch_factor": 2,
                                   "persistent_workers": True, "in_order": False}  # fmt: skip
    assert settings.call(["shuffle=True"]) == (
        "DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2, prefetch_factor=2, "
        "persistent_workers=True, in_order=False, collate_fn=mbperf.collate)"
    )
    assert Settings(8).call(["batch_sampler=mine"], "Mine") == (
        "Mine(dataset, batch_sampler=mine, num_workers=8, prefetch_factor=None)"
    )
    assert Settings().with_workers(3).with_workers(0) == Settings()
