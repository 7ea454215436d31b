"""Collate: fused against the lesson's, against default_collate, against a copy of the same bytes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import COLLATE, CollateCase
from torch.utils.data import default_collate

import mbperf
from mbperf.lesson import loaders
from mbperf.measure.group import Group
from mbperf.measure.traffic import copy_traffic

PIXELS, ROWS = 784, 4_096
# Bytes of one sample's fields: what a position, a box or a short embedding takes.
FIELDS = {f"field_{i}": (size,) for i, size in enumerate((1, 2, 3, 4, 4, 8, 8, 16, 16, 32))}


def pixels_and_label(batch_size: int) -> tuple[Any]:
    """Shuffled rows of a dataset, as a sampler would pick them."""
    x, y = torch.rand(ROWS, PIXELS), torch.randint(0, 10, (ROWS,))
    return ([(x[i], y[i]) for i in torch.randperm(ROWS)[:batch_size]],)


def ten_fields(batch_size: int) -> tuple[Any]:
    """Nested dicts: {"near": {...}, "far": {...}} of five small tensors each."""
    names = list(FIELDS)

    def sample() -> dict[str, dict[str, torch.Tensor]]:
        halves = {"near": names[:5], "far": names[5:]}
        return {half: {name: torch.rand(FIELDS[name]) for name in its} for half, its in halves.items()}

    return ([sample() for _ in range(batch_size)],)


SAMPLES = {"pixels+label": pixels_and_label, "ten-fields": ten_fields}
SAMPLE_BYTES = {"pixels+label": PIXELS * 4 + 8, "ten-fields": sum(size * 4 for (size,) in FIELDS.values())}


def expected(samples: Sequence[Any]) -> Any:
    """Stack field by field, in elementary steps."""
    first = samples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(list(samples))
    if isinstance(first, dict):
        return {key: expected([sample[key] for sample in samples]) for key in first}
    return [expected(column) for column in zip(*samples, strict=True)]


def group(case: CollateCase) -> Group:
    naive = {"naive": loaders.collate} if case.sample == "pixels+label" else {}
    return Group(
        op="collate",
        case=str(case),
        make_inputs=partial(SAMPLES[case.sample], case.batch_size),
        contenders={"fused": mbperf.collate, **naive, "torch": default_collate},
        expected=expected,
        traffic=copy_traffic(case.batch_size * SAMPLE_BYTES[case.sample]),
        floors={"torch": case.floor},
        facts={"N": case.batch_size, "sample": case.sample, "why": case.why},
    )


@pytest.mark.race([group(case) for case in COLLATE])
def test_collate(race):
    race()
