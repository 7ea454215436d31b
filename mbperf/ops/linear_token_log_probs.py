"""Log-probabilities of tokens straight from hidden states: the public function, its operators' shapes."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C  # noqa: F401  the operators


@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor: ...
@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target and, if asked for, the entropy of each row, from hidden states.

    Equivalent to `token_log_probs(linear(input, linear_weight, linear_bias), target, ...)`, except that

    - the logits never exist beyond a chunk of rows;
    - backward computes them again, since the upstream gradients, one a position, are not known in forward:
      four matrix products in all where the logits would be kept for three. One backward serves the gradients
      of both results;
    - on a CPU rows whose target is `ignore_index` are left out of the products, and never read;
    - the gradient of a bfloat16 or float16 `linear_weight` is summed in float32 over chunks and rounded once;
    - double backward, forward mode and functorch transforms are served by torch's own operators, which hold
      all logits.

    Args:
        input: hidden states, shape (..., H); float32, float64, bfloat16 or float16.
        linear_weight: shape (V, H), dtype of `input`.
        target: class indices, int64 (or uint8), of the shape of `input` without H.
        linear_bias: shape (V), dtype of `input`.
        temperature: divides the logits; from 1e-30 to 1e30.
        return_entropy: also return the entropy of each row, in nats.
        ignore_index: class index whose positions count for nothing.
        out_dtype: dtype of the result; by default float32, or float64 for float64 `input`.
        memory_budget: bytes for a chunk of logits; less than a row is a row. By default a chunk has 512 rows
            (1,024 in half precision), or 64 MB where that is more.

    Returns:
        log p(target), of the shape of `target`; with `return_entropy` the pair (log_probs, entropy), both of
        that shape. Both are differentiable.

    Raises:
        IndexError: a target is neither in [0, V) nor `ignore_index`, also when it was changed between
            forward and backward.
        TypeError: a dtype is not one of those named above.
        ValueError: a shape does not fit `input`, or `temperature` or `memory_budget` is out of its range.

    Source:
        verl and Liger Kernel have it for Hopper GPUs; the chunks are those of `linear_cross_entropy`.

    Example:
        >>> hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> linear_token_log_probs(hidden, head, torch.tensor([0, 1]), return_entropy=True)
        (tensor([-0.2395, -1.0986]), tensor([0.6656, 1.0986]))
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias):
        return handle_torch_function(
            linear_token_log_probs, (input, linear_weight, target, linear_bias),
            input, linear_weight, target, linear_bias=linear_bias, temperature=temperature,
            return_entropy=return_entropy, ignore_index=ignore_index, out_dtype=out_dtype,
            memory_budget=memory_budget,
        )  # fmt: skip
    ops = torch.ops.mbperf
    op = ops.linear_token_log_probs_with_entropy if return_entropy else ops.linear_token_log_probs
    return op(
        input, linear_weight, target, linear_bias, temperature=temperature, ignore_index=ignore_index,
        out_dtype=out_dtype, memory_budget=memory_budget,
    )  # fmt: skip


@torch.library.register_fake("mbperf::linear_token_log_probs_forward")
def _(
    input, linear_weight, target, temperature, ignore_index, memory_budget, out_dtype, wants_entropy, *,
    linear_bias=None,
):  # fmt: skip
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows, dtype = input.shape[0], out_dtype or accumulate
    log_probs = input.new_empty((rows,), dtype=dtype)
    entropy = input.new_empty((rows if wants_entropy else 0,), dtype=dtype)
    return log_probs, entropy, input.new_empty((3 if wants_entropy else 2, rows), dtype=accumulate)


@torch.library.register_fake("mbperf::linear_token_log_probs_backward")
def _(
    input, linear_weight, target, row_statistics, temperature, ignore_index, memory_budget, wanted, *,
    grad_log_probs=None, grad_entropy=None, linear_bias=None,
):  # fmt: skip
    likes = (input, linear_weight, linear_bias)
    return tuple(
        input.new_empty(like.shape if want and like is not None else (0,))
        for like, want in zip(likes, wanted, strict=True)
    )
