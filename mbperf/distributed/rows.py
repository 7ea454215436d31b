"""The local part of a loss whose classes are spread over ranks: statistics of rows, and their gradient.

With m the largest logit of a row, s = sum exp(x - m), t its target: loss = log s - (x_t - m). A rank finds m
and s of its own classes, and x_t where it owns t; `combined` makes those of all classes out of them:
m = max m_r, s = sum s_r exp(m_r - m).
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # to the row kernels; a target of this rank is never negative


class Targets(NamedTuple):
    """Global targets as one rank sees them, one a position.

    Args:
        live: the position counts.
        mine: its class is one of this rank's.
        local: the class among this rank's, 0 where it is another's.
    """

    live: Tensor
    mine: Tensor
    local: Tensor

    def for_kernels(self) -> Tensor:
        """Return class indices of which none is out of bounds, and the ignored are IGNORED."""
        return self.local.masked_fill(~self.live, IGNORED)

    def at(self, rows: Tensor | slice) -> "Targets":
        """Return the targets of some rows."""
        return Targets(self.live[rows], self.mine[rows], self.local[rows])


def targets_of(target: Tensor, start: int, classes: int, ignore_index: int) -> Targets:
    """Return `target` as the rank sees it that owns `classes` classes from `start`."""
    live = target != ignore_index
    local = target - start
    mine = live & (local >= 0) & (local < classes)
    return Targets(live, mine, local.masked_fill(~mine, 0))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over logits of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_statistics(numbers: int, positions: int, like: Tensor) -> Tensor:
    """Return the statistics of no classes, shape (numbers, positions)."""
    dtype = accumulation_dtype(like.dtype)
    result = torch.zeros((numbers, positions), dtype=dtype, device=like.device)
    result[0] = -torch.inf
    return result


def statistics(logits: Tensor, targets: Targets, numbers: int) -> Tensor:
    """Return what a rank tells of its rows, in one read of its logits.

    Args:
        logits: shape (N, C_r) or (N, C_r, d1, ...).
        targets: of the shape of one class's logits.
        numbers: 3, or 4 with label smoothing.

    Returns:
        Shape (numbers, positions): max, sum of exp(x - max), the target's logit or 0, sum of x - max.
    """
    positions = targets.live.numel()
    if logits.numel() == 0:
        return empty_statistics(numbers, positions, logits)
    smoothed = numbers == 4
    loss, row_max, row_sum = torch.ops.mbperf.cross_entropy_forward_softmax(
        logits, targets.for_kernels(), 0, IGNORED, float(smoothed), accumulation_dtype(logits.dtype), 0.0
    )
    at_index = picked(logits, targets.local)
    rows = [row_max, row_sum, torch.where(targets.mine.flatten(), at_index, 0.0)]
    if smoothed:
        # Smoothed altogether, the loss is log s - mean(x - m): but 0 times infinity where a logit is -inf.
        total = logits.shape[1] * (row_sum.log() - loss.flatten())
        infinite = (at_index == -torch.inf) & ~row_sum.isnan()
        rows.append(total.masked_fill(infinite, -torch.inf).masked_fill(~targets.live.flatten(), 0.0))
    return torch.stack(rows)


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
    each = [its for its, count in zip(rows, classes, strict=True) if count]
    row_max = reduce(torch.maximum, (its[0] for its in each))
    # 0 where a rank has the maximum, also if that is infinite.
    shifts = [(its[0] - row_max).masked_fill(its[0] == row_max, 0.0) for its in each]
    row_sum = reduce(torch.add, (its[1] * shift.exp() for its, shift in zip(each, shifts, strict=True)))
    total = None
    if rows.shape[1] == 4:
        counts = [count for count in classes if count]
        shifted = (its[3] + n * shift for its, n, shift in zip(each, counts, shifts, strict=True))
        total = reduce(torch.add, shifted)
    return Combined(row_max, row_sum, reduce(torch.add, (its[2] for its in each)), total)


class Softmax(NamedTuple):
    """What backward knows of its rows, each flat with one element a position."""

    row_max: Tensor
    row_sum: Tensor
    grad_loss: Tensor
    grad_lse: Tensor | None

    def at(self, rows: Tensor | slice) -> "Softmax":
        """Return what is known of some rows."""
        grad_lse = None if self.grad_lse is None else self.grad_lse[rows]
        return Softmax(self.row_max[rows], self.row_sum[rows], self.grad_loss[rows], grad_lse)


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
    """
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_max, row_sum, grad_loss, grad_lse = softmax
    share = label_smoothing / classes
    prob_coeff, kernel_z = grad_loss, z_loss
    if z_loss:
        prob_coeff = grad_loss * (1 + 2 * z_loss * (row_max + row_sum.log()))
    kernel_smoothing = share * logits.shape[1]
    if grad_lse is not None:
        prob_coeff, kernel_z, kernel_smoothing = prob_coeff + grad_lse, 0.0, 0.0
    upstream = grad_loss if grad_lse is None else prob_coeff
    grad = torch.ops.mbperf.cross_entropy_backward(
        upstream.reshape(targets.live.shape), logits, targets.for_kernels(), row_max, row_sum, 0, IGNORED,
        kernel_smoothing, kernel_z,
    )  # fmt: skip
    if grad_lse is not None and share:
        grad.sub_(
            (grad_loss * share).masked_fill(~targets.live.flatten(), 0.0).view_as(targets.live)[:, None]
        )
    # The kernels take every row for one whose target is here: what they wrote at its index is written again.
    mine = targets.mine.flatten().to(row_max.dtype)
    p = (picked(logits, targets.local) - row_max).exp() / row_sum
    at_index = prob_coeff * p - grad_loss * ((1 - label_smoothing) * mine + share)
    at_index = at_index.masked_fill(~targets.live.flatten(), 0.0).to(grad.dtype)
    return grad.scatter_(1, targets.local.unsqueeze(1), at_index.view_as(targets.local).unsqueeze(1))
