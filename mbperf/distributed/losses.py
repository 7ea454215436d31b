"""Cross entropy over classes that are spread over the ranks of a process group: the public functions."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mbperf.distributed.checks import (
    check_dtypes,
    check_layer,
    check_out_dtype,
    check_rows,
    check_shapes,
    name_and_size,
)
from mbperf.distributed.passes import REDUCTIONS
from mbperf.extension import _C  # noqa: F401  the operators of one process

_ops = torch.ops.mbperf


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of logits whose classes are spread over ranks, with one collective.

    Equivalent to `mbperf.cross_entropy` of all ranks' logits side by side, in the order of ranks. Forward
    gathers three numbers a row from every rank (four with `label_smoothing`); backward computes the
    probabilities again and sends nothing. Every rank has to call it, with the same targets and settings.
    Differentiable once.

    Args:
        local_logits: of this rank's classes, shape (C_r), (N, C_r) or (N, C_r, d1, ...); float32, float64,
            bfloat16 or float16. C_r may differ between ranks, and be 0.
        target: class indices among all classes, int64, of the shape of `local_logits` without C_r; the same
            on every rank.
        group: the ranks that share the classes; all by default.
        reduction: "none", "mean" or "sum".
        ignore_index: class index whose positions count for nothing.
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1].
        z_loss: adds z_loss * logsumexp(logits)**2 to the loss of each position.
        return_lse: also return logsumexp(logits) over all classes, differentiable; 0 where ignored.
        out_dtype: dtype of the loss; the dtype of `local_logits` by default.

    Returns:
        The loss, the same bits on every rank: a scalar, or with "none" a tensor of the shape of `target`.
        With `return_lse` the pair (loss, lse), lse of that shape in the accumulation dtype.

    Raises:
        IndexError: a target is neither a class of some rank nor `ignore_index`; on every rank.
        RuntimeError: ranks disagree in shapes, dtype, settings or targets; or one has ended or does not come
            within the group's timeout: the message has its number. On every other rank.
        ValueError, TypeError: an argument is wrong.

    Source:
        Shoeybi et al., Megatron-LM, 2019, section 3; Milakov and Gimelshein, 2018, for one pass.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> vocab_parallel_cross_entropy(logits, torch.tensor([0, 1]))
        tensor(0.3955)
        >>> dist.destroy_process_group()
    """
    name = "vocab_parallel_cross_entropy"
    _check_settings(name, reduction, label_smoothing, z_loss, out_dtype)
    check_dtypes(name, "local_logits", local_logits, target)
    logits, index = (
        (local_logits[None], target.reshape(1)) if local_logits.dim() == 1 else (local_logits, target)
    )
    check_shapes(name, logits, index)
    if out_dtype is None and torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
        out_dtype = torch.float32  # where torch has its losses under autocast
    loss, lse = _Loss.apply(
        logits, None, None, index.long(), *name_and_size(name, group), REDUCTIONS[reduction], ignore_index,
        float(label_smoothing), float(z_loss), out_dtype, -1, False, return_lse,
    )  # fmt: skip
    if local_logits.dim() == 1:
        loss, lse = loss.reshape(()), lse.reshape(())
    return (loss, lse) if return_lse else loss


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    local_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of a linear layer whose classes are spread over ranks, without the logits.

    Equivalent to `vocab_parallel_cross_entropy(linear(input, local_weight, local_bias), target, ...)` behind
    an input that all ranks share: its gradient is summed over ranks, by one all-reduce that runs while the
    last chunk of the weight's gradient is computed. Logits exist a chunk of rows at a time, once in forward
    and once more in backward: four matrix products in all.

    Args:
        input: hidden states, shape (N, H), the same on every rank; with `sequence_parallel` this rank's rows,
            equally many on each.
        local_weight: of this rank's classes, shape (C_r, H), dtype of `input`.
        target: class indices among all classes, int64, shape (N), for all rows; the same on every rank.
        group: the ranks that share the classes; all by default.
        local_bias: shape (C_r), dtype of `input`.
        reduction, ignore_index, label_smoothing, z_loss, return_lse, out_dtype: as for
            `vocab_parallel_cross_entropy`.
        memory_budget: bytes for a chunk of logits, of which backward holds two; less than a row is a row. By
            default a chunk has 512 rows (1,024 in half precision), or 64 MB where that is more.
        sequence_parallel: gather the rows of `input` first, and hand each rank the gradient of its own rows
            (a reduce-scatter in place of the all-reduce).

    Returns:
        As `vocab_parallel_cross_entropy`.

    Raises:
        As `vocab_parallel_cross_entropy`.

    Source:
        Liger Kernel, fused linear cross entropy, 2024, for the chunks; Korthikanti et al., 2022, for sequence
        parallelism.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> vocab_parallel_linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
        tensor(0.3955)
        >>> dist.destroy_process_group()
    """
    name = "vocab_parallel_linear_cross_entropy"
    _check_settings(name, reduction, label_smoothing, z_loss, out_dtype)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        input, local_weight = input.to(lower), local_weight.to(lower)
        local_bias = None if local_bias is None else local_bias.to(lower)
        out_dtype = out_dtype or torch.float32
    check_dtypes(name, "input", input, target)
    check_layer(name, input, local_weight, local_bias)
    check_rows(name, input, target, dist.get_world_size(group) if sequence_parallel else 1, memory_budget)
    loss, lse = _Loss.apply(
        input, local_weight, local_bias, target.long(), *name_and_size(name, group), REDUCTIONS[reduction],
        ignore_index, float(label_smoothing), float(z_loss), out_dtype,
        -1 if memory_budget is None else memory_budget, sequence_parallel, return_lse,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        group: str,
        ranks: int,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        *rest, scatter, wants_lse = settings
        c10d = torch.ops._c10d_functional
        if scatter:
            input = c10d.wait_tensor(c10d.all_gather_into_tensor(input.contiguous(), ranks, group))
        call = (input, target, weight, bias, group, *rest)
        message = _ops.vocab_parallel_message(*call)
        gathered = c10d.all_gather_into_tensor(message, ranks, group)
        loss, lse, row_max, row_sum, shard = _ops.vocab_parallel_loss(gathered, message, *call)
        ctx.save_for_backward(input, weight, bias, target, row_max, row_sum, shard)
        ctx.settings, ctx.scatter = (group, *rest), scatter
        ctx.set_materialize_grads(False)
        if not wants_lse:
            ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable would give a second derivative of zero where the upstream gradient is constant.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "vocab_parallel_cross_entropy is differentiable once: not with create_graph=True"
            )
        input, weight, bias, target, *saved = ctx.saved_tensors
        call = (input, target, weight, bias, *ctx.settings)
        rest = (None,) * 11
        if grad_loss is None and grad_lse is None:
            return None, None, None, *rest
        if weight is None:
            return _ops.vocab_parallel_backward(grad_loss, grad_lse, *saved, *call), None, None, *rest
        wanted = ctx.needs_input_grad[:3]
        gradients = _ops.vocab_parallel_linear_backward(
            grad_loss, grad_lse, *saved, *call, list(wanted), ctx.scatter
        )
        return *(
            grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)
        ), *rest


def _check_settings(
    name: str, reduction: str, label_smoothing: float, z_loss: float, out_dtype: torch.dtype | None
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{name}: z_loss must be a number >= 0, got {z_loss}")
    check_out_dtype(name, out_dtype)
