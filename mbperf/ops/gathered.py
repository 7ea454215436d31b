"""A batch that is gathered already, in the shape of a list of samples."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class GatheredSample(tuple):
    """A sample that was taken out of a gathered batch; torch's default_collate knows the class."""

    __slots__ = ()


class GatheredBatch(Sequence):
    """A list of samples that is a batch already: `collate` and default_collate pass its tensors through.

    >>> import torch
    >>> batch = GatheredBatch([torch.tensor([[4, 5], [0, 1]]), torch.tensor([2, 0])])
    >>> len(batch), batch[1], batch.collated()
    (2, (tensor([0, 1]), tensor(0)), [tensor([[4, 5],
            [0, 1]]), tensor([2, 0])])
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.tensors[0])

    def __getitem__(self, i: Any) -> Any:
        """Return sample i, or a list of the samples of a slice."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return GatheredSample(tensor[i] for tensor in self.tensors)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over the samples, as plain tuples of views."""
        return zip(*(tensor.unbind() for tensor in self.tensors), strict=True)

    def collated(self) -> list[Tensor]:
        """Return the batch, one tensor a field."""
        return list(self.tensors)
