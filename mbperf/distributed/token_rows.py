"""The local part of log-probabilities over sharded classes: statistics of rows, and their gradient.

With m the largest logit of a row, z = (x - m) / T, s = sum exp(z), M = sum exp(z) z, t its target:
log p = z_t - log s and H = log s - M / s. A rank finds m, s and M of its own classes, and x_t where it owns
t; `combined` makes those of all classes out of them: with d = (m_r - m) / T, s = sum s_r exp(d) and
M = sum exp(d) (M_r + s_r d).
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from mbperf.distributed.rows import IGNORED, Targets, chunks, empty_statistics, picked

_ops = torch.ops.mbperf


def statistics(logits: Tensor, targets: Targets, numbers: int, temperature: float) -> Sequence[Tensor]:
    """Return what a rank tells of its rows, in one read of its logits.

    Args:
        logits: shape (N, C_r) or (N, C_r, d1, ...).
        targets: of the shape of one class's logits.
        numbers: 3, or 4 with entropies.
        temperature: divides the logits.

    Returns:
        One number a position each: the target's logit or 0, m, s, and M with entropies.
    """
    if logits.numel() == 0:
        # Its maximum is that of no class, so that no sum of it counts.
        return empty_statistics(numbers, targets.target.numel(), logits).roll(1, 0).unbind()
    for_kernels = targets.for_kernels()
    _, _, of_rows = _ops.token_log_probs_forward(
        logits, for_kernels, temperature, IGNORED, None, numbers == 4
    )
    local, mine = targets.local_and_mine(for_kernels)
    return [torch.where(mine, picked(logits, local), 0.0), *of_rows]


class Combined(NamedTuple):
    """Statistics over all ranks: the target's logit (positions,), and m, s and M as (2 or 3, positions)."""

    target_logit: Tensor
    row_statistics: Tensor

    def log_probs(self, temperature: float) -> Tensor:
        """Return z_t - log s."""
        row_max, row_sum = self.row_statistics[:2]
        return (self.target_logit - row_max) / temperature - row_sum.log()

    def entropies(self) -> Tensor:
        """Return log s - M / s."""
        _, row_sum, moment = self.row_statistics
        return row_sum.log() - moment / row_sum


def combined(each: Tensor, classes: list[int], temperature: float) -> Combined:
    """Return the statistics of all classes from those of every rank.

    Args:
        each: shape (ranks, numbers, positions).
        classes: how many each rank has.
        temperature: divides the logits.

    Sums run over ranks one by one, so that every rank gets the same bits whatever its threads.
    """
    owners = [its for its, count in zip(each, classes, strict=True) if count]
    row_max = reduce(torch.maximum, (its[1] for its in owners))
    # 0 where a rank has the maximum, also if that is infinite.
    shifts = [((its[1] - row_max) / temperature).masked_fill(its[1] == row_max, 0.0) for its in owners]
    pairs = list(zip(owners, shifts, strict=True))
    of_rows = [row_max, reduce(torch.add, (its[2] * shift.exp() for its, shift in pairs))]
    if each.shape[1] == 4:
        of_rows.append(reduce(torch.add, (_rebased(its[3], its[2], shift) for its, shift in pairs)))
    return Combined(reduce(torch.add, (its[0] for its in owners)), torch.stack(of_rows))


def _rebased(moment: Tensor, row_sum: Tensor, shift: Tensor) -> Tensor:
    """M of a rank once each of its z has grown by `shift`; 0 where nothing of its sum is left."""
    ratio = shift.exp()
    return (ratio * (moment + row_sum * shift)).masked_fill(ratio == 0, 0.0)


class KnownRows(NamedTuple):
    """What backward knows: m, s and M of its rows (2 or 3, positions), upstream gradients (positions)."""

    row_statistics: Tensor
    grad_log_probs: Tensor | None
    grad_entropy: Tensor | None

    def at(self, rows: Tensor | slice) -> "KnownRows":
        """Return what is known of some rows."""
        chosen = (None if t is None else t[rows] for t in (self.grad_log_probs, self.grad_entropy))
        return KnownRows(self.row_statistics[:, rows].contiguous(), *chosen)


def gradient(logits: Tensor, targets: Targets, known: KnownRows, temperature: float) -> Tensor:
    """Return the gradient of this rank's logits, in one read and one write.

    Args:
        logits: shape (N, C_r) or (N, C_r, d1, ...).
        targets: of the shape of one class's logits.
        known: over the classes of all ranks.
        temperature: divides the logits.

    Returns:
        (g ([c = t] - p) - h p (z - M / s)) / T, in the shape and dtype of `logits`.
    """
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    for_kernels, shape = targets.for_kernels(), targets.target.shape
    upstream = {
        name: None if grad is None else grad.reshape(shape)
        for name, grad in (("grad_log_probs", known.grad_log_probs), ("grad_entropy", known.grad_entropy))
    }
    grad = _ops.token_log_probs_backward(
        logits, for_kernels, known.row_statistics, temperature, IGNORED, **upstream
    )
    # The kernels take every row for one whose target is here: what they wrote at its index is wrong.
    for rows, positions in chunks(shape):
        local, mine = targets.at(rows).local_and_mine(for_kernels[rows])
        at_index = _gradient_at(picked(logits[rows], local), mine, known.at(positions), temperature)
        at_index = at_index.masked_fill(for_kernels[rows].flatten() < 0, 0.0).to(grad.dtype)
        grad[rows].scatter_(1, local.unsqueeze(1), at_index.view_as(local).unsqueeze(1))
    return grad


def _gradient_at(logits: Tensor, mine: Tensor, known: KnownRows, temperature: float) -> Tensor:
    """The gradient at one class of each row, which is the target where `mine`."""
    row_max, row_sum = known.row_statistics[:2]
    z = (logits - row_max) / temperature
    p = z.exp() / row_sum
    grad = torch.zeros_like(p)
    if known.grad_log_probs is not None:
        grad = known.grad_log_probs * (mine.to(p.dtype) - p)
    if known.grad_entropy is not None:
        # 0 log 0 is 0, with a gradient of 0.
        centred = z.masked_fill(p == 0, 0.0) - known.row_statistics[2] / row_sum
        grad = grad - known.grad_entropy * p * centred
    return grad / temperature
