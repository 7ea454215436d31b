"""Where batches come from: the epoch with F.cross_entropy, on slices and on batches of loaders.

"naive" is the lesson's loader of slices; in order and shuffled go through torch's DataLoader. "machinery" is
that DataLoader alone, handing out views: what it loses to slices no dataset can win back. "bare_copy" copies
as many rows as well, as a shuffled batch must; here they lie in order, so it is the least there can be.
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


def as_they_are(batch: list[Tensor]) -> list[Tensor]:
    return batch


def make_inputs() -> tuple[Any, ...]:
    loaders, x, y, stored_x, stored_y, *weights = training.make_inputs()
    in_order = mbperf.TensorDataset(x, y)
    return (
        {
            "naive": loaders["loader"],
            "shuffled": loaders["fused"],
            "in_order": DataLoader(in_order, training.BS, collate_fn=mbperf.collate),
            "machinery": DataLoader(Views(x, y), training.BS, collate_fn=as_they_are),
            "bare_copy": loaders["least"],
        },
        x,
        y,
        stored_x,
        stored_y,
        *weights,
    )


# In order the epoch is to stay within 5 % of slicing; shuffled rows have to be fetched one by one.
FLOORS = {"in_order": {"naive": 0.95}, "shuffled": {"naive": 0.85}}


def group(subject: str) -> Group:
    names = [subject, "naive", "machinery", *(["bare_copy"] if subject == "shuffled" else [])]
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
