"""Where batches come from: the epoch with F.cross_entropy, on slices and on batches of loaders.

"naive" is the lesson's loader of slices; in order and shuffled go through torch's DataLoader. "machinery" is
that DataLoader alone, handing out views: what it loses to slices no dataset can win back. "bare_copy" copies
as many rows as well, as a shuffled batch must; here they lie in order, so it is the least there can be.
"""

from typing import Any

import bench_training as training
import pytest
from torch import Tensor
from torch.utils.data import DataLoader

import mbperf
from mbperf import lesson
from mbperf.measure.group import Group


class Views(lesson.Dataset):
    """Batches in order, as views."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self[indices[0] : indices[-1] + 1]


def make_inputs() -> tuple[Any, ...]:
    loaders, x, y, *rest = training.make_inputs()
    chosen = {
        "naive": loaders["loader"],
        "shuffled": loaders["fused"],
        "in_order": DataLoader(mbperf.TensorDataset(x, y), training.BS, collate_fn=mbperf.collate),
        "machinery": DataLoader(Views(x, y), training.BS, collate_fn=tuple),
        "bare_copy": loaders["least"],
    }
    return chosen, x, y, *rest


# In order the epoch is to stay within 5 % of slicing; shuffled rows have to be fetched one by one.
FLOORS = {"in_order": {"naive": 0.95}, "shuffled": {"naive": 0.85}}


def group(subject: str) -> Group:
    names = [subject, "naive", "machinery", *(["bare_copy"] if subject == "shuffled" else [])]
    return Group(
        op="epoch",
        case=f"{training.ROWS}x784 by {training.BS}, {subject.replace('_', ' ')}",
        make_inputs=make_inputs,
        contenders={name: training.TrainingLoop(name, name) for name in names},
        expected=training.expected,
        floors=FLOORS[subject],
        facts={"N": training.ROWS, "bs": training.BS, "threads": 1},
        min_rounds=4,
        also_fresh=False,
        input_sets=2,
        weight=2,
        threads=1,
    )


@pytest.mark.race(list(map(group, FLOORS)))
def test_epoch(race):
    race()
