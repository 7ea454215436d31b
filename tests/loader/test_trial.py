"""Timing one loader: rates of known cost, the warm-up left out, pacing, states left as found."""

import random
import time

import numpy
import pytest
import subjects
import torch
from retrying import retried
from torch.utils.data import DataLoader

from mbperf.loader.trial.time_loader import count_samples, default_warmup, time_loader
from mbperf.loader.trial.timing import BLOCKS, block_rates

pytestmark = pytest.mark.timed


class Costly(subjects.Base):
    """The first `slow` accesses take long, the others `seconds`."""

    def __init__(self, samples, seconds, slow=0):
        super().__init__(samples)
        self.seconds, self.slow, self.seen = seconds, slow, 0

    def access(self, index):
        self.seen += 1
        time.sleep(0.02 if self.seen <= self.slow else self.seconds)


@retried
def test_the_rate_of_a_known_cost():
    timing = time_loader(DataLoader(Costly(1000, 0.002), batch_size=10), 0.4)
    assert 1 / 0.0026 < timing.rate_samples_per_s < 1 / 0.002
    assert timing.rate_batches_per_s == pytest.approx(timing.rate_samples_per_s / 10)
    assert timing.first_batch_s > 0.02


@retried
def test_the_warm_up_is_left_out():
    loader = DataLoader(Costly(1000, 0.001, slow=20), batch_size=10)
    timing = time_loader(loader, 0.2, warmup_batches=2)
    assert timing.warmup_batches == 2
    assert timing.rate_samples_per_s > 1 / 0.002  # with the slow accesses it would be under 1 / 0.0025
    assert timing.first_batch_s > 0.2


def test_the_default_warm_up_is_prefetch_times_workers():
    assert default_warmup(DataLoader(subjects.Base(), num_workers=3, prefetch_factor=4)) == 12
    assert default_warmup(DataLoader(subjects.Base())) == 1


@retried
def test_a_paced_consumer_waits_as_long_as_loading_takes():
    timing = time_loader(DataLoader(Costly(1000, 0.002), batch_size=5), 0.5, step_time_s=0.010)
    assert timing.idle_fraction == pytest.approx(0.5, abs=0.08)
    assert 0.0099 < timing.step_s / timing.batches < 0.013  # never early; late where the machine is busy


def test_the_consumers_own_step_is_called_with_every_batch():
    seen = []
    time_loader(DataLoader(subjects.Base(40), batch_size=10), 10, step=seen.append, max_batches=4)
    assert [batch[1][0].item() for batch in seen] == [0, 10, 20, 30]


@retried
def test_workers_overlap_the_step():
    """20 ms of loading beside 20 ms of stepping: one after the other they would idle half of the time."""
    loader = DataLoader(Costly(400, 0.004), batch_size=5, num_workers=2)
    assert time_loader(loader, 0.4, step_time_s=0.020).idle_fraction < 0.25


def test_random_states_are_left_as_found():
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    time_loader(DataLoader(subjects.GlobalGenerator(50), batch_size=5, shuffle=True), 0.05)
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_an_exception_of_the_dataset_comes_through():
    with pytest.raises(ValueError, match="broken sample"):
        time_loader(DataLoader(subjects.Raises(), batch_size=10), 1.0)


def test_an_empty_loader_is_an_error_in_words():
    with pytest.raises(ValueError, match="time_loader: loader yields no batch"):
        time_loader(DataLoader(subjects.Base(3), batch_size=10, drop_last=True), 1.0)


def test_a_short_epoch_is_repeated_and_timed_whole():
    timing = time_loader(DataLoader(Costly(7, 0.002), batch_size=10), 0.2)
    assert timing.whole_epochs
    assert len(timing.epoch_s) > 3
    assert timing.epoch_samples == 7
    assert timing.rate_samples_per_s < 1 / 0.002


def test_short_epochs_are_not_flattered_by_their_end():
    """8 batches, 6 of them warm-up: the last two arrive together, faster than two workers can be."""
    timing = time_loader(DataLoader(Costly(64, 0.002), batch_size=8, num_workers=2, prefetch_factor=3), 0.4)
    assert timing.whole_epochs
    assert timing.batches % 8 == 0
    assert timing.rate_samples_per_s < 2 / 0.002


@retried
def test_a_later_epochs_first_batch_is_timed():
    loader = DataLoader(Costly(1000, 0.001, slow=10), batch_size=10)
    timing = time_loader(loader, 0.1, later_epoch=True)
    assert timing.first_batch_s > 0.2 > 0.05 > timing.later_first_batch_s


def test_workers_run_one_torch_thread():
    loader = DataLoader(ThreadCount(8), batch_size=4, num_workers=2)
    assert {count for batch in loader for count in batch.tolist()} == {1}


class ThreadCount(subjects.Base):
    def __getitem__(self, index):
        return torch.get_num_threads()


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(5, 3), 5),
        ([torch.zeros(5), torch.zeros(5)], 5),
        ({"a": {"b": torch.zeros(4, 2)}}, 4),
        (["x", "y", "z"], 3),
        (torch.zeros(700), 16),  # packed tokens: more than a batch holds
        (object(), 1),
        ({}, 0),
    ],
)
def test_counting_samples(batch, count):
    assert count_samples(batch, 16) == count


def test_blocks_hold_whole_turns():
    rates = block_rates([0.0, 0.2] * 24, [8] * 48, turn=2)
    assert len(rates) == BLOCKS
    assert rates == pytest.approx([80.0] * BLOCKS)
