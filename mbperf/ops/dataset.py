"""A dataset of tensors whose batches are gathered at once instead of sample by sample."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import collate as torch_collate

from mbperf.ops.collate_rules import new_shared
from mbperf.ops.gather import Conversion, as_index, conversion, gather_rows, rows_format
from mbperf.ops.gathered import GatheredBatch, GatheredSample

ALIGN = 64  # bytes: a cache line, and the widest vector


def _collate_gathered(batch: Sequence, *, collate_fn_map: dict[Any, Callable] | None = None) -> Any:
    if isinstance(batch, GatheredBatch):
        return batch.collated()
    return torch_collate.collate([tuple(sample) for sample in batch], collate_fn_map=collate_fn_map)


torch_collate.default_collate_fn_map[GatheredSample] = _collate_gathered


class TensorDataset(Dataset[tuple[Tensor, ...]]):
    """Samples that are rows of tensors, as `torch.utils.data.TensorDataset`, batched by one gather.

    A DataLoader asks `__getitems__` for a whole batch, straight or through Subset and random_split; the
    default_collate of torch and `mbperf.collate` pass it on as it is. In a worker it lies in shared memory.
    A batch is a copy, as default_collate's is, also of rows in order: changed in place, it leaves the dataset
    as it was. Views would gain nothing: the step that follows has to read the rows anyway.

    Args:
        *tensors: (N, ...), all with the same N. Rows that are not dense in memory are copied once, here.
        dtype: of the first tensor's rows in samples and batches; uint8 pixels stay four times smaller here.
        mean: subtracted from the first tensor's rows, as in `mbperf.gather`.
        std: divides what is left.

    Raises:
        ValueError: the tensors have different N.

    >>> x, y = torch.arange(6).view(3, 2), torch.arange(3)
    >>> next(iter(torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=2)))
    [tensor([[0, 1],
            [2, 3]]), tensor([0, 1])]
    """

    tensors: tuple[Tensor, ...]

    def __init__(
        self,
        *tensors: Tensor,
        dtype: torch.dtype | None = None,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
    ) -> None:
        if not tensors or any(t.dim() == 0 or t.size(0) != tensors[0].size(0) for t in tensors):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise ValueError(f"TensorDataset: expected tensors with the same number of rows, got [{shapes}]")
        self.tensors = tuple(_with_dense_rows(tensor) for tensor in tensors)
        self.conversion = conversion(tensors[0], dtype, mean, std)

    def __len__(self) -> int:
        """Return N."""
        return self.tensors[0].size(0)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Return one sample, or the rows that a slice or an index tensor names."""
        first, *rest = (tensor[index] for tensor in self.tensors)
        if self.conversion:
            one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
            first = self.conversion.apply(first[None])[0] if one else self.conversion.apply(first)
        return (first, *rest)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> GatheredBatch:
        """Return the samples of a batch, gathered.

        Args:
            indices: (B,) ints from 0 to N - 1, in any form that `mbperf.gather` takes.

        Returns:
            A sequence of B samples that `collate` turns into tensors (B, ...) without a copy.

        Raises:
            IndexError: an index is negative or not less than N.
        """
        outs = None
        if get_worker_info() is not None:
            indices = as_index(indices)
            outs = _shared_outs(self.tensors, len(indices), self.conversion)
        return GatheredBatch(gather_rows(self.tensors, indices, self.conversion, outs))


def _with_dense_rows(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor[0].is_contiguous():
        return tensor
    return tensor.contiguous(memory_format=rows_format(tensor))


def _shared_outs(tensors: Sequence[Tensor], n: int, convert: Conversion | None) -> tuple[Tensor, ...] | None:
    """Return tensors for n gathered rows in one piece of shared memory: one descriptor to send."""
    if any(t.device.type != "cpu" or t.layout != torch.strided or t.requires_grad for t in tensors):
        return None
    dtypes = [t.dtype for t in tensors]
    if convert:
        dtypes[0] = convert.dtype
    sizes = [(n, *t.shape[1:]) for t in tensors]
    starts = [0]
    for size, dtype in zip(sizes, dtypes, strict=True):
        starts.append(starts[-1] + -(-prod(size) * dtype.itemsize // ALIGN) * ALIGN)
    if starts[-1] == 0:
        return None
    storage = new_shared(starts[-1])
    return tuple(
        torch.empty(0, dtype=dtype).set_(
            storage,
            start // dtype.itemsize,
            size,
            torch.empty(size, device="meta", memory_format=rows_format(tensor)).stride(),
        )
        for start, size, dtype, tensor in zip(starts, sizes, dtypes, tensors, strict=False)
    )
