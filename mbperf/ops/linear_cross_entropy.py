"""Linear + cross entropy without the logits: the public function, its module, the shapes of its operators."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import _reduction as legacy
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_functorch_active = torch._C._are_functorch_transforms_active


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: Literal[True],
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of a linear layer's output that never holds more than a chunk of the logits.

    Equivalent to `torch.nn.functional.linear_cross_entropy` of torch 2.13, whose signature it has, and to
    `cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, except that

    - with "mean" and "sum" the gradients are taken in the forward pass, a chunk of rows at a time: three
      matrix products in all. With "none", `return_lse` and float16 backward computes the logits again, four;
    - on a CPU rows whose target is `ignore_index` are left out of the products, and never read;
    - the loss is accumulated in float32 (float64 for float64) whatever the dtype of `input`, and so is the
      gradient of a bfloat16 or float16 `linear_weight` over chunks: it is rounded once at the end;
    - probabilities that require grad, double backward, forward mode and functorch transforms are served by
      torch's own operators, which hold all logits.

    Args:
        input: hidden states, shape (H) or (N, H); float32, float64, bfloat16 or float16.
        linear_weight: shape (V, H), or (V, d1, ..., H) for a K-dimensional loss; dtype of `input`.
        target: class indices, int64, of shape (), (N) or (N, d1, ...); or probabilities, dtype of `input`, of
            shape (V), (N, V) or (N, V, d1, ...).
        linear_bias: shape (V) or (V, d1, ...), dtype of `input`.
        weight: one weight a class, shape (V), dtype of `input`.
        reduction: "none", "mean" (over the weights of the targets) or "sum".
        ignore_index: class index whose positions count for nothing; -100 by default.
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1].
        options: `torch.nn.LinearCrossEntropyOptions`; its rows per chunk are obeyed. What it says of accuracy
            and of `retain_graph` needs no choice here: sums are in float32, any number of backwards is right.
        z_loss: adds z_loss * logsumexp(logits)**2 to the loss of each position; `mean` divides this part by
            the number of positions that are not ignored.
        softcap: replaces the logits by softcap * tanh(logits / softcap).
        return_lse: also return logsumexp(logits) over the classes, differentiable; 0 where ignored.
        out_dtype: dtype of the loss; the dtype of `input` by default.
        memory_budget: bytes for a chunk of logits (two chunks with `softcap`); less than a row is a row. By
            default a chunk has 512 rows (1,024 in half precision), or 64 MB where that is more.

    Returns:
        The loss: a scalar, or with "none" a tensor of the shape of class-index targets. With `return_lse`
        the pair (loss, lse), lse of that shape in the accumulation dtype.

    Raises:
        IndexError: a target is neither in [0, V) nor `ignore_index`, also when it was changed between
            forward and backward.
        RuntimeError, ValueError: what `F.linear_cross_entropy` raises for the same arguments.

    Source:
        Liger Kernel, fused linear cross entropy, 2024: gradients in the forward pass, chunk by chunk.

    Example:
        >>> hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
        tensor(0.3955)
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy, (input, linear_weight, target, linear_bias, weight),
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options, z_loss=z_loss,
            softcap=softcap, return_lse=return_lse, out_dtype=out_dtype, memory_budget=memory_budget,
        )  # fmt: skip
    code = _REDUCTIONS.get(reduction)
    if code is None:  # the old name of "mean", or torch's error
        code = legacy.get_enum(reduction)
    plain = options is None and out_dtype is None and z_loss == 0.0 and softcap is None and not return_lse
    if plain and memory_budget is None and not torch.compiler.is_compiling() and not _functorch_active():
        return _C.linear_cross_entropy(
            input, linear_weight, target, linear_bias, weight, code, ignore_index, label_smoothing
        )
    rows = None if options is None else _rows_of(options, input, linear_weight)
    ops = torch.ops.mbperf
    op = ops.linear_cross_entropy_with_lse if return_lse else ops.linear_cross_entropy
    return op(
        input, linear_weight, target, linear_bias, weight, code, ignore_index, label_smoothing,
        out_dtype=out_dtype, z_loss=z_loss, softcap=softcap, chunk_rows=rows, memory_budget=memory_budget,
    )  # fmt: skip


def _rows_of(options: Any, input: Tensor, linear_weight: Tensor) -> int:
    rows = input.shape[0] if input.dim() == 2 else 1
    adjusted = options._adjust(
        num_batches=rows, in_features=max(input.shape[-1], 1), num_classes=linear_weight.shape[0],
        dtype=input.dtype, device=input.device,
    )  # fmt: skip
    return max(int(adjusted.batch_chunk_size), 1)


class LinearCrossEntropyLoss(_WeightedLoss):
    """A linear layer and the criterion of `linear_cross_entropy` in one.

    Equivalent to `torch.nn.LinearCrossEntropyLoss`, whose arguments, parameters and state dict it has.

    Args:
        in_features: H.
        num_classes: V.
        out_features: (d1, ...) of a K-dimensional loss.
        bias, device, dtype: as for `torch.nn.Linear`.
        reduction, weight, ignore_index, label_smoothing, options, z_loss, softcap, memory_budget: as for
            `linear_cross_entropy`.

    Raises:
        RuntimeError: `weight` has not one element a class, or `label_smoothing` is not in [0, 1].

    Example:
        >>> criterion = LinearCrossEntropyLoss(8, 4)
        >>> criterion(torch.zeros(1, 8), torch.tensor([3])).detach()
        tensor(1.3863)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.z_loss, self.softcap, self.memory_budget = z_loss, softcap, memory_budget
        # torch.nn.Linear has two-dimensional weights alone: forward shapes them.
        columns = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, columns, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of hidden states `input` against `target`, shapes as for `linear_cross_entropy`."""
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input, self.linear.weight.reshape(*shape, self.linear.in_features), target,
            linear_bias=None if bias is None else bias.reshape(shape), weight=self.weight,
            reduction=self.reduction, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            options=self.options, z_loss=self.z_loss, softcap=self.softcap, memory_budget=self.memory_budget,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the arguments that differ from `torch.nn.Linear`'s, as torch's module does."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _positions(input: Tensor, linear_weight: Tensor) -> tuple[int, ...]:
    return (input.shape[0], *linear_weight.shape[1:-1])


def _gradients(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, wanted: list[bool]):
    likes = (input, linear_weight, linear_bias)
    return tuple(
        input.new_empty(like.shape if want and like is not None else (0,))
        for like, want in zip(likes, wanted, strict=True)
    )


@torch.library.register_fake("mbperf::linear_cross_entropy_forward")
def _(
    input, linear_weight, target, reduction, ignore_index, label_smoothing, z_loss, softcap, chunk_rows,
    memory_budget, out_dtype, wants_lse, *, linear_bias=None, weight=None,
):  # fmt: skip
    positions = _positions(input, linear_weight)
    loss = input.new_empty(positions if reduction == 0 else (), dtype=out_dtype or input.dtype)
    return loss, input.new_empty(positions if wants_lse else (0,), dtype=_accumulate(input.dtype))


@torch.library.register_fake("mbperf::linear_cross_entropy_forward_gradient")
def _(
    input, linear_weight, target, reduction, ignore_index, label_smoothing, z_loss, softcap, chunk_rows,
    memory_budget, out_dtype, wanted, *, linear_bias=None, weight=None,
):  # fmt: skip
    loss = input.new_empty((), dtype=out_dtype or input.dtype)
    return loss, *_gradients(input, linear_weight, linear_bias, wanted)


@torch.library.register_fake("mbperf::linear_cross_entropy_backward")
def _(
    input, linear_weight, target, reduction, ignore_index, label_smoothing, z_loss, softcap, chunk_rows,
    memory_budget, wanted, *, grad_loss=None, grad_lse=None, linear_bias=None, weight=None,
):  # fmt: skip
    return _gradients(input, linear_weight, linear_bias, wanted)


@torch.library.register_fake("mbperf::linear_cross_entropy_scale_gradients_")
def _(gradients, grad_loss, target, soft, classes, ignore_index):
    return None
