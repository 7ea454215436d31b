"""Where the time of an epoch goes: data, forward, loss, backward, step.

The lesson's loops run as they are. What they are given (tensors, model, loss, optimizer) notes the clock when
the loop comes to it, so every moment of an epoch belongs to one phase.
"""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

PHASES = ("data", "forward", "loss", "backward", "step")


class Laps:
    """Seconds by phase; a lap ends where the next begins.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = clock()

    def end(self, phase: str) -> None:
        now = self.clock()
        self.seconds[phase] += now - self.last
        self.last = now


class WatchedModel:
    """Time before a call of the model is data. Asking for `layers`, a loop by hand ends backward."""

    def __init__(self, model: Any, laps: Laps) -> None:
        self.model, self.laps = model, laps

    def __call__(self, xb: Tensor) -> Tensor:
        self.laps.end("data")
        preds = self.model(xb)
        self.laps.end("forward")
        return preds

    @property
    def layers(self) -> Any:
        self.laps.end("backward")
        return self.model.layers


class WatchedOptimizer:
    """An update begins with step() and ends with zero_grad()."""

    def __init__(self, opt: Any, laps: Laps) -> None:
        self.opt, self.laps = opt, laps

    def step(self) -> None:
        self.laps.end("backward")
        self.opt.step()

    def zero_grad(self) -> None:
        self.opt.zero_grad()
        self.laps.end("step")


class WatchedInputs:
    """A loop by hand has no optimizer that says when an update ends: the next slice of the inputs does."""

    def __init__(self, x: Tensor, laps: Laps) -> None:
        self.x, self.laps = x, laps

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice) -> Tensor:
        self.laps.end("step")
        return self.x[index]


def watched_loss(loss_func: Callable[..., Tensor], laps: Laps) -> Callable[..., Tensor]:
    def loss(preds: Tensor, yb: Tensor) -> Tensor:
        value = loss_func(preds, yb)
        laps.end("loss")
        return value

    return loss
