"""Where batches come from: the epoch with F.cross_entropy, on slices and on batches of loaders.

In order and shuffled go through torch's DataLoader. "machinery" is that DataLoader alone: it hands out views,
as slicing does, so what it loses to slicing no dataset can win back.
"""

from collections.abc import Iterator
from typing import Any

import bench_training as training
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mbperf
from mbperf.measure.group import Group


class Views(Dataset[Any]):
    """Batches in order, as views."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [tensor[indices[0] : indices[-1] + 1] for tensor in self.tensors]


class BareCopies(Views):
    """The least a shuffled batch costs: its rows copied into a buffer that is there, and nothing else."""

    def __init__(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        super().__init__(x, y)
        self.indices = {int(index[0]): index for index in order.split(training.BS)}
        self.batch = [tensor[: training.BS].clone() for tensor in self.tensors]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        index = self.indices[indices[0]]
        for tensor, out in zip(self.tensors, self.batch, strict=True):
            torch.ops.mbperf.gather_rows.out(tensor, index, None, None, 1, out=out)
        return self.batch


def as_they_are(batch: list[Tensor]) -> list[Tensor]:
    return batch


def make_inputs() -> tuple[Any, ...]:
    loaders, x, y, stored_x, stored_y, *weights = training.make_inputs()
    order = list(loaders["fused"].sampler)
    bare = BareCopies(stored_x, stored_y, torch.tensor(order))
    in_order = mbperf.TensorDataset(x, y)
    return (
        {
            "slicing": loaders["loader"],
            "shuffled": loaders["fused"],
            "in_order": DataLoader(in_order, training.BS, collate_fn=mbperf.collate),
            "machinery": DataLoader(Views(x, y), training.BS, collate_fn=as_they_are),
            "bare_copies": DataLoader(bare, training.BS, sampler=order, collate_fn=as_they_are),
        },
        x,
        y,
        stored_x,
        stored_y,
        *weights,
    )


# In order the epoch is to stay within 5 % of slicing; shuffled rows have to be fetched one by one.
FLOORS = {"in_order": {"slicing": 0.95}, "shuffled": {"slicing": 0.85}}


def group(subject: str) -> Group:
    names = [subject, "slicing", "machinery", *(["bare_copies"] if subject == "shuffled" else [])]
    return Group(
        op="epoch",
        case=f"{training.ROWS}x784 by {training.BS}, {subject.replace('_', ' ')}",
        make_inputs=make_inputs,
        contenders={name: training.Rung(name, name) for name in names},
        expected=training.expected,
        floors=FLOORS[subject],
        facts={"N": training.ROWS, "bs": training.BS, "threads": 1},
        min_rounds=12,
        input_sets=2,
        weight=2,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of 50 units gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.race(list(map(group, FLOORS)))
def test_epoch(race):
    race()
