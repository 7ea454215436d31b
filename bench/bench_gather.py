"""Gather: a shuffled batch straight from tensors, against fetching sample by sample and index_select."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import mbperf
from mbperf.lesson import loaders
from mbperf.measure.group import Group
from mbperf.measure.traffic import copy_traffic

ROWS, PIXELS, STD = 50_000, 784, 255.0


def floats_and_labels(batch_size: int) -> tuple[Any, ...]:
    """The lesson's training set, as float32, and the indices of one shuffled batch."""
    x, y = torch.rand(ROWS, PIXELS), torch.randint(0, 10, (ROWS,))
    return mbperf.TensorDataset(x, y), torch.randperm(ROWS)[:batch_size].tolist()


def bytes_and_labels(batch_size: int) -> tuple[Any, ...]:
    """The same stored as bytes, four times smaller, scaled to [0, 1] on the way."""
    x, y = torch.randint(0, 256, (ROWS, PIXELS), dtype=torch.uint8), torch.randint(0, 10, (ROWS,))
    return mbperf.TensorDataset(x, y, std=STD), torch.randperm(ROWS)[:batch_size].tolist()


def fused(dataset: mbperf.TensorDataset, index: list[int]) -> Any:
    return mbperf.collate(dataset.__getitems__(index))


def sample_by_sample(dataset: mbperf.TensorDataset, index: list[int]) -> Any:
    """What a DataLoader does with torch's TensorDataset and the lesson's collate."""
    one_by_one = TensorDataset(*dataset.tensors)
    return loaders.collate([one_by_one[i] for i in index])


def selected(dataset: mbperf.TensorDataset, index: list[int]) -> Any:
    rows = torch.tensor(index)
    return [tensor.index_select(0, rows) for tensor in dataset.tensors]


def selected_and_converted(dataset: mbperf.TensorDataset, index: list[int]) -> Any:
    x, y = selected(dataset, index)
    return [x.to(torch.float32).mul_(1 / STD), y]


def expected(dataset: mbperf.TensorDataset, index: list[int]) -> Any:
    x, y = ([tensor[i] for i in index] for tensor in dataset.tensors)
    pixels = torch.stack(x)
    return [pixels if pixels.is_floating_point() else pixels.double() / STD, torch.stack(y)]


# Below what one run of two cores showed (naive 29 to 41, torch 1.9 to 4.6), so that only a loss misses them.
FLOORS = {"float32": {"naive": 20, "torch": 1.2}, "uint8": {"torch": 2}}


def group(stored: str, batch_size: int) -> Group:
    if stored == "float32":
        make, bases = floats_and_labels, {"naive": sample_by_sample, "torch": selected}
    else:
        make, bases = bytes_and_labels, {"torch": selected_and_converted}
    read = PIXELS * (4 if stored == "float32" else 1) + 8
    return Group(
        op="gather",
        case=f"{batch_size} of {ROWS}x{PIXELS} {stored}",
        make_inputs=partial(make, batch_size),
        contenders={"fused": fused, **bases},
        expected=expected,
        traffic=copy_traffic(batch_size * read) if stored == "float32" else None,
        floors=FLOORS[stored],
        facts={"N": batch_size, "stored": stored},
    )


GROUPS = [group(stored, n) for stored in ("float32", "uint8") for n in (64, 256, 1_024)]


@pytest.mark.race(GROUPS)
def test_gather(race):
    race()
