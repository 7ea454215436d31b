"""Log-probabilities of tokens and entropies of rows: the public function and the shapes of its operators."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C

_functorch_active = torch._C._are_functorch_transforms_active


@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
) -> Tensor: ...
@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target and, if asked for, the entropy of each row, in one pass over the logits.

    Equivalent to `log_softmax(logits / temperature, 1).gather(1, target)` and `-(p * p.log()).sum(1)` with
    p = softmax(logits / temperature, 1), except that

    - the logits are read once, and once more for both gradients together; beside them and their gradient only
      two or three numbers a row are kept;
    - sums are in float32 (float64 for float64 logits) whatever the dtype of the logits, and so is the result;
    - 0 log 0 is 0: a logit of -inf adds nothing to an entropy, and its gradient is 0;
    - a position whose target is `ignore_index` is never read: its log-probability, its entropy and its
      gradient are 0;
    - double backward, forward mode and functorch transforms are served by torch's own operators.

    Args:
        logits: shape (C), (N, C) or (N, C, d1, ...), in any memory layout; float32, float64, bfloat16 or
            float16.
        target: class indices, int64 (or uint8 for 1-D and 2-D logits), of the shape of `logits` without C.
        temperature: divides the logits, without a copy of them; from 1e-30 to 1e30.
        return_entropy: also return the entropy of each row, in nats.
        ignore_index: class index whose positions count for nothing.
        out_dtype: dtype of the result; by default float32, or float64 for float64 logits.

    Returns:
        log p(target), of the shape of `target`; with `return_entropy` the pair (log_probs, entropy), both of
        that shape. Both are differentiable.

    Raises:
        IndexError: a target is neither in [0, C) nor `ignore_index`, also when it was changed between
            forward and backward.
        TypeError: `logits` or `out_dtype` is of a dtype that is not named above.
        ValueError: `target` does not fit `logits`, or `temperature` is out of its range.

    Source:
        The sums are those of Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, beside
        sum of exp(z) z, as in the fused losses of Liger Kernel and verl.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> log_probs, entropy = token_log_probs(logits, torch.tensor([0, 1]), return_entropy=True)
        >>> log_probs, entropy
        (tensor([-0.2395, -1.0986]), tensor([0.6656, 1.0986]))
    """
    if has_torch_function_variadic(logits, target):
        return handle_torch_function(
            token_log_probs, (logits, target), logits, target, temperature=temperature,
            return_entropy=return_entropy, ignore_index=ignore_index, out_dtype=out_dtype,
        )  # fmt: skip
    if out_dtype is None and not torch.compiler.is_compiling() and not _functorch_active():
        entry = _C.token_log_probs_with_entropy if return_entropy else _C.token_log_probs
        try:
            return entry(logits, target, temperature, ignore_index)
        except TypeError:  # of pybind11, or of a dtype: the operator's error names the argument
            pass
    ops = torch.ops.mbperf
    op = ops.token_log_probs_with_entropy if return_entropy else ops.token_log_probs
    return op(logits, target, temperature=temperature, ignore_index=ignore_index, out_dtype=out_dtype)


@torch.library.register_fake("mbperf::token_log_probs_forward")
def _(logits, target, temperature, ignore_index, out_dtype, wants_entropy):
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dtype = out_dtype or accumulate
    log_probs = logits.new_empty(target.shape, dtype=dtype)
    entropy = logits.new_empty(target.shape if wants_entropy else (0,), dtype=dtype)
    statistics = (3 if wants_entropy else 2, target.numel())
    return log_probs, entropy, logits.new_empty(statistics, dtype=accumulate)


@torch.library.register_fake("mbperf::token_log_probs_backward")
def _(
    logits, target, row_statistics, temperature, ignore_index, *, grad_log_probs=None, grad_entropy=None
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("mbperf::token_log_probs_backward_")
def _(
    logits, target, row_statistics, temperature, ignore_index, *, grad_log_probs=None, grad_entropy=None
):  # fmt: skip
    return None
