"""Gather: a shuffled batch straight from tensors, against fetching sample by sample and index_select.

Rows without a name of their own are hot: one batch of the lesson's validation set again and again, which
stays in cache. Rows named cold read other rows of its training set with every call, as an epoch does, and
find none of them in a cache.
"""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import mbperf
from mbperf.lesson import loaders
from mbperf.measure.group import SEED, Group
from mbperf.measure.traffic import Traffic

HOT_ROWS, COLD_ROWS, PIXELS, STD = 10_000, 50_000, 784, 255.0


def floats_and_labels(rows: int) -> mbperf.TensorDataset:
    """The lesson's digits, as float32."""
    return mbperf.TensorDataset(torch.rand(rows, PIXELS), torch.randint(0, 10, (rows,)))


def bytes_and_labels(rows: int) -> mbperf.TensorDataset:
    """The same stored as bytes, four times smaller, scaled to [0, 1] on the way."""
    x = torch.randint(0, 256, (rows, PIXELS), dtype=torch.uint8)
    return mbperf.TensorDataset(x, torch.randint(0, 10, (rows,)), std=STD)


DATASETS = {"float32": floats_and_labels, "uint8": bytes_and_labels}
ITEMSIZE = {"float32": 4, "uint8": 1}


@cache
def cold_dataset(stored: str) -> mbperf.TensorDataset:
    """The dataset that all batches of a cold row come from."""
    return DATASETS[stored](COLD_ROWS)


@cache
def epoch() -> Tensor:
    """The order in which an epoch reads the rows."""
    return torch.randperm(COLD_ROWS, generator=torch.Generator().manual_seed(SEED))


def cold_batch(stored: str, batch_size: int) -> tuple[Any, ...]:
    """The indices of one batch of an epoch, and the one dataset: no two inputs of a group share a row."""
    number = torch.initial_seed() - SEED
    return epoch()[number * batch_size :][:batch_size].tolist(), cold_dataset(stored)


def rows_read(index: list[int], dataset: mbperf.TensorDataset) -> list[Tensor]:
    return [tensor[i] for tensor in dataset.tensors for i in index]


def hot_batch(stored: str, batch_size: int) -> tuple[Any, ...]:
    """The indices of one shuffled batch, a dataset, and what it holds, so that the judge can look into it."""
    dataset = DATASETS[stored](HOT_ROWS)
    return torch.randperm(HOT_ROWS)[:batch_size].tolist(), dataset, *dataset.tensors


def fused(index: list[int], dataset: mbperf.TensorDataset, *held: Tensor) -> Any:
    return mbperf.collate(dataset.__getitems__(index))


def sample_by_sample(index: list[int], dataset: mbperf.TensorDataset, *held: Tensor) -> Any:
    """The way of a DataLoader with torch's TensorDataset and the lesson's collate."""
    one_by_one = TensorDataset(*dataset.tensors)
    return loaders.collate([one_by_one[i] for i in index])


def selected(index: list[int], dataset: mbperf.TensorDataset, *held: Tensor) -> Any:
    rows = torch.tensor(index)
    return [tensor.index_select(0, rows) for tensor in dataset.tensors]


def selected_and_converted(index: list[int], dataset: mbperf.TensorDataset, *held: Tensor) -> Any:
    x, y = selected(index, dataset)
    return [x.to(torch.float32).mul_(1 / STD), y]


def expected(index: list[int], dataset: mbperf.TensorDataset, *held: Tensor) -> Any:
    x, y = ([tensor[i] for i in index] for tensor in held or dataset.tensors)
    pixels = torch.stack(x)
    return [pixels if pixels.is_floating_point() else pixels.double() / STD, torch.stack(y)]


# Below what one run of two cores showed, so that only a loss misses them.
FLOORS = {
    ("float32", False): {"naive": 20, "torch": 1.2},
    ("uint8", False): {"torch": 2},
    ("float32", True): {"torch": 1},
    ("uint8", True): {"torch": 1.5},
}


def group(stored: str, batch_size: int, cold: bool = False) -> Group:
    bases = {"torch": selected if stored == "float32" else selected_and_converted}
    if stored == "float32" and not cold:
        bases = {"naive": sample_by_sample, **bases}
    rows, label = COLD_ROWS if cold else HOT_ROWS, 8
    traffic = Traffic(
        batch_size * (PIXELS * ITEMSIZE[stored] + label), batch_size * (PIXELS * ITEMSIZE["float32"] + label)
    )
    return Group(
        op="gather",
        case=f"{batch_size} of {rows}x{PIXELS} {stored}{' cold' * cold}",
        make_inputs=partial(cold_batch if cold else hot_batch, stored, batch_size),
        contenders={"fused": fused, **bases},
        expected=expected,
        traffic=traffic if stored == "float32" or cold else None,
        floors=FLOORS[stored, cold],
        facts={"N": batch_size, "stored": stored},
        cold=cold,
        reads=rows_read if cold else None,
    )


GROUPS = [group(stored, n) for stored in DATASETS for n in (64, 256, 1_024)]
GROUPS += [group(stored, n, cold=True) for stored in DATASETS for n in (64, 1_024)]


@pytest.mark.race(GROUPS)
def test_gather(race):
    race()
