"""Batches on a GPU: gather against index_select, collate of samples that lie there against torch.stack."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mbperf
from mbperf.measure.gpu_group import measure_on_gpu
from mbperf.measure.group import Group
from mbperf.measure.traffic import Traffic, copy_traffic

NO_GPU = "no CUDA device"
SHAPE, PIXELS = (3, 64, 64), 3 * 64 * 64
ROWS = 131_072  # 1.6 GB: of the rows of a batch at most 3 % are still in a cache of 50 MB from batches before
MEAN, STD = (120.0, 115.0, 105.0), (58.0, 57.0, 57.5)


@cache
def dataset() -> Tensor:
    """Images of bytes, the same for all: one for each of the hundreds of input sets would take 64 GB."""
    of_its_own = torch.Generator("cuda").manual_seed(0)  # the first batch draws the same as ever after
    return torch.randint(0, 256, (ROWS, *SHAPE), dtype=torch.uint8, device="cuda", generator=of_its_own)


def images(count: int) -> tuple[Tensor, Tensor]:
    """Images and the indices of a shuffled batch, both on the GPU."""
    return dataset(), torch.randperm(ROWS, device="cuda")[:count]


def samples(count: int) -> tuple[list[Tensor]]:
    return (list(torch.randn(count, 784, device="cuda").unbind()),)


@cache
def per_channel(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, dtype=dtype, device="cuda").view(-1, 1, 1) for v in (MEAN, STD))
    return mean, std


def gathered(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    return (mbperf.gather(pixels, index),)


def gathered_and_normalised(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    return (mbperf.gather(pixels, index, dtype=torch.bfloat16, mean=MEAN, std=STD),)


def selected(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    return (pixels.index_select(0, index),)


def selected_and_normalised(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    mean, std = per_channel(torch.float32)
    return (((pixels.index_select(0, index).float() - mean) / std).bfloat16(),)


def indexed(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    return (pixels[index],)


def indexed_and_normalised(pixels: Tensor, index: Tensor) -> tuple[Tensor]:
    mean, std = per_channel(torch.float64)
    return ((pixels[index].double() - mean) / std,)


def collated(samples: list[Tensor]) -> tuple[Tensor]:
    return (mbperf.collate(samples),)


def stacked(samples: list[Tensor]) -> tuple[Tensor]:
    return (torch.stack(samples),)


def joined(samples: list[Tensor]) -> tuple[Tensor]:
    return (torch.cat([sample[None] for sample in samples]),)


def group(op: str, count: int, make: Callable[..., Any], functions: list[Any], traffic: Traffic) -> Group:
    fused, torch_way, expected = functions
    return Group(
        op=op,
        case=f"cuda {count}",
        make_inputs=partial(make, count),
        contenders={"fused": fused, "torch": torch_way},
        expected=expected,
        traffic=traffic,
        facts={"N": count, "device": "cuda", "timing": "events around graphs"},
        measured_by=partial(measure_on_gpu, eager=False),
    )


def groups() -> list[Group]:
    normalised = [gathered_and_normalised, selected_and_normalised, indexed_and_normalised]
    made = []
    for count in (64, 256, 1_024):
        read = count * PIXELS
        made += [
            group("gather", count, images, [gathered, selected, indexed], copy_traffic(read)),
            group("gather normalised", count, images, normalised, Traffic(read, 2 * read)),
            group("collate", count, samples, [collated, stacked, joined], copy_traffic(count * 784 * 4)),
        ]
    return made


if torch.cuda.is_available():

    @pytest.mark.race(groups())
    def test_batch_cuda(race):
        race()

else:

    @pytest.mark.skip(reason=NO_GPU)
    def test_batch_cuda():
        """Visible where there is nothing to race on."""
