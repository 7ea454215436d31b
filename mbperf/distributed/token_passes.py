"""The operators that log-probabilities over sharded classes are made of, for torch.compile one node each.

    message -> all_gather_into_tensor -> log_probs   forward
    backward                                         no collective; with a linear layer one, of grad_input

`linear_weight` is None where `input` holds logits. exchange.py says what a message is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbperf.distributed import token_rows
from mbperf.distributed.exchange import (
    check_targets,
    gathered_statistics,
    message_bytes,
    message_of,
    peers_of_call,
)
from mbperf.distributed.linear import Layer
from mbperf.distributed.rows import Targets, accumulation_dtype

_CALL = (
    "Tensor input, Tensor target, Tensor? linear_weight, Tensor? linear_bias, str group, float temperature, "
    "int ignore_index, ScalarType? out_dtype, bool wants_entropy, int memory_budget"
)
_library = torch.library.Library("mbperf", "FRAGMENT")
_library.define(f"vocab_parallel_token_message({_CALL}) -> Tensor")
_library.define(
    f"vocab_parallel_token_log_probs(Tensor gathered, Tensor message, {_CALL}) "
    "-> (Tensor log_probs, Tensor entropy, Tensor row_statistics, Tensor shard)"
)
_SAVED = "Tensor? grad_log_probs, Tensor? grad_entropy, Tensor row_statistics, Tensor shard"
_library.define(f"vocab_parallel_token_backward({_SAVED}, {_CALL}) -> Tensor")
_library.define(
    f"vocab_parallel_linear_token_backward({_SAVED}, {_CALL}, bool[3] wanted, bool scatter) "
    "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"
)


class Call(NamedTuple):
    """The arguments that all operators have."""

    input: Tensor
    target: Tensor
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    group: str
    temperature: float
    ignore_index: int
    out_dtype: torch.dtype | None
    wants_entropy: bool
    memory_budget: int

    @property
    def classes(self) -> int:
        """How many classes this rank has."""
        return self.input.shape[1] if self.linear_weight is None else self.linear_weight.shape[0]

    @property
    def numbers(self) -> int:
        """How many statistics a row has."""
        return 4 if self.wants_entropy else 3

    @property
    def dtype(self) -> torch.dtype:
        """What statistics are kept in."""
        return accumulation_dtype(self.input.dtype)

    def said(self) -> dict[str, Any]:
        """Return what has to be equal on all ranks."""
        linear = self.linear_weight is not None
        return {
            "function": f"vocab_parallel_{'linear_' if linear else ''}token_log_probs",
            "N": self.target.numel(),
            "dtype": str(self.input.dtype),
            "shape of target": list(self.target.shape),
            **({"H": self.input.shape[1]} if linear else {}),
            "temperature": self.temperature,
            "return_entropy": self.wants_entropy,
            "ignore_index": self.ignore_index,
            "out_dtype": str(self.out_dtype),
        }

    def targets(self, start: int) -> Targets:
        """Return the targets as this rank sees them."""
        return Targets(self.target, start, self.classes, self.ignore_index)

    def statistics(self, start: int) -> Sequence[Tensor]:
        """Return this rank's rows of a message."""
        of = partial(token_rows.statistics, temperature=self.temperature)
        if self.linear_weight is None:
            return of(self.input, self.targets(start), self.numbers)
        return self.layer().statistics(of, self.targets(start), self.numbers)

    def layer(self) -> Layer:
        """Return the linear layer in front."""
        assert self.linear_weight is not None
        return Layer(self.input, self.linear_weight, self.linear_bias, self.memory_budget)


def message(*args: Any) -> Tensor:
    """Return what this rank tells the others, shape (bytes,)."""
    return message_of(Call(*args))


def log_probs(gathered: Tensor, message: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return log-probabilities, entropies, the rows' statistics, and (start, classes of all ranks)."""
    call = Call(*args)
    statistics, classes, shard = gathered_statistics(call, gathered)
    whole = token_rows.combined(statistics, classes, call.temperature)
    ignored = (call.target == call.ignore_index).flatten()

    def handed_out(each: Tensor) -> Tensor:
        return each.masked_fill(ignored, 0.0).view(call.target.shape).to(call.out_dtype or call.dtype)

    entropy = handed_out(whole.entropies()) if call.wants_entropy else whole.target_logit.new_empty((0,))
    return (
        handed_out(whole.log_probs(call.temperature)),
        entropy.to(call.out_dtype or call.dtype),
        whole.row_statistics,
        shard,
    )


def _known(call: Call, *saved: Tensor | None) -> token_rows.KnownRows:
    *upstream, row_statistics = saved
    assert row_statistics is not None
    flat = (None if grad is None else grad.to(call.dtype).flatten() for grad in upstream)
    return token_rows.KnownRows(row_statistics, *flat)


def backward(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    row_statistics: Tensor,
    shard: Tensor,
    *args: Any,
) -> Tensor:
    """Return the gradient of this rank's logits."""
    call = Call(*args)
    start, classes = shard.tolist()
    check_targets(call, classes)
    known = _known(call, grad_log_probs, grad_entropy, row_statistics)
    return token_rows.gradient(call.input, call.targets(start), known, call.temperature)


def linear_backward(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    row_statistics: Tensor,
    shard: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input (summed over ranks), the weight and the bias that are wanted."""
    *rest, wanted, scatter = args
    call = Call(*rest)
    start, classes = shard.tolist()
    check_targets(call, classes)
    gradient = partial(token_rows.gradient, temperature=call.temperature)
    known = _known(call, grad_log_probs, grad_entropy, row_statistics)
    return call.layer().gradients(
        gradient, call.targets(start), known, peers_of_call(call), call.group, call.said(), wanted, scatter
    )


for _name, _function in {
    "vocab_parallel_token_message": message,
    "vocab_parallel_token_log_probs": log_probs,
    "vocab_parallel_token_backward": backward,
    "vocab_parallel_linear_token_backward": linear_backward,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("mbperf::vocab_parallel_token_message")
def _(*args):
    call = Call(*args)
    return call.input.new_empty((message_bytes(call),), dtype=torch.uint8)


@torch.library.register_fake("mbperf::vocab_parallel_token_log_probs")
def _(gathered, message, *args):
    call = Call(*args)
    dtype = call.out_dtype or call.dtype
    entropy = call.input.new_empty(call.target.shape if call.wants_entropy else (0,), dtype=dtype)
    statistics = call.input.new_empty((call.numbers - 1, call.target.numel()), dtype=call.dtype)
    shard = torch.empty((2,), dtype=torch.int64, device="cpu")
    return call.input.new_empty(call.target.shape, dtype=dtype), entropy, statistics, shard


@torch.library.register_fake("mbperf::vocab_parallel_token_backward")
def _(grad_log_probs, grad_entropy, row_statistics, shard, *args):
    return torch.empty_like(Call(*args).input, memory_format=torch.contiguous_format)


@torch.library.register_fake("mbperf::vocab_parallel_linear_token_backward")
def _(grad_log_probs, grad_entropy, row_statistics, shard, *args):
    *rest, wanted, scatter = args
    call = Call(*rest)
    return call.layer().empty_gradients(wanted, peers_of_call(call).size if scatter else 1)
