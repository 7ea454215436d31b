"""Cross entropy beside what monitoring reads off the same logits: the public function and its fake kernel."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as legacy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C
from mbperf.ops.cross_entropy import (
    _REDUCTIONS,
    _accumulate,
    _is_dtensor,
    _loss_like,
    _position_shape,
    _statistics_like,
)

_functorch_active = torch._C._are_functorch_transforms_active


class LossAndStats(NamedTuple):
    """A loss, and per position the entropy, the predicted class and that class's probability.

    >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    >>> cross_entropy_with_stats(logits, target).predicted
    tensor([0, 1])
    """

    loss: Tensor
    entropy: Tensor
    predicted: Tensor
    probability: Tensor


def cross_entropy_with_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> LossAndStats:
    """Cross entropy, and the entropy, predicted class and its probability of each row, in one pass.

    Equivalent to `cross_entropy`, whose loss and gradient it has, beside `-(p * p.log()).sum(1)`,
    `input.argmax(1)` and `p.amax(1)` with p = softmax(input, 1), except that

    - the logits are read once for all of them;
    - only the loss is differentiable;
    - statistics are in float32 (float64 for float64 logits) whatever the dtype of the logits;
    - 0 log 0 is 0: a logit of -inf adds nothing to an entropy.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ...), in any memory layout; float32, float64, bfloat16
            or float16.
        target: class indices, or probabilities, as for `cross_entropy`.
        weight, ignore_index, reduction, label_smoothing, out_dtype, z_loss: as for `cross_entropy`.
        softcap: as for `cross_entropy`; statistics are those of the logits that it leaves.

    Returns:
        LossAndStats: the named tuple (loss, entropy, predicted, probability). The loss is that of
        `cross_entropy`; the others have the shape of class-index targets: the entropy in nats, the class
        with the largest logit as `torch.argmax` has it (the first of equal ones, or the first NaN; int64),
        and the probability of that class. Where the target is `ignore_index` they are 0, -1 and 0.

    Raises:
        NotImplementedError: `input` is a DTensor.
        IndexError, RuntimeError, ValueError: what `cross_entropy` raises for the same arguments.

    Example:
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 1])
        >>> loss, entropy, predicted, probability = cross_entropy_with_stats(logits, target)
        >>> entropy, probability
        (tensor([0.6656, 1.0986]), tensor([0.7870, 0.3333]))
        >>> accuracy = (predicted == target).float().mean()
        >>> accuracy
        tensor(0.5000)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy_with_stats, (input, target, weight), input, target, weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            out_dtype=out_dtype, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    if type(input) is not Tensor and _is_dtensor(input):
        raise NotImplementedError(
            "cross_entropy_with_stats: input must not be a DTensor; pass its local part"
        )
    code = _REDUCTIONS.get(reduction)
    if code is None:  # the old name of "mean", or torch's error
        code = legacy.get_enum(reduction)
    plain = out_dtype is None and z_loss == 0.0 and softcap is None
    if plain and not torch.compiler.is_compiling() and not _functorch_active():
        try:
            return LossAndStats(
                *_C.cross_entropy_with_stats(input, target, weight, code, ignore_index, label_smoothing)
            )
        except TypeError:  # not tensors: torch says so by the names of its own arguments
            torch._C._nn.cross_entropy_loss(
                input, target, weight, code, ignore_index, label_smoothing,  # type: ignore[arg-type]
            )  # fmt: skip
    op = torch.ops.mbperf.cross_entropy_with_stats
    results = op(
        input, target, weight, code, ignore_index, label_smoothing, out_dtype=out_dtype, z_loss=z_loss,
        softcap=softcap,
    )  # fmt: skip
    return LossAndStats(*results)


@torch.library.register_fake("mbperf::cross_entropy_forward_stats")
def _(
    input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss, softcap, wants_gradient, *,
    weight=None,
):  # fmt: skip
    grad = input.new_empty(input.shape if wants_gradient else (0,))
    shape = _position_shape(input)
    entropy, probability = (input.new_empty(shape, dtype=_accumulate(input.dtype)) for _ in range(2))
    predicted = input.new_empty(shape, dtype=torch.int64)
    loss = _loss_like(input, reduction, out_dtype)
    return loss, grad, *_statistics_like(input), entropy, predicted, probability
