"""The operators that a loss over sharded classes is made of, for torch.compile one node each.

    message -> all_gather_into_tensor -> loss        forward
    backward                                         no collective; with a linear layer one, of grad_input

`linear_weight` is None where `input` holds logits. exchange.py says what a message is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbperf.distributed import rows
from mbperf.distributed.exchange import (
    check_targets,
    gathered_statistics,
    message_bytes,
    message_of,
    peers_of_call,
)
from mbperf.distributed.linear import Layer

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_CALL = (
    "Tensor input, Tensor target, Tensor? linear_weight, Tensor? linear_bias, str group, int reduction, "
    "int ignore_index, float label_smoothing, float z_loss, ScalarType? out_dtype, int memory_budget"
)
_library = torch.library.Library("mbperf", "FRAGMENT")
_library.define(f"vocab_parallel_message({_CALL}) -> Tensor")
_library.define(
    f"vocab_parallel_loss(Tensor gathered, Tensor message, {_CALL}) "
    "-> (Tensor loss, Tensor lse, Tensor row_max, Tensor row_sum, Tensor shard)"
)
_SAVED = "Tensor? grad_loss, Tensor? grad_lse, Tensor row_max, Tensor row_sum, Tensor shard"
_library.define(f"vocab_parallel_backward({_SAVED}, {_CALL}) -> Tensor")
_library.define(
    f"vocab_parallel_linear_backward({_SAVED}, {_CALL}, bool[3] wanted, bool scatter) "
    "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"
)


class Call(NamedTuple):
    """The arguments that all operators have."""

    input: Tensor
    target: Tensor
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    group: str
    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    out_dtype: torch.dtype | None
    memory_budget: int

    @property
    def classes(self) -> int:
        """How many classes this rank has."""
        return self.input.shape[1] if self.linear_weight is None else self.linear_weight.shape[0]

    @property
    def numbers(self) -> int:
        """How many statistics a row has."""
        return 4 if self.label_smoothing else 3

    @property
    def dtype(self) -> torch.dtype:
        """What statistics are kept in."""
        return rows.accumulation_dtype(self.input.dtype)

    def said(self) -> dict[str, Any]:
        """Return what has to be equal on all ranks."""
        linear = self.linear_weight is not None
        return {
            "function": f"vocab_parallel_{'linear_' if linear else ''}cross_entropy",
            "N": self.target.numel(),
            "dtype": str(self.input.dtype),
            "shape of target": list(self.target.shape),
            **({"H": self.input.shape[1]} if linear else {}),
            "reduction": next(name for name, code in REDUCTIONS.items() if code == self.reduction),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "out_dtype": str(self.out_dtype),
        }

    def targets(self, start: int) -> rows.Targets:
        """Return the targets as this rank sees them."""
        return rows.Targets(self.target, start, self.classes, self.ignore_index)

    def statistics(self, start: int) -> Sequence[Tensor]:
        """Return this rank's rows of a message."""
        targets = self.targets(start)
        if self.linear_weight is None:
            return rows.statistics(self.input, targets, self.numbers)
        return self.layer().statistics(rows.statistics, targets, self.numbers)

    def layer(self) -> Layer:
        """Return the linear layer in front of the loss."""
        assert self.linear_weight is not None
        return Layer(self.input, self.linear_weight, self.linear_bias, self.memory_budget)


def message(*args: Any) -> Tensor:
    """Return what this rank tells the others, shape (bytes,)."""
    return message_of(Call(*args))


