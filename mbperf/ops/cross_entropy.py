"""Fused log_softmax + NLL: the public functions and the shapes of their operators."""

import sys
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.nn import _reduction as legacy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_functorch_active = torch._C._are_functorch_transforms_active


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    inplace: bool = False,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: Literal[True],
    inplace: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy between logits and targets, in one pass over the logits.

    Equivalent to `torch.nn.functional.cross_entropy`, whose signature it has, except that

    - a position whose target is `ignore_index` is never read: NaN there does not reach the gradient;
    - the loss is accumulated in float32 (float64 for float64 logits) whatever the dtype of the logits;
    - with "mean" and "sum" the gradient is that of the targets at the time of the call: backward checks them
      again, but a change to another class goes unnoticed where it is hidden from autograd (`.data`);
    - probabilities that require grad, double backward, forward mode and functorch transforms are served
      by torch's own operators;
    - a DTensor that is sharded on its classes keeps them so, inside and outside of `loss_parallel()`: one
      collective of three numbers a row (`mbperf.distributed.vocab_parallel_cross_entropy`).

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: class indices, int64 (or uint8 for 1-D and 2-D logits), of the shape of `input` without C;
            or probabilities of the shape and dtype of `input`.
        weight: one weight a class, shape (C), dtype of `input`.
        size_average: deprecated, see `reduction`.
        ignore_index: class index whose positions count for nothing.
        reduce: deprecated, see `reduction`.
        reduction: "none", "mean" (over the weights of the targets) or "sum".
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1].
        out_dtype: dtype of the loss; the dtype of `input` by default. torch.float32 hands out the
            unrounded loss of half-precision logits.
        z_loss: adds z_loss * logsumexp(input)**2 to the loss of each position; `mean` divides this part by
            the number of positions that are not ignored.
        softcap: replaces the logits by softcap * tanh(input / softcap), from 1e-30 to 1e30, without a copy of
            them; float16 logits are then read once more for the gradient.
        return_lse: also return logsumexp(input) over the classes, differentiable; 0 where ignored.
        inplace: let the gradient overwrite the logits where it is taken in the forward pass (mean and sum,
            eager mode, no autocast): the peak of memory falls by the size of the logits. The version
            counter of `input` is bumped, so that a backward that still needs the logits raises. What is
            below 6e-8 in a float16 gradient is then lost also where the loss is scaled afterwards. With
            `softcap` nothing is overwritten.

    Returns:
        The loss: a scalar, or with "none" a tensor of the shape of class-index targets. With `return_lse`
        the pair (loss, lse), lse of that shape in the accumulation dtype.

    Raises:
        IndexError: a target is neither in [0, C) nor `ignore_index`, also when it was changed between
            forward and backward.
        RuntimeError, ValueError: what `F.cross_entropy` raises for the same arguments.

    Source:
        Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 1]))
        tensor(0.3955)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce, reduction=reduction,
            label_smoothing=label_smoothing, out_dtype=out_dtype, z_loss=z_loss, softcap=softcap,
            return_lse=return_lse, inplace=inplace,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    if type(input) is not Tensor and _is_dtensor(input):
        from mbperf.distributed.dtensor import cross_entropy_of_dtensor

        capped = input if softcap is None else _softcapped(input, softcap)
        return cross_entropy_of_dtensor(
            cast(Any, capped), target, weight, cross_entropy, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, out_dtype=out_dtype, z_loss=z_loss, return_lse=return_lse,
        )  # fmt: skip
    code = _REDUCTIONS.get(reduction)
    if code is None:  # the old name of "mean", or torch's error
        code = legacy.get_enum(reduction)
    if torch.compiler.is_compiling():
        inplace = False
    elif (
        out_dtype is None and z_loss == 0.0 and softcap is None and not return_lse and not inplace
        and not _functorch_active()
    ):  # fmt: skip
        try:
            return _C.cross_entropy(input, target, weight, code, ignore_index, label_smoothing)
        except TypeError:  # not tensors: torch says so by the names of its own arguments
            # Not by F.cross_entropy, in whose place this function may stand.
            return torch._C._nn.cross_entropy_loss(
                input, target, weight, code, ignore_index, label_smoothing,  # type: ignore[arg-type]
            )  # fmt: skip
    ops = torch.ops.mbperf
    op = ops.cross_entropy_with_lse if return_lse else ops.cross_entropy_ if inplace else ops.cross_entropy
    return op(
        input, target, weight, code, ignore_index, label_smoothing, out_dtype=out_dtype, z_loss=z_loss,
        softcap=softcap,
    )  # fmt: skip


