"""The lesson's way to batches: Dataset, a loader that slices, Sampler, collate, a loader that samples.

The lesson calls both loaders DataLoader, one after the other, and then torch's; here each has its own name.
Single samples are (x of any shape, y 0-D), batches (n, ...) and (n,). Each step is naive on purpose.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor]


class Dataset:
    """Inputs and targets, indexed together by a number, a slice or a tensor of indices.

    The torch equivalent is `torch.utils.data.TensorDataset`.

    Args:
        x: inputs (n, ...), any dtype.
        y: targets (n, ...), any dtype.

    Source: fast.ai part 2 (2019), lesson 9, "Dataset".

    >>> ds = Dataset(torch.arange(10), torch.arange(10) % 2)
    >>> len(ds), ds[2:4]
    (10, (tensor([2, 3]), tensor([0, 1])))
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise ValueError(f"Dataset: x and y must be of one length, got {len(x)} and {len(y)}")
        self.x, self.y = x, y

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.x)

    def __getitem__(self, i: Any) -> Batch:
        """Return (x[i], y[i])."""
        return self.x[i], self.y[i]


class SlicingDataLoader:
    """Batches in file order, each a slice of the dataset: views, no copies. The lesson's first loader.

    The torch equivalent is `DataLoader(ds, bs)`, which fetches sample by sample.

    Args:
        ds: anything with a length that takes slices.
        bs: samples in a batch; the last batch may have fewer.

    Source: fast.ai part 2 (2019), lesson 9, "DataLoader".

    >>> ds = Dataset(torch.arange(5), torch.arange(5))
    >>> [len(yb) for xb, yb in SlicingDataLoader(ds, 2)]
    [2, 2, 1]
    """

    def __init__(self, ds: Any, bs: int) -> None:
        _check_batch_size("SlicingDataLoader", bs)
        self.ds, self.bs = ds, bs

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.ds) // self.bs)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the slices."""
        for i in range(0, len(self.ds), self.bs):
            yield self.ds[i : i + self.bs]


class Sampler:
    """The indices of each batch, in order or newly shuffled each time it is gone through.

    The torch equivalent is `BatchSampler` over a `SequentialSampler` or `RandomSampler`.

    Args:
        ds: anything with a length.
        bs: indices in a batch; the last batch may have fewer.
        shuffle: draw the order from torch's global random numbers.

    Source: fast.ai part 2 (2019), lesson 9, "Random sampling".

    >>> list(Sampler(range(4), 3))
    [tensor([0, 1, 2]), tensor([3])]
    """

    def __init__(self, ds: Any, bs: int, shuffle: bool = False) -> None:
        _check_batch_size("Sampler", bs)
        self.n, self.bs, self.shuffle = len(ds), bs, shuffle

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.n // self.bs)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 index tensors (bs,)."""
        idxs = torch.randperm(self.n) if self.shuffle else torch.arange(self.n)
        for i in range(0, self.n, self.bs):
            yield idxs[i : i + self.bs]


def collate(b: Sequence[Batch]) -> Batch:
    """Stack a list of samples into one batch.

    The torch equivalent is `torch.utils.data.default_collate`, for samples that are pairs of tensors.

    Args:
        b: samples (x, y), all x of one shape and all y of one shape.

    Returns:
        (len(b), ...) and (len(b), ...), dtypes kept.

    Source: fast.ai part 2 (2019), lesson 9, `collate`.

    >>> collate([(torch.zeros(2), torch.tensor(1)), (torch.ones(2), torch.tensor(0))])[1]
    tensor([1, 0])
    """
    xs, ys = zip(*b, strict=True)
    return torch.stack(xs), torch.stack(ys)


class SamplingDataLoader:
    """Batches as a sampler says, fetched sample by sample and collated. The lesson's second loader.

    The torch equivalent is `DataLoader(ds, batch_sampler=sampler, collate_fn=collate_fn)`.

    Args:
        ds: anything that takes an index.
        sampler: gives the indices of each batch.
        collate_fn: makes one batch of a list of samples.

    Source: fast.ai part 2 (2019), lesson 9, "Random sampling".

    >>> ds = Dataset(torch.arange(5), torch.arange(5) * 2)
    >>> next(iter(SamplingDataLoader(ds, Sampler(ds, 3))))
    (tensor([0, 1, 2]), tensor([0, 2, 4]))
    """

    def __init__(
        self,
        ds: Any,
        sampler: Iterable[Any],
        collate_fn: Callable[[list[Any]], Any] = collate,
    ) -> None:
        self.ds, self.sampler, self.collate_fn = ds, sampler, collate_fn

    def __len__(self) -> int:
        """Return the number of batches, if the sampler knows it."""
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the collated batches."""
        for s in self.sampler:
            yield self.collate_fn([self.ds[i] for i in s])


def get_dls(train_ds: Any, valid_ds: Any, bs: int, **kwargs: Any) -> tuple[DataLoader, DataLoader]:
    """Return torch's loaders: for training, shuffled; for validation, in order and in batches of 2 * bs.

    Validation keeps no gradients, so twice the batch fits the same memory.

    Args:
        train_ds: map-style dataset to train on.
        valid_ds: map-style dataset to validate on.
        bs: samples in a training batch.
        kwargs: given to both loaders, for instance `num_workers` or `collate_fn`.

    Returns:
        The two loaders.

    Source: fast.ai part 2 (2019), lesson 9, `get_dls`.

    >>> ds = Dataset(torch.arange(8), torch.arange(8))
    >>> [dl.batch_size for dl in get_dls(ds, ds, bs=2)]
    [2, 4]
    """
    return (
        DataLoader(train_ds, batch_size=bs, shuffle=True, **kwargs),
        DataLoader(valid_ds, batch_size=bs * 2, **kwargs),
    )


def _check_batch_size(name: str, bs: int) -> None:
    if bs < 1:
        raise ValueError(f"{name}: bs must be at least 1, got {bs}")
