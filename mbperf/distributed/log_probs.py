"""Log-probabilities of tokens over classes that are spread over ranks: the public functions."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mbperf.distributed import token_passes  # noqa: F401  the operators
from mbperf.distributed.checks import (
    check_dtypes,
    check_layer,
    check_out_dtype,
    check_rows,
    check_shapes,
    name_and_size,
)
from mbperf.extension import _C  # noqa: F401  the operators of one process

_ops = torch.ops.mbperf


def vocab_parallel_token_log_probs(
    local_logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of each row, classes spread over ranks, one collective.

    Equivalent to `mbperf.token_log_probs` of all ranks' logits side by side, in the order of ranks. Forward
    gathers three numbers a row from every rank, four with entropies; backward sends nothing. Every rank has
    to call it, with the same targets and settings. Differentiable once.

    Args:
        local_logits: of this rank's classes, shape (C_r), (N, C_r) or (N, C_r, d1, ...); float32, float64,
            bfloat16 or float16. C_r may differ between ranks, and be 0.
        target: class indices among all classes, int64, of the shape of `local_logits` without C_r; the same
            on every rank.
        group: the ranks that share the classes; all by default.
        temperature, return_entropy, ignore_index, out_dtype: as for `mbperf.token_log_probs`.

    Returns:
        log p(target), the same bits on every rank, of the shape of `target`; with `return_entropy` the pair
        (log_probs, entropy), both of that shape. Both are differentiable.

    Raises:
        IndexError: a target is neither a class of some rank nor `ignore_index`; on every rank.
        RuntimeError: ranks disagree in shapes, dtype, settings or targets; or one has ended or does not come
            within the group's timeout: the message has its number. On every other rank.
        ValueError, TypeError: an argument is wrong.

    Source:
        Shoeybi et al., Megatron-LM, 2019, section 3; the sums of the entropy are those of
        `mbperf.token_log_probs`.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> vocab_parallel_token_log_probs(logits, torch.tensor([0, 1]), return_entropy=True)
        (tensor([-0.2395, -1.0986]), tensor([0.6656, 1.0986]))
        >>> dist.destroy_process_group()
    """
    name = "vocab_parallel_token_log_probs"
    _check_settings(name, temperature, out_dtype)
    check_dtypes(name, "local_logits", local_logits, target)
    logits, index = (
        (local_logits[None], target.reshape(1)) if local_logits.dim() == 1 else (local_logits, target)
    )
    check_shapes(name, logits, index)
    log_probs, entropy = _LogProbs.apply(
        logits, None, None, index.long(), *name_and_size(name, group), float(temperature), ignore_index,
        out_dtype, return_entropy, -1, False,
    )  # fmt: skip
    if local_logits.dim() == 1:
        log_probs, entropy = log_probs.reshape(()), entropy.reshape(() if return_entropy else (0,))
    return (log_probs, entropy) if return_entropy else log_probs


def vocab_parallel_linear_token_log_probs(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    local_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a linear layer whose classes are spread over ranks, no logits held.

    Equivalent to `vocab_parallel_token_log_probs(linear(input, local_weight, local_bias), target, ...)`
    behind an input that all ranks share: its gradient is summed over ranks. Logits exist a chunk of rows at a
    time, once in forward and once more in backward: four matrix products in all.

    Args:
        input: hidden states, shape (N, H), the same on every rank; with `sequence_parallel` this rank's rows,
            equally many on each.
        local_weight: of this rank's classes, shape (C_r, H), dtype of `input`.
        target: class indices among all classes, int64, shape (N), for all rows; the same on every rank.
        group: the ranks that share the classes; all by default.
        local_bias: shape (C_r), dtype of `input`.
        temperature, return_entropy, ignore_index, out_dtype: as for `mbperf.token_log_probs`.
        memory_budget, sequence_parallel: as for `vocab_parallel_linear_cross_entropy`.

    Returns:
        As `vocab_parallel_token_log_probs`, of shape (N).

    Raises:
        As `vocab_parallel_token_log_probs`.

    Source:
        The chunks and the collectives are those of `vocab_parallel_linear_cross_entropy`.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> vocab_parallel_linear_token_log_probs(hidden, head, torch.tensor([0, 1]))
        tensor([-0.2395, -1.0986])
        >>> dist.destroy_process_group()
    """
    name = "vocab_parallel_linear_token_log_probs"
    _check_settings(name, temperature, out_dtype)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        input, local_weight = input.to(lower), local_weight.to(lower)
        local_bias = None if local_bias is None else local_bias.to(lower)
    check_dtypes(name, "input", input, target)
    check_layer(name, input, local_weight, local_bias)
    check_rows(name, input, target, dist.get_world_size(group) if sequence_parallel else 1, memory_budget)
    log_probs, entropy = _LogProbs.apply(
        input, local_weight, local_bias, target.long(), *name_and_size(name, group), float(temperature),
        ignore_index, out_dtype, return_entropy, -1 if memory_budget is None else memory_budget,
        sequence_parallel,
    )  # fmt: skip
    return (log_probs, entropy) if return_entropy else log_probs


class _LogProbs(torch.autograd.Function):
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
        *rest, wants_entropy, budget, scatter = settings
        c10d = torch.ops._c10d_functional
        if scatter:
            input = c10d.wait_tensor(c10d.all_gather_into_tensor(input.contiguous(), ranks, group))
        of_call = (group, *rest, wants_entropy, budget)
        call = (input, target, weight, bias, *of_call)
        message = _ops.vocab_parallel_token_message(*call)
        gathered = c10d.all_gather_into_tensor(message, ranks, group)
        log_probs, entropy, statistics, shard = _ops.vocab_parallel_token_log_probs(gathered, message, *call)
        ctx.save_for_backward(input, weight, bias, target, statistics, shard)
        ctx.of_call, ctx.scatter = of_call, scatter
        ctx.set_materialize_grads(False)
        if not wants_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # once_differentiable would give a second derivative of zero where the upstream gradient is constant.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "vocab_parallel_token_log_probs is differentiable once: not with create_graph=True"
            )
        input, weight, bias, target, *saved = ctx.saved_tensors
        call = (input, target, weight, bias, *ctx.of_call)
        rest = (None,) * 9
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, *rest
        if weight is None:
            grad = _ops.vocab_parallel_token_backward(grad_log_probs, grad_entropy, *saved, *call)
            return grad, None, None, *rest
        wanted = ctx.needs_input_grad[:3]
        gradients = _ops.vocab_parallel_linear_token_backward(
            grad_log_probs, grad_entropy, *saved, *call, list(wanted), ctx.scatter
        )
        return *(
            grad if is_wanted else None for grad, is_wanted in zip(gradients, wanted, strict=True)
        ), *rest


def _check_settings(name: str, temperature: float, out_dtype: torch.dtype | None) -> None:
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"{name}: temperature must be a number between 1e-30 and 1e30, got {temperature}")
    check_out_dtype(name, out_dtype)
