"""Datasets for a first look: `mbperf loader --demo lesson|images|tokens|slow-disk`.

lesson: tensors in memory, where workers hurt. images: JPEG files decoded by PIL. tokens: a list of dicts with
ragged token ids, as Hugging Face datasets give. slow-disk: each sample waits, one in a hundred for long.
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import TensorDataset as TorchTensorDataset

NAMES = ("lesson", "images", "tokens", "slow-disk")
SLOW_EVERY = 100


def lesson(samples: int = 50_000) -> TorchTensorDataset:
    """Return tensors of the shape of the lesson's MNIST: (samples, 784) float32 and int64 labels.

    >>> len(lesson(10))
    10
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, 784, generator=generator)
    return TorchTensorDataset(images, torch.randint(0, 10, (samples,), generator=generator))


class JpegFolder(Dataset):
    """The JPEG files of a folder, decoded and scaled to `size` x `size` at each access."""

    def __init__(self, folder: str | Path, size: int = 160):
        self.files = sorted(str(path) for path in Path(folder).glob("*.jpg"))
        self.size = size

    def __len__(self) -> int:
        """Return how many files there are."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return a (3, size, size) uint8 tensor and its label."""
        import numpy
        from PIL import Image

        with Image.open(self.files[index]) as image:
            pixels = numpy.asarray(image.convert("RGB").resize((self.size, self.size)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), index % 10


def write_jpegs(folder: str | Path, count: int = 512, width: int = 320, height: int = 240) -> None:
    """Write JPEG files of smooth random pictures into a folder.

    Raises:
        ImportError: pillow is not installed.
    """
    from mbperf.require import require

    image_module = require("PIL.Image", "loader")
    draw = random.Random(0)
    for index in range(count):
        coarse = image_module.new("RGB", (16, 12))
        coarse.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(16 * 12)])
        coarse.resize((width, height), image_module.Resampling.BICUBIC).save(
            Path(folder) / f"{index:05d}.jpg", quality=90
        )


def images(folder: str) -> JpegFolder:
    """Return a dataset of JPEG files, written first where the folder has none."""
    if not any(Path(folder).glob("*.jpg")):
        write_jpegs(folder)
    return JpegFolder(folder)


def ragged_samples(samples: int = 20_000, longest: int = 512) -> list[dict[str, Any]]:
    """Return a list of {"input_ids", "attention_mask", "label"} with lengths as uneven as text has them."""
    draw = random.Random(0)
    found = []
    for _ in range(samples):
        length = max(8, min(longest, int(draw.lognormvariate(4.5, 0.6))))
        ids = [draw.randrange(50_257) for _ in range(length)]
        found.append({"input_ids": ids, "attention_mask": [1] * length, "label": draw.randrange(2)})
    return found


def pad_batch(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad a batch of token lists to its longest, as a Hugging Face data collator does."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str) -> torch.Tensor:
        return torch.tensor([sample[name] + [0] * (longest - len(sample[name])) for sample in samples])

    return {
        "input_ids": padded("input_ids"),
        "attention_mask": padded("attention_mask"),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


def tokens(samples: int = 20_000) -> DataLoader:
    """Return a loader over a list of dicts with ragged tokens and its padding collate function."""
    return DataLoader(ragged_samples(samples), batch_size=64, shuffle=True, collate_fn=pad_batch)  # type: ignore[arg-type]


class SlowDisk(Dataset):
    """Each sample waits 2 ms as for a disk, one in a hundred 40 ms."""

    def __len__(self) -> int:
        """Return a number of samples."""
        return 20_000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return a small sample after its wait."""
        time.sleep(0.04 if index % SLOW_EVERY == 7 else 0.002)
        return torch.full((256,), float(index)), index


def slow_disk() -> SlowDisk:
    """Return a dataset whose time goes into waiting."""
    return SlowDisk()
