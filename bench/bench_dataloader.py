"""End to end: one epoch through a real DataLoader with 0 and 2 workers, our collate against torch's."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import mbperf
from mbperf.measure.group import Group

ROWS, PIXELS, BATCH_SIZE = 4_096, 784, 64


def tensors() -> tuple[Any, ...]:
    """A twelfth of the lesson's training set, shared: the check changes it under workers that are running."""
    return torch.rand(ROWS, PIXELS).share_memory_(), torch.randint(0, 10, (ROWS,)).share_memory_()


def make_loaders(workers: int) -> tuple[Any, ...]:
    """Loaders with their workers started, so that an epoch times batches alone."""
    x, y = tensors()
    options: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "num_workers": workers,
        "persistent_workers": workers > 0,
    }
    loaders = {
        "gathered": DataLoader(mbperf.TensorDataset(x, y), collate_fn=mbperf.collate, **options),
        "fused": DataLoader(TensorDataset(x, y), collate_fn=mbperf.collate, **options),
        "torch": DataLoader(TensorDataset(x, y), collate_fn=default_collate, **options),
    }
    return loaders, x, y


def epoch(name: str, loaders: dict[str, DataLoader], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Sums of what was loaded: every byte of every batch has to have arrived."""
    pixels, labels = [], []
    for xb, yb in loaders[name]:
        pixels.append(xb[:, 0])
        labels.append(yb)
    return [torch.cat(pixels), torch.cat(labels)]


def slicing(loaders: dict[str, DataLoader], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The lesson's DataLoader: views, in order."""
    starts = range(0, ROWS, BATCH_SIZE)
    batches = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE]) for i in starts]
    return [torch.cat([xb[:, 0] for xb, _ in batches]), torch.cat([yb for _, yb in batches])]


def expected(loaders: dict[str, DataLoader], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [x[:, 0], y]


# Against torch's dataset and collate: with workers most of the time goes into sending, which stays the same.
FLOORS = {0: 3, 2: 1}


def group(workers: int) -> Group:
    names = ("gathered", "fused", "torch")
    return Group(
        op="dataloader",
        case=f"epoch of {ROWS}x{PIXELS} by {BATCH_SIZE}, {workers} workers",
        make_inputs=partial(make_loaders, workers),
        contenders={**{name: partial(epoch, name) for name in names}, "slicing": slicing},
        expected=expected,
        floors={"torch": FLOORS[workers]},
        facts={"N": ROWS, "workers": workers, "bs": BATCH_SIZE},
        min_rounds=3,
        also_fresh=False,
        input_sets=2,
        weight=4,
    )


@pytest.mark.race([group(workers) for workers in (0, 2)])
def test_dataloader(race):
    race()
