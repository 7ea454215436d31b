"""mbperf.TensorDataset through the stock DataLoader, with everything that may stand between them."""

import itertools

import pytest
import torch
from batches import assert_same, there
from devices import here
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

pytestmark = pytest.mark.usefixtures("device")

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


def columns():
    """X and Y on the device of the test."""
    return there(X), there(Y)


def batches(dataset, collate_fn, **options):
    if options.get("num_workers") and here() == "cuda":
        pytest.skip("a worker is another process, and forked ones cannot use the GPU")
    options = {"generator": torch.Generator().manual_seed(7), **options}
    return list(DataLoader(dataset, collate_fn=collate_fn, **options))


@pytest.mark.parametrize("function", [mbperf.collate, default_collate, None], ids=["mbperf", "torch", "none"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_batches_equal_those_of_torchs_dataset(wrapper, loader, function):
    if loader == "spawned worker" and wrapper not in ("itself", "Subset"):
        pytest.skip("spawning takes two seconds; two of the five suffice")
    x, y = columns()
    expected = batches(WRAPPERS[wrapper](TensorDataset(x, y)), default_collate, **LOADERS[loader])
    ours = batches(WRAPPERS[wrapper](mbperf.TensorDataset(x, y)), function, **LOADERS[loader])
    assert_same(ours, expected)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: RandomSampler(Y, replacement=True, num_samples=40),
        lambda: WeightedRandomSampler(torch.rand(N), 40),
    ],
)
def test_samplers(sampler):
    x, y = columns()
    torch.manual_seed(3)
    expected = batches(TensorDataset(x, y), default_collate, sampler=sampler(), batch_size=8)
    torch.manual_seed(3)
    ours = batches(mbperf.TensorDataset(x, y), mbperf.collate, sampler=sampler(), batch_size=8)
    for batch in itertools.chain(ours, expected):
        assert_same(batch[0], x[batch[1]])
    assert len(ours) == len(expected) == 5


def test_a_sampler_of_tensors_as_in_the_lesson():
    sampler, (x, y) = [torch.randperm(N)[:7] for _ in range(3)], columns()
    for batch, index in zip(
        DataLoader(mbperf.TensorDataset(x, y), batch_sampler=sampler, collate_fn=mbperf.collate),
        sampler,
        strict=True,
    ):
        assert_same(batch, [x[index], y[index]])


def test_a_batch_is_passed_on_without_a_copy():
    batch = mbperf.TensorDataset(*columns()).__getitems__([4, 2])
    for function in (mbperf.collate, default_collate, mbperf.Collate(strict=True)):
        for ours, gathered in zip(function(batch), batch.tensors, strict=True):
            assert ours is gathered


@pytest.mark.parametrize("index", [[4, 2], [2, 3, 4], list(range(N))])
def test_a_batch_changed_in_place_leaves_the_dataset(index):
    x, y = columns()
    kept = x.clone(), y.clone()
    for tensor in mbperf.collate(mbperf.TensorDataset(x, y).__getitems__(index)):
        tensor.zero_()
    assert_same((x, y), kept)


def test_a_batch_is_a_list_of_samples_too():
    x, y = columns()
    batch = mbperf.TensorDataset(x, y).__getitems__([4, 2, 9])
    assert type(batch) is GatheredBatch
    assert len(batch) == 3
    assert_same(tuple(batch[-1]), (x[9], y[9]))
    assert [int(y) for _, y in batch] == [4, 2, 9]
    assert [int(y) for _, y in batch[1:]] == [2, 9]
    doubled = [(one * 2, label) for one, label in batch]
    assert_same(mbperf.collate(doubled), default_collate(doubled))
    picked = [batch[i] for i in (2, 0)]
    assert_same(mbperf.collate(picked), [x[[9, 4]], y[[9, 4]]])
    assert_same(default_collate(picked), [x[[9, 4]], y[[9, 4]]])


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_and_batches_are_converted_alike(workers):
    settings = {"dtype": torch.float16, "mean": [1.0, 2.0, 3.0], "std": [100.0, 110.0, 120.0]}
    x, y = columns()
    dataset = mbperf.TensorDataset(x, y, **settings)
    batch = batches(dataset, mbperf.collate, batch_size=8, num_workers=workers)[0]
    assert_same(batch, [mbperf.gather(x, range(8), **settings), y[:8]])
    assert_same(mbperf.collate([dataset[i] for i in range(8)]), batch)
    assert_same(list(dataset[:8]), batch)
    assert workers == 0 or batch[0].untyped_storage().data_ptr() == batch[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("workers", [0, 1])
def test_layouts(workers):
    images = there(torch.rand(N, 3, 4, 5))
    for source in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(0, 3).contiguous().transpose(0, 3),
        images.repeat(2, 1, 1, 1)[::2],
    ):
        dataset = mbperf.TensorDataset(source)
        index = torch.tensor([5, 0, 99])
        got = batches(dataset, mbperf.collate, batch_sampler=[index], num_workers=workers)
        assert torch.equal(got[0][0], source[index])


def test_indices_out_of_range():
    dataset = mbperf.TensorDataset(*columns())
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
    x, y = columns()
    ours = batches(mbperf.TensorDataset(x, y), mbperf.collate, batch_sampler=sampler)
    assert torch.equal(torch.cat([labels for _, labels in ours]), y)
