"""Rows of tensors by index -> one batch, converted and normalised in the same pass."""

import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from mbperf.extension import _C, _C_cuda
from mbperf.ops.staging import checked_device

PLAIN = {float, int, type(None)}  # what a cache may compare


class Conversion(NamedTuple):
    """The conversion of the rows of the first tensor: (row - mean) * scale, then rounded to dtype."""

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
        mean, scale = (values.to(rows.device).view(shape) for values in (self.mean, self.scale))
        return ((rows - mean) * scale).to(self.dtype)


def conversion(
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> Conversion | None:
    """Return the conversion that these arguments of `gather` ask for, or None where they ask for none."""
    if dtype is None and mean is None and std is None:
        return None
    means = mean if type(mean) in PLAIN else _values("mean", mean)
    stds = std if type(std) in PLAIN else _values("std", std)
    return _conversion(tensor.dtype, tensor.shape, dtype, means, stds)


@lru_cache(maxsize=64)
def _conversion(
    stored: torch.dtype,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    mean_given: float | tuple[float, ...] | None,
    std_given: float | tuple[float, ...] | None,
) -> Conversion:
    if mean_given is None and std_given is None:
        return Conversion(dtype or stored, None, None, 1)
    target = dtype or (stored if stored.is_floating_point else torch.float32)
    if not target.is_floating_point:
        raise TypeError(f"gather: mean and std need a floating point dtype, got {target}")
    means = (0.0,) if mean_given is None else _values("mean", mean_given)
    stds = (1.0,) if std_given is None else _values("std", std_given)
    channels = max(len(means), len(stds))
    if {len(means), len(stds)} - {1, channels}:
        raise ValueError(f"gather: mean has {len(means)} channels, std has {len(stds)}")
    with torch.inference_mode(False):  # kept for later calls, whose gradients may need them
        mean = torch.tensor(means, dtype=torch.float32).expand(channels).contiguous()
        scale = torch.tensor([1 / std for std in stds], dtype=torch.float32).expand(channels).contiguous()
    return Conversion(target, mean, scale, _channel_dim(shape, channels))


def _values(name: str, value: Any) -> tuple[float, ...]:
    given = value.reshape(-1).tolist() if isinstance(value, Tensor) else value
    values = tuple(float(v) for v in (given if isinstance(given, Iterable) else [given]))
    if not values or not all(isfinite(v) for v in values) or (name == "std" and 0 in values):
        expected = "finite numbers other than zero" if name == "std" else "finite numbers"
        raise ValueError(f"gather: {name} expects {expected}, one or one per channel, got {value}")
    return values


def _channel_dim(shape: tuple[int, ...], channels: int) -> int:
    if channels == 1:
        return 1
    for dim in (1, len(shape) - 1):
        if 0 < dim < len(shape) and shape[dim] == channels:
            return dim
    raise ValueError(
        f"gather: mean and std have {channels} channels, but neither dimension 1 nor the last of the tensor "
        f"of shape {tuple(shape)} has that size"
    )


def as_index(index: Any) -> Tensor:
    """Return an index (B,) int64 of a list of ints, a range, an array or an integer tensor."""
    if not isinstance(index, Tensor) and hasattr(index, "dtype"):
        index = torch.as_tensor(index)
    if isinstance(index, Tensor):
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.dim() != 1:
            raise TypeError(f"gather: index must be 1-D integers, got {index.dim()}-D {index.dtype}")
        return index.to(torch.int64)
    if not isinstance(index, Iterable):
        raise TypeError(f"gather: index must be a list of ints or a 1-D integer tensor, got {index!r}")
    return torch.tensor([operator.index(i) for i in index], dtype=torch.int64)


def gather_rows(
    tensors: tuple[Tensor, ...],
    index: Any,
    convert: Conversion | None,
    outs: tuple[Tensor, ...] | None = None,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Return the picked rows of each tensor, the first converted; into `outs` or on `device` if given."""
    rows = None if device else _C.gather_rows(tensors, index, convert, outs)
    if rows is not None:
        return rows
    _check_inputs(tensors)
    index = as_index(index)
    if outs is not None:
        _check_outs(tensors, outs, index.numel(), convert)
    rows = None if device or index.is_cuda else _C.gather_rows(tensors, index, convert, outs)
    if rows is not None:
        return rows
    # Another device, another layout, or a graph to keep.
    return [
        _picked(tensor, index, convert if i == 0 else None, outs[i] if outs else None, device)
        for i, tensor in enumerate(tensors)
    ]


def _picked(
    tensor: Tensor, index: Tensor, convert: Conversion | None, out: Tensor | None, device: torch.device | None
) -> Tensor:
    target = out.device if out is not None else device or tensor.device
    if _kernel_serves(tensor, target):
        return _picked_by_kernel(tensor, index, convert, out, target)
    index = index.to(tensor.device, non_blocking=not index.is_cuda)
    if picked := _C.gather_rows((tensor,), index, convert, None):
        (rows,) = picked
    else:
        rows = tensor.index_select(0, index)
        rows = convert.apply(rows) if convert else rows
    return rows.to(target) if out is None else out.copy_(rows)


def _kernel_serves(tensor: Tensor, target: torch.device) -> bool:
    """Whether the CUDA kernel reads these rows: on the GPU they go to, or in pinned host memory."""
    if target.type != "cuda" or _C_cuda is None or torch.compiler.is_compiling():
        return False
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        return False
    if tensor.requires_grad and torch.is_grad_enabled():
        return False
    return tensor.device == target or (tensor.device.type == "cpu" and tensor.is_pinned())


def _picked_by_kernel(
    tensor: Tensor, index: Tensor, convert: Conversion | None, out: Tensor | None, target: torch.device
) -> Tensor:
    if not index.is_cuda:
        check_range(index, tensor)
        index = index.to(target, non_blocking=True)
    if out is None:
        shape, dtype = (index.numel(), *tensor.shape[1:]), convert.dtype if convert else tensor.dtype
        out = torch.empty(shape, dtype=dtype, device=target, memory_format=rows_format(tensor))
    mean, scale, channel_dim = convert[1:] if convert else (None, None, 1)
    return torch.ops.mbperf.gather_rows.out(tensor, index, mean, scale, channel_dim, out=out)


def check_range(index: Tensor, tensor: Tensor) -> None:
    """Raise IndexError for an index on the CPU that names no row; the device can only assert."""
    bad = (index < 0) | (index >= tensor.size(0))
    if bad.any():
        k = int(bad.nonzero()[0])
        raise IndexError(
            f"gather: index[{k}] is {int(index[k])}, expected 0 <= index < {tensor.size(0)}, the rows of a "
            f"tensor of shape {list(tensor.shape)}"
        )


def rows_format(tensor: Tensor) -> torch.memory_format:
    """Return the memory format in which the rows of a tensor lie."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous():
        return torch.contiguous_format
    return channels_last if tensor.is_contiguous(memory_format=channels_last) else torch.contiguous_format


@overload
def gather(
    tensors: Tensor,
    index: Any,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor: ...
@overload
def gather(
    tensors: Sequence[Tensor],
    index: Any,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, ...]: ...
def gather(
    tensors: Tensor | Sequence[Tensor],
    index: Any,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor | tuple[Tensor, ...]:
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
        device: where the rows shall lie; by default with their tensor, or with `out`. On the way from the CPU
            to a GPU the kernel reads pinned tensors itself; rows of others are gathered first, then copied.

    Returns:
        (B, ...) for one tensor, a tuple of these for several.

    Raises:
        IndexError: an index is negative or not less than N. An index on a GPU is checked there: a wrong one
            ends the process's use of the GPU with "device-side assert triggered".
        TypeError: index is not 1-D integers.
        ValueError: sizes, mean, std or device do not fit.
        RuntimeError: device names a GPU that is not there.

    >>> gather(torch.tensor([[0], [255], [51]], dtype=torch.uint8), [2, 1], std=255.0)
    tensor([[0.2000],
            [1.0000]])
    """
    inputs = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    convert = None
    if not (dtype is None and mean is None and std is None):
        _check_inputs(inputs)
        convert = conversion(inputs[0], dtype, mean, std)
    outs = None if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
    rows = gather_rows(inputs, index, convert, outs, _full_device(device))
    return rows[0] if isinstance(tensors, Tensor) else tuple(rows)


def _full_device(device: torch.device | str | None) -> torch.device | None:
    """Return a device with its number, as tensors have it."""
    if device is None:
        return None
    named = checked_device("gather", device)
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else named


def _check_inputs(inputs: tuple[Tensor, ...]) -> None:
    if not inputs or any(t.dim() == 0 or t.size(0) != inputs[0].size(0) for t in inputs):
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise ValueError(f"gather: expected tensors with the same number of rows, got shapes [{shapes}]")


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
