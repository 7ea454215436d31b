"""A linear layer whose classes are spread over ranks, in chunks of rows: no more logits than one chunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mbperf.distributed import rows
from mbperf.distributed.peers import Peers

_DEFAULT_BUDGET_BYTES = 64 << 20
_DEFAULT_ROWS = 512  # twice as many in half precision; a chunk reads and writes all of the weight's gradient

Statistics = Callable[[Tensor, rows.Targets, int], Sequence[Tensor]]


Known = TypeVar("Known", bound="KnownRows")


class KnownRows(Protocol):
    """What backward knows of rows."""

    def at(self: Known, rows: Tensor | slice) -> Known:
        """Return what is known of some rows."""


class Layer(NamedTuple):
    """linear(input, weight, bias), input (N, H) on every rank, weight (C_r, H) and bias (C_r) of this one.

    `memory_budget` is the size of a chunk of logits in bytes, of which backward holds two; -1: the default.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    memory_budget: int

    def statistics(self, statistics: Statistics, targets: rows.Targets, numbers: int) -> Sequence[Tensor]:
        """Return what `statistics` makes of the logits, such as `rows.statistics`: one product."""
        result = rows.empty_statistics(numbers, self.input.shape[0], self.input)
        if self.weight.shape[0] == 0:
            return result.unbind()
        result[:2] = torch.tensor([[0.0], [1.0]], device=result.device)  # of the rows that are left out
        for chunk in self._chunks(targets):
            result[:, chunk] = torch.stack([*statistics(self._logits(chunk), targets.at(chunk), numbers)])
        return result.unbind()

    def gradients(
        self,
        gradient: Callable[[Tensor, rows.Targets, Known], Tensor],
        targets: rows.Targets,
        known: Known,
        peers: Peers,
        group: str,
        said: Mapping[str, Any],
        wanted: Sequence[bool],
        scatter: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients that are wanted: the logits' product again, and one for each matrix.

        The sum of the input's over ranks runs while the last chunk's share of the weight's is computed.
        """
        acc = rows.accumulation_dtype(self.input.dtype)
        # Partial sums of half precision are added in float32: rounded once, as one process would.
        grad_input = torch.zeros(self.input.shape, dtype=acc, device=self.input.device)
        grad_weight = torch.zeros(self.weight.shape if wanted[1] else 0, dtype=acc, device=self.input.device)
        grad_bias = torch.zeros(self.weight.shape[0] if wanted[2] else 0, dtype=acc, device=self.input.device)
        chunks = list(self._chunks(targets)) if self.weight.shape[0] else []
        summed = None
        for number, chunk in enumerate(chunks):
            grad = gradient(self._logits(chunk), targets.at(chunk), known.at(chunk))
            if wanted[0]:
                grad_input[chunk] = (grad @ self.weight).to(acc)
                if number == len(chunks) - 1:
                    summed = _start_sum(grad_input, peers, group, scatter)
            if wanted[1]:
                _add_product(grad_weight, grad.T, self.input[chunk])
            if wanted[2]:
                grad_bias += grad.sum(0, dtype=acc)
        if wanted[0]:
            if summed is None:
                summed = _start_sum(grad_input, peers, group, scatter)
            grad_input = peers.wait(summed, said)
        dtype = self.input.dtype
        return grad_input.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)

    def empty_gradients(self, wanted: Sequence[bool], ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tensors like the gradients, the input's of the share of one of `ranks`."""
        nothing = self.input.new_empty((0,))
        input = self.input.new_empty((self.input.shape[0] // ranks, self.input.shape[1]))
        return (
            input if wanted[0] else nothing,
            torch.empty_like(self.weight) if wanted[1] else nothing,
            torch.empty_like(self.bias) if wanted[2] and self.bias is not None else nothing,
        )

    def _logits(self, chunk: Tensor | slice) -> Tensor:
        return F.linear(self.input[chunk], self.weight, self.bias)

    def _chunks(self, targets: rows.Targets) -> Iterator[Tensor | slice]:
        """The rows of each chunk; on a CPU those that count, a GPU would have to be waited for."""
        rows_per_chunk, positions, live = self._rows_per_chunk(), targets.target.numel(), targets.live()
        if self.input.device.type == "cpu" and not live.all():
            yield from live.nonzero().flatten().split(rows_per_chunk)
        else:
            for begin in range(0, positions, rows_per_chunk):
                yield slice(begin, begin + rows_per_chunk)

    def _rows_per_chunk(self) -> int:
        row_bytes = self.weight.shape[0] * self.input.dtype.itemsize
        if self.memory_budget >= 0:
            return max(self.memory_budget // row_bytes, 1)
        least = _DEFAULT_ROWS * (2 if self.input.dtype.itemsize == 2 else 1)
        return max(_DEFAULT_BUDGET_BYTES // row_bytes, least)


def _add_product(sum: Tensor, a: Tensor, b: Tensor) -> None:
    if sum.dtype == a.dtype:
        sum.addmm_(a, b)
    else:
        sum.add_(a @ b)


def _start_sum(grad_input: Tensor, peers: Peers, group: str, scatter: bool) -> Tensor:
    if scatter:
        return torch.ops._c10d_functional.reduce_scatter_tensor(grad_input, "sum", peers.size, group)
    return torch.ops._c10d_functional.all_reduce(grad_input, "sum", group)