def loss(gathered: Tensor, message: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return loss, lse, the softmax's row_max and row_sum, and (start, classes of all ranks)."""
    call = Call(*args)
    statistics, classes, shard = gathered_statistics(call, gathered)
    whole = rows.combined(statistics, classes)
    return *_reduced(call, whole, sum(classes)), whole.row_max, whole.row_sum, shard


def _reduced(call: Call, whole: rows.Combined, classes: int) -> tuple[Tensor, Tensor]:
    ignored = (call.target == call.ignore_index).flatten()
    lse = whole.lse().masked_fill_(ignored, 0.0)
    each = whole.losses(call.label_smoothing, classes)
    if call.z_loss:
        each = each + call.z_loss * lse.square()
    each = each.masked_fill_(ignored, 0.0)
    dtype = call.out_dtype or call.input.dtype
    lse = lse.view(call.target.shape)
    if call.reduction == 0:
        return each.view(call.target.shape).to(dtype), lse
    total = _sum(each)
    return (total / (~ignored).sum() if call.reduction == 1 else total).to(dtype), lse


def _sum(each: Tensor, step: int = 8192) -> Tensor:
    """The sum in float64, in steps that do not depend on the number of threads."""
    whole = each.numel() // step * step
    rest = each[whole:].sum(dtype=torch.float64)
    return each[:whole].view(-1, step).sum(1, dtype=torch.float64).sum() + rest if whole else rest


def _softmax(
    call: Call, grad_loss: Tensor | None, grad_lse: Tensor | None, m: Tensor, s: Tensor
) -> rows.Softmax:
    if grad_loss is None:
        each = m.new_zeros(())
    else:
        each = grad_loss.to(call.dtype)
        each = each.flatten() if call.reduction == 0 else each.reshape(())
        if call.reduction == 1:
            each = each / (call.target != call.ignore_index).sum()
    return rows.Softmax(m, s, each, None if grad_lse is None else grad_lse.to(call.dtype).flatten())


def backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    shard: Tensor,
    *args: Any,
) -> Tensor:
    """Return the gradient of this rank's logits."""
    call = Call(*args)
    start, classes = shard.tolist()
    check_targets(call, classes)
    softmax = _softmax(call, grad_loss, grad_lse, row_max, row_sum)
    targets = call.targets(start)
    return rows.gradient(call.input, targets, softmax, classes, call.label_smoothing, call.z_loss)


def linear_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    shard: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input (summed over ranks), the weight and the bias that are wanted."""
    *rest, wanted, scatter = args
    call = Call(*rest)
    start, classes = shard.tolist()
    check_targets(call, classes)
    softmax = _softmax(call, grad_loss, grad_lse, row_max, row_sum)

    def gradient(logits: Tensor, targets: rows.Targets, its: rows.Softmax) -> Tensor:
        return rows.gradient(logits, targets, its, classes, call.label_smoothing, call.z_loss)

    return call.layer().gradients(
        gradient, call.targets(start), softmax, peers_of_call(call), call.group, call.said(), wanted, scatter
    )


for _name, _function in {
    "vocab_parallel_message": message,
    "vocab_parallel_loss": loss,
    "vocab_parallel_backward": backward,
    "vocab_parallel_linear_backward": linear_backward,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("mbperf::vocab_parallel_message")
def _(*args):
    call = Call(*args)
    return call.input.new_empty((message_bytes(call),), dtype=torch.uint8)


@torch.library.register_fake("mbperf::vocab_parallel_loss")
def _(gathered, message, *args):
    call = Call(*args)
    shape = call.target.shape if call.reduction == 0 else ()
    row_max, row_sum = (call.input.new_empty((call.target.numel(),), dtype=call.dtype) for _ in range(2))
    shard = torch.empty((2,), dtype=torch.int64, device="cpu")
    lse = call.input.new_empty(call.target.shape, dtype=call.dtype)
    return call.input.new_empty(shape, dtype=call.out_dtype or call.input.dtype), lse, row_max, row_sum, shard


@torch.library.register_fake("mbperf::vocab_parallel_backward")
def _(grad_loss, grad_lse, row_max, row_sum, shard, *args):
    return torch.empty_like(Call(*args).input, memory_format=torch.contiguous_format)


@torch.library.register_fake("mbperf::vocab_parallel_linear_backward")
def _(grad_loss, grad_lse, row_max, row_sum, shard, *args):
    *rest, wanted, scatter = args
    call = Call(*rest)
    return call.layer().empty_gradients(wanted, peers_of_call(call).size if scatter else 1)
