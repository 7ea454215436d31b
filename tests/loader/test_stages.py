"""Hooks are transparent and their journals add up."""

import os
import pickle
import tempfile

import pytest
import subjects
import torch
from retrying import retried
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from mbperf.loader.settings import Settings
from mbperf.loader.subject import Subject, fixed_words, resolve
from mbperf.loader.trial.memory import footprint
from mbperf.loader.trial.stages import Record, Stages, read_journals, summarise_stages, timed_hooks

pytestmark = pytest.mark.timed


def batches(subject, settings, folder):
    loader = subject.make(settings, timed_hooks(str(folder)))
    return [batch for batch, _ in zip(loader, range(12), strict=False)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "dataset", [subjects.Sleeps(64, 0.001), subjects.Sharded(64), TensorDataset(torch.arange(64))]
)
def test_hooks_change_no_batch(dataset, workers, tmp_path):
    settings = Settings(batch_size=8).with_workers(workers)
    subject = Subject(dataset, shuffle=False)
    hooked = batches(subject, settings, tmp_path)
    plain = list(subject.make(settings))
    assert len(hooked) == len(plain) == 8
    for a, b in zip(hooked, plain, strict=True):
        assert str(a) == str(b)
    journals = read_journals(str(tmp_path))
    assert set(journals) == ({"main"} if not workers else {"worker-0", "worker-1"})
    assert sum(record.count for stages in journals.values() for record in stages.fetches) == 64
    assert sum(len(stages.collates) for stages in journals.values()) == 8


@retried
def test_slow_indices_are_found_by_their_index(tmp_path):
    folder = tempfile.mkdtemp(dir=tmp_path)
    subject = Subject(subjects.OneInAHundredSlow(400, 0.002))
    loader = subject.make(Settings(batch_size=8).with_workers(2), timed_hooks(folder))
    for _ in loader:
        pass
    summary = summarise_stages(read_journals(folder), 2, 0.0, [(0.0, 1.0)])
    assert {index for index, _ in summary["slowest"][:4]} == {7, 107, 207, 307}


def test_attributes_go_to_the_users_dataset(tmp_path):
    dataset = subjects.Sleeps(10)
    wrapped = timed_hooks(str(tmp_path)).wrap_dataset(dataset)
    wrapped.seconds = 0.5
    assert dataset.seconds == 0.5
    assert wrapped.samples == len(wrapped) == 10
    with pytest.raises(AttributeError):
        wrapped.absent  # noqa: B018
    again = pickle.loads(pickle.dumps(wrapped))
    assert again.samples == 10


def test_a_half_written_record_is_ignored(tmp_path):
    (tmp_path / "worker-0.journal").write_bytes(b"\0" * 40)
    assert len(read_journals(str(tmp_path))["worker-0"].starts) == 1


def test_the_summary_of_known_journals():
    """Two workers, each ready at 1 s; batches of 4 samples take 0.4 s to fetch and 0.1 s to collate."""

    def worker(begin, count):
        fetches = [Record(begin + k * 0.5, begin + k * 0.5 + 0.4, 4) for k in range(count)]
        collates = [Record(fetch.end, fetch.end + 0.1, 4) for fetch in fetches]
        return Stages([Record(1.0, 1.0, 0)], fetches, collates, [Record(0.0, 0.3, 17)])

    journals = {"worker-0": worker(1.0, 2), "worker-1": worker(1.0, 1)}
    arrivals = [(0.0, 1.52), (1.52, 1.53), (1.53, 2.02)]
    summary = summarise_stages(journals, 2, 0.5, arrivals)
    assert summary["getitem_s"] == pytest.approx(0.1)
    assert summary["collate_s"] == pytest.approx(0.1)
    assert summary["transfer_s"] == pytest.approx(0.02)
    assert summary["busy_share"] == {
        "worker-0": pytest.approx(1.0 / 1.02),
        "worker-1": pytest.approx(0.5 / 1.02),
    }
    assert summary["imbalance"] == pytest.approx(1.0 / 0.75 - 1)
    assert summary["slowest"] == [(17, pytest.approx(0.3))]
    assert summary["first_batch"] == {
        "total_s": pytest.approx(1.02),
        "start_worker_s": pytest.approx(0.5),
        "start_all_workers_s": pytest.approx(0.5),
        "fetch_and_collate_s": pytest.approx(0.5),
        "hand_over_s": pytest.approx(0.02),
    }


