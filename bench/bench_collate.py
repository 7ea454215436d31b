"""Collate: fused against the lesson's, against default_collate, against a copy of the same bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import COLLATE, KINDS, CollateCase
from torch.utils.data import default_collate

import mbperf
from mbperf.lesson import loaders
from mbperf.measure.group import Group
from mbperf.measure.traffic import copy_traffic

PIXELS, ROWS = 784, 4_096
SIDES = (224, 176, 256, 192, 240)
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


class Place(NamedTuple):
    """A sample's part that is a named tuple."""

    at: torch.Tensor
    name: str


def nested(k: int) -> dict[str, Any]:
    return {"seen": [torch.rand(3), (k, k / 2)], "place": Place(torch.rand(2), f"place {k}"), "id": b"%d" % k}


def numpy_scalars(k: int) -> tuple[Any, ...]:
    return np.float32(k / 3), np.float64(k / 3), np.int64(k), np.uint8(k), np.bool_(k % 2)


# Sample k of each kind.
KIND = {
    "tiny": lambda k: (torch.rand(4), k % 10),
    "images": lambda k: (torch.rand(3, 224, 224), k % 10),
    "byte-images": lambda k: (torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8), k % 10),
    "permuted-images": lambda k: (torch.rand(224, 224, 3).permute(2, 0, 1), k % 10),
    "hundred-fields": lambda k: {f"field_{i}": torch.rand(4) for i in range(100)},
    "numpy": lambda k: (torch.rand(PIXELS).numpy(), k % 10),
    "numpy-scalars": numpy_scalars,
    "scalars": lambda k: (k, k / 3, k % 2 == 0),
    "strings": lambda k: f"sample {k}",
    "bytes": lambda k: b"sample %d" % k,
    "nested": nested,
    "mixed": lambda k: torch.rand(PIXELS).to(torch.float64 if k % 2 else torch.float32),
}


def of_kind(kind: str, batch_size: int) -> tuple[Any]:
    return ([KIND[kind](k) for k in range(batch_size)],)


def scales(batch_size: int) -> tuple[Any]:
    """Batches of square images, one side length each, as training at several scales has them."""
    return ([[torch.rand(3, side, side) for _ in range(batch_size)] for side in SIDES],)


def one_by_one(collate: Callable[[list[torch.Tensor]], torch.Tensor], batches: Any) -> list[torch.Tensor]:
    """Collate each batch after the one before is gone; return a corner of each and the last whole."""
    corners = []
    for samples in batches:
        batch = collate(samples)
        corners.append(batch[-1, -1, -1, -1].clone())
    return [*corners, batch]


def expected_one_by_one(batches: Any) -> list[torch.Tensor]:
    return one_by_one(expected, batches)


SAMPLES = {"scales": scales, "pixels+label": pixels_and_label, "ten-fields": ten_fields}
SAMPLES |= {kind: partial(of_kind, kind) for kind in KIND}
SAMPLE_BYTES = {"pixels+label": PIXELS * 4 + 8, "ten-fields": sum(size * 4 for (size,) in FIELDS.values())}


def expected(samples: Sequence[Any]) -> Any:
    """Stack field by field, in elementary steps."""
    first = samples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack([sample.double() for sample in samples])
    if isinstance(first, dict):
        return {key: expected([sample[key] for sample in samples]) for key in first}
    if isinstance(first, list | tuple):
        return [expected(column) for column in zip(*samples, strict=True)]
    return (
        list(samples) if isinstance(first, str | bytes) else torch.from_numpy(np.array(samples, np.float64))
    )


def group(case: CollateCase) -> Group:
    contenders: dict[str, Callable[..., Any]] = {"fused": mbperf.collate, "torch": default_collate}
    if case.sample == "pixels+label":
        contenders = {"fused": mbperf.collate, "naive": loaders.collate, "torch": default_collate}
    elif case.sample == "scales":
        contenders = {name: partial(one_by_one, collate) for name, collate in contenders.items()}
    return Group(
        op="collate",
        case=str(case),
        make_inputs=partial(SAMPLES[case.sample], case.batch_size),
        contenders=contenders,
        expected=expected_one_by_one if case.sample == "scales" else expected,
        traffic=copy_traffic(case.batch_size * SAMPLE_BYTES[case.sample]) if case in COLLATE else None,
        floors={"torch": case.floor},
        facts={"N": case.batch_size, "sample": case.sample, "why": case.why},
        input_sets=2,
        weight=1 if case in COLLATE else 0.2,
    )


@pytest.mark.race([group(case) for case in COLLATE + KINDS])
def test_collate(race):
    race()
