"""Rows of tensors by index -> one batch, converted and normalised in the same pass."""

import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbperf.extension import _C


class Conversion(NamedTuple):
    """What happens to the rows of the first tensor: (row - mean) * scale, then rounded to dtype."""

    dtype: torch.dtype
    mean: Tensor | None  # float32, (1,) or (channels,)
    scale: Tensor | None
    channel_dim: int

    def apply(self, rows: Tensor) -> Tensor:
        """Return converted rows (B, ...), by torch; what the C++ kernels compute, operation for operation."""
        if self.mean is None or self.scale is None:
            return rows.to(self.dtype)
        shape = [1] * rows.dim()
        if self.mean.numel() > 1:
            shape[self.channel_dim] = -1
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        return ((rows - self.mean.view(shape)) * self.scale.view(shape)).to(self.dtype)


def conversion(
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> Conversion | None:
    """Return the conversion that these arguments of `gather` ask for, or None where they ask for none."""
    if dtype is None and mean is None and std is None:
        return None
    default = tensor.dtype if tensor.is_floating_point() else torch.float32
    target = dtype or (tensor.dtype if mean is None and std is None else default)
    if mean is None and std is None:
        return Conversion(target, None, None, 1)
    if not target.is_floating_point:
        raise TypeError(f"gather: mean and std need a floating point dtype, got {target}")
    means, scales = _normalisation(_values("mean", mean, 0.0), _values("std", std, 1.0))
    return Conversion(target, means, scales, _channel_dim(tensor, means.numel()))


@lru_cache(maxsize=64)
def _normalisation(means: tuple[float, ...], stds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    channels = max(len(means), len(stds))
    mean = torch.tensor(means, dtype=torch.float32).expand(channels).contiguous()
    scale = torch.tensor([1 / std for std in stds], dtype=torch.float32).expand(channels).contiguous()
    return mean, scale


def _values(name: str, value: float | Sequence[float] | Tensor | None, absent: float) -> tuple[float, ...]:
    if value is None:
        return (absent,)
    given = value.reshape(-1).tolist() if isinstance(value, Tensor) else value
    values = tuple(float(v) for v in (given if isinstance(given, Iterable) else [given]))
    if not values or not all(isfinite(v) for v in values) or (name == "std" and 0 in values):
        expected = "finite numbers other than zero" if name == "std" else "finite numbers"
        raise ValueError(f"gather: {name} expects {expected}, one or one per channel, got {value}")
    return values


def _channel_dim(tensor: Tensor, channels: int) -> int:
    if channels == 1:
        return 1
    for dim in (1, tensor.dim() - 1):
        if 0 < dim < tensor.dim() and tensor.size(dim) == channels:
            return dim
    raise ValueError(
        f"gather: mean and std have {channels} channels, but neither dimension 1 nor the last of the tensor "
        f"of shape {tuple(tensor.shape)} has that size"
    )


def as_index(index: Any) -> Tensor:
    """Return an index (B,) int64 of a list of ints, a range, an array or an integer tensor."""
    if not isinstance(index, Tensor) and hasattr(index, "dtype"):
        index = torch.as_tensor(index)
    if isinstance(index, Tensor):
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.dim() != 1:
            raise TypeError(f"gather: index must be 1-D integers, got {index.dim()}-D {index.dtype}")
        return index.to("cpu", torch.int64)
    if not isinstance(index, Iterable):
        raise TypeError(f"gather: index must be a list of ints or a 1-D integer tensor, got {index!r}")
    return torch.tensor([operator.index(i) for i in index], dtype=torch.int64)


def gather_rows(
    tensors: tuple[Tensor, ...],
    index: Any,
    convert: Conversion | None,
    outs: tuple[Tensor, ...] | None = None,
) -> list[Tensor]:
    """Return the picked rows of each tensor, the first one converted; into `outs` where given."""
    rows = _C.gather_rows(tensors, index, convert, outs)
    if rows is None:
        index = as_index(index)
        rows = _C.gather_rows(tensors, index, convert, outs)
    if rows is None:  # another device, another layout, or a graph to keep
        rows = [tensor.index_select(0, index.to(tensor.device)) for tensor in tensors]
        if convert:
            rows[0] = convert.apply(rows[0])
        if outs is not None:
            rows = [out.copy_(row) for out, row in zip(outs, rows, strict=True)]
    return rows


def gather(
    tensors: Tensor | Sequence[Tensor],
    index: Any,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> Any:
    """Pick rows of tensors by index, as `torch.index_select(tensor, 0, index)`, and convert them on the way.

    The result equals `((rows.to(torch.float32) - mean) * (1 / std)).to(dtype)`, in one pass over the rows.

    Args:
        tensors: (N, ...), one or several with the same N.
        index: (B,) list of ints, or integer array or tensor; each from 0 to N - 1.
        out: (B, ...), where to put the rows; one per tensor. It must not overlap them.
        dtype: of the first tensor's rows; the others stay as they are.
        mean: subtracted from the first tensor's rows: a number, or one per channel, where the channels are
            dimension 1 (N, C, ...) or else the last one (N, ..., C).
        std: divides what is left, like mean; pixels of 0 to 255 come to [0, 1] with std=255.

    Returns:
        (B, ...) for one tensor, a tuple of these for several.

    Raises:
        IndexError: an index is negative or not less than N.
        TypeError: index is not 1-D integers.
        ValueError: sizes, mean or std do not fit.

    >>> gather(torch.tensor([[0], [255], [51]], dtype=torch.uint8), [2, 1], std=255.0)
    tensor([[0.2000],
            [1.0000]])
    """
    inputs = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    if not inputs or any(t.dim() == 0 or t.size(0) != inputs[0].size(0) for t in inputs):
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise ValueError(f"gather: expected tensors with the same number of rows, got shapes [{shapes}]")
    convert = conversion(inputs[0], dtype, mean, std)
    outs = None if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
    if outs is not None:
        index = as_index(index)
        _check_outs(inputs, outs, index.numel(), convert)
    rows = gather_rows(inputs, index, convert, outs)
    return rows[0] if isinstance(tensors, Tensor) else tuple(rows)


def _check_outs(
    inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...], n: int, convert: Conversion | None
) -> None:
    if len(outs) != len(inputs):
        raise ValueError(f"gather: expected {len(inputs)} out tensors, got {len(outs)}")
    for i, (tensor, out) in enumerate(zip(inputs, outs, strict=True)):
        shape = (n, *tensor.shape[1:])
        dtype = convert.dtype if convert and i == 0 else tensor.dtype
        if tuple(out.shape) != shape or out.dtype != dtype:
            raise ValueError(
                f"gather: expected out {i} of shape {shape}, {dtype}, got {tuple(out.shape)}, {out.dtype}"
            )