def test_footprint_counts_shared_pages_once():
    big = torch.ones(20_000_000)  # 80 MB
    alone, descriptors = footprint(), len(os.listdir("/proc/self/fd"))
    loader = iter(DataLoader(subjects.Base(), batch_size=4, num_workers=2))
    next(loader)
    together = footprint()
    del loader
    assert together.pss_bytes - alone.pss_bytes < 60e6  # RSS would count the 80 MB twice more
    assert len(together.workers_pss_bytes) == len(alone.workers_pss_bytes) + 2  # and what earlier tests left
    assert together.descriptors > alone.descriptors
    assert alone.descriptors == descriptors
    assert big.numel() == 20_000_000


def test_any_subclass_of_dataloader_is_rebuilt():
    loader = subjects.ready_loader()
    subject = resolve(loader)
    assert subject.own_settings() == Settings(1, 16, 2, collate="user")
    again = subject.make(Settings(batch_size=8, collate="user").with_workers(2))
    assert type(again) is subjects.MyLoader
    assert (again.tag, again.batch_size, again.num_workers, again.collate_fn) == (
        "kept",
        8,
        2,
        subjects.summing_collate,
    )
    assert loader.num_workers == 1


def test_the_call_carries_what_the_users_loader_had():
    data = subjects.Base(40)
    cases = {
        "": DataLoader(data),
        "shuffle=True drop_last=True": DataLoader(data, shuffle=True, drop_last=True),
        "sampler=your_sampler": DataLoader(data, sampler=[3, 1, 2]),
        "sampler=your_sampler timeout=5": DataLoader(
            data, sampler=RandomSampler(data, num_samples=9), timeout=5, num_workers=1
        ),
        "batch_sampler=your_batch_sampler": DataLoader(data, batch_sampler=[[0, 1], [5]]),
        "tag='kept'": subjects.ready_loader(),
        "shuffle=True generator=your_generator worker_init_fn=your_worker_init_fn": DataLoader(
            data, shuffle=True, generator=torch.Generator(), worker_init_fn=print
        ),
        "shuffle=True": data,
    }
    assert {words: " ".join(fixed_words(resolve(made))) for words, made in cases.items()} == {
        words: words for words in cases
    }
    assert fixed_words(resolve(subjects.Counting())) == []


class Stubborn(DataLoader):
    """Needs an argument that it keeps nowhere."""

    def __init__(self, dataset, secret):
        super().__init__(dataset)


def test_a_subclass_that_cannot_be_rebuilt_is_an_error_in_words():
    with pytest.raises(TypeError, match="Stubborn cannot be rebuilt: its argument 'secret'"):
        resolve(Stubborn(subjects.Base(), 1)).make(Settings())


def test_samplers_and_batch_samplers_of_the_user_are_kept():
    own = DataLoader(subjects.Base(40), batch_sampler=[[0, 1, 2], [5, 6]])
    subject = resolve(own)
    assert subject.fixed_batches
    assert [batch[1].tolist() for batch in subject.make(subject.own_settings())] == [[0, 1, 2], [5, 6]]
    sampled = resolve(DataLoader(subjects.Base(40), batch_size=2, sampler=[3, 1, 2]))
    assert [b[1].tolist() for b in sampled.make(Settings(batch_size=2).with_workers(1))] == [[3, 1], [2]]
    unbatched = resolve(DataLoader(subjects.Base(3), batch_size=None))
    assert [b[1] for b in unbatched.make(unbatched.own_settings())] == [0, 1, 2]


class Gathering(TensorDataset):
    """Stands for mbperf.TensorDataset: one gathered batch, which its collate passes through."""

    def __getitems__(self, indices):
        return [tensor[indices] for tensor in self.tensors]


def test_plain_tensors_are_also_read_through_mbperfs_dataset(monkeypatch):
    names = {"TensorDataset": Gathering, "collate": lambda batch: batch}
    monkeypatch.setattr("mbperf.loader.subject.mbperf_name", names.__getitem__)
    subject = resolve((torch.arange(6), torch.arange(6) * 2))
    settings = Settings(batch_size=3, dataset="mbperf.TensorDataset", collate="mbperf")
    batches = list(Subject(subject.dataset, shuffle=False).make(settings))
    assert [[part.tolist() for part in batch] for batch in batches] == [
        [[0, 1, 2], [0, 2, 4]],
        [[3, 4, 5], [6, 8, 10]],
    ]
    assert resolve(Gathering(torch.ones(3))).tensors() is None  # a subclass may do anything in __getitem__


def test_what_can_be_profiled():
    assert isinstance(resolve((torch.ones(3), torch.ones(3))).dataset, TensorDataset)
    assert isinstance(resolve(torch.ones(3)).dataset, TensorDataset)
    assert resolve([{"a": 1}]).length() == 1
    assert resolve(subjects.tensors).length() == 4000
    assert resolve(subjects.Counting()).length() is None
    with pytest.raises(TypeError, match=r"profile: dataset must be .* got int"):
        resolve(3)
