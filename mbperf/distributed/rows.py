"""The local part of a loss whose classes are spread over ranks: statistics of rows, and their gradient.

With m the largest logit of a row, s = sum exp(x - m), t its target: loss = log s - (x_t - m). A rank finds m
and s of its own classes, and x_t where it owns t; `combined` makes those of all classes out of them:
m = max m_r, s = sum s_r exp(m_r - m).
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -(1 << 62)  # to the row kernels; no target is so far from the first class of a rank
SUM = 2  # to the row kernels: one upstream gradient for all positions
POSITIONS_AT_ONCE = 8192  # whose temporaries take half a megabyte, however many positions there are


class Targets(NamedTuple):
    """Global targets and the classes of one rank. What it makes of them lives no longer than it is needed.

    Args:
        target: class indices among all classes, one a position.
        start: the first class of this rank.
        classes: how many it has.
        ignore_index: the class index whose positions count for nothing.
    """

    target: Tensor
    start: int
    classes: int
    ignore_index: int

    def live(self) -> Tensor:
        """Return whether each position counts."""
        return self.target != self.ignore_index

    def for_kernels(self) -> Tensor:
        """Return classes among this rank's: the nearest for those of other ranks, IGNORED for the ignored."""
        nearest = (self.target - self.start).clamp_(0, self.classes - 1)
        return nearest.masked_fill_(self.target == self.ignore_index, IGNORED)

    def local_and_mine(self, for_kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a class of this rank that can be looked up, and whether it is the target, flat."""
        return for_kernels.clamp(min=0), (self.target - self.start == for_kernels).flatten()

    def at(self, rows: Tensor | slice) -> "Targets":
        """Return the targets of some rows."""
        return self._replace(target=self.target[rows])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over logits of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_statistics(numbers: int, positions: int, like: Tensor) -> Tensor:
    """Return the statistics of no classes, shape (numbers, positions)."""
    dtype = accumulation_dtype(like.dtype)
    result = torch.zeros((numbers, positions), dtype=dtype, device=like.device)
    result[0] = -torch.inf
    return result


def statistics(logits: Tensor, targets: Targets, numbers: int) -> Sequence[Tensor]:
    """Return what a rank tells of its rows, in one read of its logits.

    Args:
        logits: shape (N, C_r) or (N, C_r, d1, ...).
        targets: of the shape of one class's logits.
        numbers: 3, or 4 with label smoothing.

    Returns:
        One number a position each: max, sum of exp(x - max), the target's logit or 0, sum of x - max.
    """
    if logits.numel() == 0:
        return empty_statistics(numbers, targets.target.numel(), logits).unbind()
    smoothed, for_kernels = numbers == 4, targets.for_kernels()
    loss, row_max, row_sum = torch.ops.mbperf.cross_entropy_forward_softmax(
        logits, for_kernels, 0, IGNORED, float(smoothed), accumulation_dtype(logits.dtype), 0.0
    )
    local, mine = targets.local_and_mine(for_kernels)
    at_index = picked(logits, local)
    rows = [row_max, row_sum, torch.where(mine, at_index, 0.0)]
    if smoothed:
        # Smoothed altogether, the loss is log s - mean(x - m): but 0 times infinity where a logit is -inf.
        total = logits.shape[1] * (row_sum.log() - loss.flatten())
        infinite = (at_index == -torch.inf) & ~row_sum.isnan()
        rows.append(total.masked_fill(infinite, -torch.inf).masked_fill(for_kernels.flatten() < 0, 0.0))
    return rows


def picked(logits: Tensor, index: Tensor) -> Tensor:
    """Return one logit a position, flat, in the accumulation dtype."""
    return logits.gather(1, index.unsqueeze(1)).flatten().to(accumulation_dtype(logits.dtype))


class Combined(NamedTuple):
    """Statistics over all ranks, one a position: max, sum of exp(x - max), target's logit, sum of x - max."""

    row_max: Tensor
    row_sum: Tensor
    target_logit: Tensor
    total: Tensor | None

    def losses(self, label_smoothing: float, classes: int) -> Tensor:
        """Return log s - (x_t - m), smoothed."""
        log_sum = self.row_sum.log()
        loss = log_sum - (self.target_logit - self.row_max)
        if self.total is None:
            return loss
        return (1 - label_smoothing) * loss + label_smoothing * (log_sum - self.total / classes)

    def lse(self) -> Tensor:
        """Return m + log s."""
        return self.row_max + self.row_sum.log()


def combined(rows: Tensor, classes: list[int]) -> Combined:
    """Return the statistics of all classes from those of every rank.

    Args:
        rows: shape (ranks, numbers, positions).
        classes: how many each rank has.

    Sums run over ranks one by one, so that every rank gets the same bits whatever its threads.
    """
    counts = [count for count in classes if count]
    each = rows if all(classes) else rows[[rank for rank, count in enumerate(classes) if count]]
    maxima, sums, target_logits, *totals = each.unbind(1)
    row_max = maxima.amax(0)
    # 0 where a rank has the maximum, also if that is infinite.
    shifts = (maxima - row_max).masked_fill_(maxima == row_max, 0.0)
    total = None
    if totals:
        total = reduce(torch.add, (its + n * d for its, n, d in zip(totals[0], counts, shifts, strict=True)))
    row_sum = reduce(torch.add, shifts.exp_().mul_(sums))
    return Combined(row_max, row_sum, reduce(torch.add, target_logits), total)


class Softmax(NamedTuple):
    """What backward knows of its rows, one a position each, flat; of a sum one `grad_loss`."""

    row_max: Tensor
    row_sum: Tensor
    grad_loss: Tensor
    grad_lse: Tensor | None

    def at(self, rows: Tensor | slice) -> "Softmax":
        """Return what is known of some rows."""
        grad_loss = self.grad_loss[rows] if self.grad_loss.dim() else self.grad_loss
        grad_lse = None if self.grad_lse is None else self.grad_lse[rows]
        return Softmax(self.row_max[rows], self.row_sum[rows], grad_loss, grad_lse)


def gradient(
    logits: Tensor, targets: Targets, softmax: Softmax, classes: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Return the gradient of this rank's logits, in one read and one write.

    Args:
        logits: shape (N, C_r) or (N, C_r, d1, ...).
        targets: of the shape of one class's logits.
        softmax: over the classes of all ranks.
        classes: how many all ranks have together.
        label_smoothing, z_loss: of the loss.

    Returns:
        g ((1 + 2 z lse) p - (1 - e) [c = t] - e / C) + g_lse p, in the shape and dtype of `logits`.

    Beside the gradient it holds one int64 a position, and numbers of POSITIONS_AT_ONCE positions.
    """
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    share = label_smoothing / classes
    upstream, kernel_z, kernel_smoothing = softmax.grad_loss, z_loss, share * logits.shape[1]
    if softmax.grad_lse is not None:
        upstream, kernel_z, kernel_smoothing = _prob_coeff(softmax, z_loss), 0.0, 0.0
    for_kernels, shape = targets.for_kernels(), targets.target.shape
    grad = torch.ops.mbperf.cross_entropy_backward(
        upstream.reshape(shape) if upstream.dim() else upstream, logits, for_kernels, softmax.row_max,
        softmax.row_sum, 0 if upstream.dim() else SUM, IGNORED, kernel_smoothing, kernel_z,
    )  # fmt: skip
    for rows, positions in chunks(shape):
        its, of_rows = softmax.at(positions), grad[rows]
        ignored = for_kernels[rows] < 0
        if softmax.grad_lse is not None and share:
            everywhere = (its.grad_loss * share).expand(ignored.numel()).reshape(ignored.shape)
            of_rows.sub_(everywhere.masked_fill(ignored, 0.0)[:, None])
        # The kernels take every row for one whose target is here: what they wrote at its index is wrong.
        local, mine = targets.at(rows).local_and_mine(for_kernels[rows])
        p = (picked(logits[rows], local) - its.row_max).exp_().div_(its.row_sum)
        at_index = _prob_coeff(its, z_loss) * p - its.grad_loss * (
            (1 - label_smoothing) * mine.to(p.dtype) + share
        )
        at_index = at_index.masked_fill_(ignored.flatten(), 0.0).to(grad.dtype)
        of_rows.scatter_(1, local.unsqueeze(1), at_index.view_as(local).unsqueeze(1))
    return grad


def _prob_coeff(softmax: Softmax, z_loss: float) -> Tensor:
    """Return what p is multiplied by in the gradient."""
    coeff = softmax.grad_loss
    if z_loss:
        coeff = coeff * (1 + 2 * z_loss * (softmax.row_max + softmax.row_sum.log()))
    return coeff if softmax.grad_lse is None else coeff + softmax.grad_lse


def chunks(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of rows of targets (N, d1, ...), and the same as ranges of positions."""
    inner = math.prod(shape[1:])
    step = max(POSITIONS_AT_ONCE // max(inner, 1), 1)
    for begin in range(0, shape[0], step):
        yield slice(begin, begin + step), slice(begin * inner, (begin + step) * inner)