def _softcapped(input: Tensor, softcap: float) -> Tensor:
    if not 1e-30 <= softcap <= 1e30:
        raise ValueError(
            f"cross_entropy: softcap must be a number between 1e-30 and 1e30 or None, got {softcap}"
        )
    return softcap * torch.tanh(input / softcap)


def _is_dtensor(input: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.3 s
    return module is not None and isinstance(input, module.DTensor)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """The criterion of `cross_entropy`.

    Equivalent to `torch.nn.CrossEntropyLoss`, whose arguments it takes.

    Args:
        *args, **kwargs: as for `torch.nn.CrossEntropyLoss`.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(1, 4), torch.tensor([3]))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits `input` against `target`, shapes as for `cross_entropy`."""
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


def _loss_like(input: Tensor, reduction: int, out_dtype: torch.dtype | None) -> Tensor:
    shape = _position_shape(input) if reduction == 0 else ()
    return input.new_empty(shape, dtype=out_dtype or input.dtype)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics_like(input: Tensor) -> tuple[Tensor, Tensor]:
    positions = 1
    for size in _position_shape(input):
        positions *= size
    row_max, row_sum = (input.new_empty((positions,), dtype=_accumulate(input.dtype)) for _ in range(2))
    return row_max, row_sum


def _position_shape(input: Tensor) -> tuple[int, ...]:
    return () if input.dim() == 1 else (input.shape[0], *input.shape[2:])


@torch.library.register_fake("mbperf::cross_entropy_forward")
def _(input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, *, weight=None):
    return _loss_like(input, reduction, out_dtype)


@torch.library.register_fake("mbperf::cross_entropy_forward_gradient")
def _(input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, *, weight=None):
    grad = torch.empty_like(input, memory_format=torch.contiguous_format)
    return _loss_like(input, reduction, out_dtype), grad


@torch.library.register_fake("mbperf::cross_entropy_forward_gradient_")
def _(input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, *, weight=None):
    return _loss_like(input, reduction, out_dtype)


@torch.library.register_fake("mbperf::cross_entropy_forward_softmax")
def _(input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, *, weight=None):
    return _loss_like(input, reduction, out_dtype), *_statistics_like(input)


@torch.library.register_fake("mbperf::cross_entropy_forward_softcap")
def _(
    input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, softcap, wants_gradient, *,
    weight=None,
):  # fmt: skip
    grad = input.new_empty(input.shape if wants_gradient else (0,))
    row_max, row_sum = _statistics_like(input)
    return _loss_like(input, reduction, out_dtype), grad, row_max, row_sum


@torch.library.register_fake("mbperf::cross_entropy_backward_softcap")
def _(
    grad_loss, input, target, row_max, row_sum, reduction, ignore_index, label_smoothing, z_loss, softcap, *,
    weight=None,
):  # fmt: skip
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("mbperf::cross_entropy_backward")
def _(
    grad_loss,
    input,
    target,
    row_max,
    row_sum,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    *,
    weight=None,
):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("mbperf::cross_entropy_scale_gradient_")
def _(grad_input, grad_loss, target, ignore_index):
    return None


@torch.library.register_fake("mbperf::cross_entropy_rescale_gradient_")
def _(grad_input, grad_loss, input, target, reduction, ignore_index, label_smoothing, z_loss, *, weight=None):
    return None
