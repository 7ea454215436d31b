"""mbperf.TensorDataset through the stock DataLoader, with everything that may stand between them."""

import itertools

import pytest
import torch
from batches import assert_same
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import mbperf
from mbperf.ops.gathered import GatheredBatch

N = 103
X, Y = torch.randint(0, 256, (N, 3, 4, 5), dtype=torch.uint8), torch.arange(N)

WRAPPERS = {
    "itself": lambda dataset: dataset,
    "Subset": lambda dataset: Subset(dataset, list(range(0, N, 2))),
    "Subset of Subset": lambda dataset: Subset(Subset(dataset, torch.arange(50, 90)), [3, 1, 2]),
    "random_split": lambda dataset: random_split(dataset, [60, 43], torch.Generator().manual_seed(1))[0],
    "ConcatDataset": lambda dataset: ConcatDataset([dataset, dataset]),
}
LOADERS = {
    "in order": {"batch_size": 16},
    "shuffled": {"batch_size": 16, "shuffle": True, "drop_last": True},
    "two workers": {"batch_size": 16, "num_workers": 2},
    "spawned worker": {"batch_size": 64, "num_workers": 1, "multiprocessing_context": "spawn"},
}


def batches(dataset, collate_fn, **options):
    options = {"generator": torch.Generator().manual_seed(7), **options}
    return list(DataLoader(dataset, collate_fn=collate_fn, **options))


@pytest.mark.parametrize("function", [mbperf.collate, default_collate, None], ids=["mbperf", "torch", "none"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_batches_equal_those_of_torchs_dataset(wrapper, loader, function):
    if loader == "spawned worker" and wrapper not in ("itself", "Subset"):
        pytest.skip("spawning takes two seconds; two of the five suffice")
    expected = batches(WRAPPERS[wrapper](TensorDataset(X, Y)), default_collate, **LOADERS[loader])
    ours = batches(WRAPPERS[wrapper](mbperf.TensorDataset(X, Y)), function, **LOADERS[loader])
    assert_same(ours, expected)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: RandomSampler(Y, replacement=True, num_samples=40),
        lambda: WeightedRandomSampler(torch.rand(N), 40),
    ],
)
def test_samplers(sampler):
    torch.manual_seed(3)
    expected = batches(TensorDataset(X, Y), default_collate, sampler=sampler(), batch_size=8)
    torch.manual_seed(3)
    ours = batches(mbperf.TensorDataset(X, Y), mbperf.collate, sampler=sampler(), batch_size=8)
    for batch in itertools.chain(ours, expected):
        assert_same(batch[0], X[batch[1]])
    assert len(ours) == len(expected) == 5


def test_a_sampler_of_tensors_as_in_the_lesson():
    sampler = [torch.randperm(N)[:7] for _ in range(3)]
    for batch, index in zip(
        DataLoader(mbperf.TensorDataset(X, Y), batch_sampler=sampler, collate_fn=mbperf.collate),
        sampler,
        strict=True,
    ):
        assert_same(batch, [X[index], Y[index]])


def test_a_batch_is_passed_on_without_a_copy():
    batch = mbperf.TensorDataset(X, Y).__getitems__([4, 2])
    for function in (mbperf.collate, default_collate, mbperf.Collate(strict=True)):
        for ours, gathered in zip(function(batch), batch.tensors, strict=True):
            assert ours is gathered


def test_a_batch_is_a_list_of_samples_too():
    batch = mbperf.TensorDataset(X, Y).__getitems__([4, 2, 9])
    assert type(batch) is GatheredBatch
    assert len(batch) == 3
    assert_same(tuple(batch[-1]), (X[9], Y[9]))
    assert [int(y) for _, y in batch] == [4, 2, 9]
    assert [int(y) for _, y in batch[1:]] == [2, 9]
    doubled = [(x * 2, y) for x, y in batch]
    assert_same(mbperf.collate(doubled), default_collate(doubled))
    picked = [batch[i] for i in (2, 0)]
    assert_same(mbperf.collate(picked), [X[[9, 4]], Y[[9, 4]]])
    assert_same(default_collate(picked), [X[[9, 4]], Y[[9, 4]]])


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_and_batches_are_converted_alike(workers):
    settings = {"dtype": torch.float16, "mean": [1.0, 2.0, 3.0], "std": [100.0, 110.0, 120.0]}
    dataset = mbperf.TensorDataset(X, Y, **settings)
    batch = next(iter(DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=mbperf.collate)))
    assert_same(batch, [mbperf.gather(X, range(8), **settings), Y[:8]])
    assert_same(mbperf.collate([dataset[i] for i in range(8)]), batch)
    assert_same(list(dataset[:8]), batch)
    assert workers == 0 or batch[0].untyped_storage().data_ptr() == batch[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("workers", [0, 1])
def test_layouts(workers):
    images = torch.rand(N, 3, 4, 5)
    for source in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(0, 3).contiguous().transpose(0, 3),
        images.repeat(2, 1, 1, 1)[::2],
    ):
        dataset = mbperf.TensorDataset(source)
        index = torch.tensor([5, 0, 99])
        loader = DataLoader(dataset, batch_sampler=[index], num_workers=workers, collate_fn=mbperf.collate)
        assert torch.equal(next(iter(loader))[0], source[index])


def test_indices_out_of_range():
    dataset = mbperf.TensorDataset(X, Y)
    for index in ([0, N], [-1]):
        with pytest.raises(IndexError, match=r"index\[\d\] is"):
            dataset.__getitems__(index)
    with pytest.raises(IndexError):
        mbperf.collate(dataset.__getitems__([]))[0][0]


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"TensorDataset: .*\[\(103, 3, 4, 5\), \(102,\)\]"):
        mbperf.TensorDataset(X, Y[:-1])
    with pytest.raises(ValueError, match="TensorDataset"):
        mbperf.TensorDataset()


def test_batch_sampler_object():
    sampler = BatchSampler(range(N), 10, drop_last=False)
    ours = list(DataLoader(mbperf.TensorDataset(X, Y), batch_sampler=sampler, collate_fn=mbperf.collate))
    assert torch.equal(torch.cat([y for _, y in ours]), Y)
