"""Logits of which every rank holds some classes, and what one process makes of all of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import mbperf
from mbperf.distributed import vocab_parallel_cross_entropy


class Sharded(NamedTuple):
    """A call.

    Args:
        classes: of each rank.
        rows: N, or the sizes of a position.
        dtype: of the logits.
        settings: keyword arguments of the loss.
        special: replaces some logits by infinities and NaN.
        offset: added to all logits.
    """

    classes: tuple[int, ...]
    rows: tuple[int, ...] = (7,)
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = {}  # noqa: RUF012
    special: bool = False
    offset: float = 0.0

    def logits(self) -> Tensor:
        """Return the whole logits, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(self.classes))
            count = sum(self.classes)
            logits = (torch.randn(self.rows[0], count, *self.rows[1:]) * 3 + self.offset).to(self.dtype)
        if self.special:
            logits[0, :-1] = -torch.inf
            logits[1, 0], logits[2, -1], logits[3] = torch.nan, torch.inf, -torch.inf
            logits[4, 1] = -torch.inf
        return logits

    def target(self) -> Tensor:
        """Return global class indices; one row in five is ignored, unless there is a single one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            target = torch.randint(0, sum(self.classes), self.rows)
        ignore_index = self.settings.get("ignore_index", -100)
        target.view(-1)[5::5] = ignore_index
        return target

    def of_rank(self, rank: int, whole: Tensor) -> Tensor:
        """Return a rank's classes of a tensor of logits."""
        start = sum(self.classes[:rank])
        return whole[:, start : start + self.classes[rank]]


def backward(result: Any, leaf: Tensor) -> Tensor:
    """Return the gradient of loss and lse with upstream gradients that differ between rows."""
    parts = result if isinstance(result, tuple) else (result,)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        scale = torch.linspace(0.5, 2, part.numel(), dtype=torch.float64).view(part.shape)
        total = total + (part.double() * scale).sum()
    return torch.autograd.grad(total, leaf)[0]


def in_rank(rank: int, cases: list[Sharded]) -> list[tuple[Any, Tensor]]:
    """Return result and gradient of each case on this rank."""
    out = []
    for case in cases:
        leaf = case.of_rank(rank, case.logits()).clone().requires_grad_()
        result = vocab_parallel_cross_entropy(leaf, case.target(), **case.settings)
        grad = backward(result, leaf)
        out.append((_detached(result), grad))
    return out


def in_one_process(case: Sharded, dtype: torch.dtype | None = None) -> tuple[Any, Tensor]:
    """Return result and gradient of the whole, by the loss of one process."""
    leaf = case.logits().to(dtype or case.dtype).requires_grad_()
    settings = dict(case.settings)
    if dtype is not None:
        settings["out_dtype"] = dtype
    result = mbperf.cross_entropy(leaf, case.target(), **settings)
    return _detached(result), backward(result, leaf)


def _detached(result: Any) -> Any:
    return tuple(part.detach() for part in result) if isinstance(result, tuple) else result.detach()


def assert_no_worse(ours: Tensor, whole: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The error is at most twice that of one process, and an infinity or NaN stands where it has one."""
    assert ours.dtype == whole.dtype
    assert ours.shape == whole.shape
    finite = torch.isfinite(exact)
    torch.testing.assert_close(ours.double()[~finite], whole.double()[~finite], equal_nan=True)
    error, its = ((t.double() - exact)[finite].abs() for t in (ours, whole))
    if finite.any():
        slack = 4 * torch.finfo(dtype).eps * max(exact[finite].abs().max().item(), 1e-3)
        assert error.max() <= 2 * its.max() + slack


ROWS, FEATURES = 24, 12  # of the layer below


def layer(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight and bias of a layer, and targets of which a quarter counts for nothing."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((ROWS, FEATURES), (classes, FEATURES), (classes,))
    input, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    target[::4] = -100
    return input, weight, bias, target
