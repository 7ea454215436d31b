"""The lesson's datasets, samplers, collate and loaders: every batch, and torch's own loader as the judge."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate

from mbperf.lesson.loaders import Dataset, Sampler, SamplingDataLoader, SlicingDataLoader, collate, get_dls
from mbperf.testing import test_near


@pytest.fixture
def ds():
    return Dataset(torch.arange(20.0).view(10, 2), torch.arange(10) % 3)


def test_dataset_takes_numbers_slices_and_indices(ds):
    assert len(ds) == 10
    test_near(ds[3], (torch.tensor([6.0, 7.0]), torch.tensor(0)))
    test_near(ds[8:12], (torch.tensor([[16.0, 17.0], [18.0, 19.0]]), torch.tensor([2, 0])))
    test_near(ds[torch.tensor([9, 0])], (ds.x[[9, 0]], ds.y[[9, 0]]))


def test_dataset_slices_are_views(ds):
    assert ds[2:4][0].data_ptr() == ds.x[2].data_ptr()


def test_dataset_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="one length, got 3 and 2"):
        Dataset(torch.zeros(3), torch.zeros(2))


def test_sampler_in_order(ds):
    assert [o.tolist() for o in Sampler(ds, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_shuffled_sampler_gives_every_index_once_and_a_new_order_each_time(ds):
    sampler = Sampler(ds, 3, shuffle=True)
    torch.manual_seed(0)
    first, second = (torch.cat(list(sampler)).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    torch.manual_seed(0)
    assert torch.cat(list(sampler)).tolist() == first


def test_collate_is_torchs(ds):
    samples = [ds[i] for i in (4, 0, 7)]
    test_near(collate(samples), default_collate(samples))


def test_slicing_loader_covers_the_data_in_order(ds):
    batches = list(SlicingDataLoader(ds, 4))
    assert [len(yb) for _, yb in batches] == [4, 4, 2]
    test_near(torch.cat([xb for xb, _ in batches]), ds.x)
    test_near(torch.cat([yb for _, yb in batches]), ds.y)


def test_all_loaders_in_order_give_torchs_batches(ds):
    expected = list(DataLoader(ds, 4))
    test_near(list(SlicingDataLoader(ds, 4)), expected)
    test_near(list(SamplingDataLoader(ds, Sampler(ds, 4))), expected)
    test_near(list(SamplingDataLoader(ds, BatchSampler(SequentialSampler(ds), 4, drop_last=False))), expected)
    test_near(list(DataLoader(ds, batch_sampler=Sampler(ds, 4), collate_fn=collate)), expected)


def test_shuffled_loader_keeps_inputs_and_targets_together(ds):
    for xb, yb in SamplingDataLoader(ds, Sampler(ds, 4, shuffle=True)):
        test_near(yb, (xb[:, 0] / 2).long() % 3)


def test_loader_uses_the_given_collate(ds):
    assert list(SamplingDataLoader(ds, Sampler(ds, 4), collate_fn=len)) == [4, 4, 2]


def test_lengths_are_numbers_of_batches(ds):
    for bs, n_batches in [(1, 10), (3, 4), (5, 2), (10, 1), (11, 1)]:
        assert len(SlicingDataLoader(ds, bs)) == n_batches
        assert len(Sampler(ds, bs)) == n_batches
        assert len(SamplingDataLoader(ds, Sampler(ds, bs))) == n_batches


@pytest.mark.parametrize("kind", [SlicingDataLoader, Sampler])
def test_batch_size_must_be_positive(kind, ds):
    with pytest.raises(ValueError, match=f"{kind.__name__}: bs must be at least 1, got 0"):
        kind(ds, 0)


def test_get_dls_shuffles_only_training_and_doubles_validation(ds):
    torch.manual_seed(0)
    train_dl, valid_dl = get_dls(ds, ds, 4, collate_fn=collate)
    assert (train_dl.batch_size, valid_dl.batch_size) == (4, 8)
    assert train_dl.collate_fn is valid_dl.collate_fn is collate
    test_near(torch.cat([xb for xb, _ in valid_dl]), ds.x)
    shuffled = torch.cat([xb for xb, _ in train_dl])
    assert not torch.equal(shuffled, ds.x)
    test_near(shuffled.sort(0).values, ds.x)
