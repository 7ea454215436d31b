"""Collate keeps nothing: reference counts and resident memory over 100,000 batches."""

import os
import sys

import numpy as np
import psutil
import pytest
import torch
from batches import Point

from mbperf import Collate, collate

KEY = "a key that only this test uses"
BATCH = [
    ({KEY: torch.zeros(64), "b": np.zeros(8)}, Point(k, 1.5), ["text", torch.tensor(k)]) for k in range(8)
]
BROKEN = [{KEY: torch.zeros(3)}, {KEY: torch.zeros(4)}]
# AddressSanitizer holds 256 MB of freed memory back.
MOST_GROWTH = 2_000_000 + (256 << 20 if os.environ.get("MBPERF_SANITIZE") else 0)


def counts():
    objects = [
        KEY,
        BATCH,
        BATCH[0],
        BATCH[0][0],
        BATCH[0][0][KEY],
        BATCH[0][0]["b"],
        BATCH[3][2][1],
        Point,
        None,
    ]
    return [sys.getrefcount(item) for item in objects]


def test_reference_counts_stay():
    before = counts()
    for _ in range(1_000):
        collate(BATCH)
        with pytest.raises(RuntimeError):
            collate(BROKEN)
    grown = [after - was for was, after in zip(before, counts(), strict=True)]
    assert max(grown) < 50, grown  # None is used by others too


def resident_after(function, n):
    for _ in range(n):
        function()
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("settings", [Collate(), Collate(strict=True)])
def test_memory_stays_over_100_000_batches(settings):
    def use():
        settings(BATCH)

    before = resident_after(use, 10_000)
    grown = resident_after(use, 50_000) - before
    # One leaked tensor object a batch (100 bytes and more) would be 5 MB.
    assert grown < MOST_GROWTH, f"{grown / 50_000:.0f} bytes a batch"


def test_memory_stays_when_collate_fails_or_pads():
    padded = Collate(pad=0, lengths=True, mask=True)
    ragged = [torch.arange(k) for k in (1, 2, 3)]

    def use():
        padded(ragged)
        with pytest.raises(RuntimeError):
            collate(BROKEN)

    before = resident_after(use, 2_000)
    grown = resident_after(use, 10_000) - before
    assert grown < MOST_GROWTH, f"{grown / 10_000:.0f} bytes a batch"
