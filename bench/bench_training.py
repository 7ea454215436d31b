"""The ladder: an epoch of the lesson on every rung, from the loop by hand to the fused operators.

All rungs train the same model on the same batches of real digits and have to end at the same weights.
"""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from phases import Laps, WatchedInputs, WatchedModel, WatchedOptimizer, watched_loss
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

import mbperf
from mbperf import lesson
from mbperf.lesson.digits import embedded_digits
from mbperf.measure.group import SEED, Group
from mbperf.measure.rounds import latin_square
from mbperf.testing import cross_entropy_float64

# A twelfth of the lesson's training set: the shares are those of a whole epoch, in a twelfth of the time.
ROWS, BS, LR = 4_096, 64, 0.5
Loaders = dict[str, Any]


@dataclass
class TrainingLoop:
    """One way to train: called with the inputs of the group, it runs an epoch and returns the weights."""

    name: str
    label: str
    loss_func: Callable[..., Tensor] = F.cross_entropy
    model: Any = field(default_factory=lambda: nn.Sequential(*lesson.get_layers()))

    def __call__(self, loaders: Loaders, x: Tensor, y: Tensor, *rest: Tensor) -> list[Tensor]:
        weights = self.weights()
        self.start(weights, rest[-len(weights) :])
        self.run(self.model, self.loss_func, optim.SGD(weights, LR), loaders, x, y)
        # As in the lesson: after the loop, the loss of a batch.
        with torch.no_grad():
            return [*weights, self.loss_func(self.model(x[:BS]), y[:BS])]

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())

    def start(self, weights: list[Tensor], at: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            for weight, first in zip(weights, at, strict=True):
                weight.copy_(first)

    def run(self, model: Any, loss: Any, opt: Any, loaders: Loaders, x: Tensor, y: Tensor) -> None:
        lesson.train_loader(1, model, loss, opt, loaders[self.name])

    def phases(self, loaders: Loaders, x: Tensor, y: Tensor, *rest: Tensor) -> dict[str, float]:
        """Run an epoch with a watch on it and return the seconds of each phase."""
        weights = self.weights()
        self.start(weights, rest[-len(weights) :])
        laps = Laps()
        opt = WatchedOptimizer(optim.SGD(weights, LR), laps)
        model, loss = WatchedModel(self.model, laps), watched_loss(self.loss_func, laps)
        self.run(model, loss, opt, loaders, self.watched(x, laps), y)
        laps.end("data")  # a loader has to find out that it is at its end
        return laps.seconds

    def watched(self, x: Tensor, laps: Laps) -> Any:
        return x


class ByHand(TrainingLoop):
    """Slices, and an update of each layer's weight and bias."""

    def weights(self) -> list[Tensor]:
        return [p for layer in self.model.layers for p in layer.parameters()]

    def run(self, model: Any, loss: Any, opt: Any, loaders: Loaders, x: Tensor, y: Tensor) -> None:
        lesson.train_layers(1, model, loss, LR, x, y, BS)

    def watched(self, x: Tensor, laps: Laps) -> Any:
        return WatchedInputs(x, laps)


class Sliced(TrainingLoop):
    """Slices, and an optimizer."""

    def run(self, model: Any, loss: Any, opt: Any, loaders: Loaders, x: Tensor, y: Tensor) -> None:
        lesson.train_slices(1, model, loss, opt, x, y, BS)


@cache
def compiled() -> TrainingLoop:
    """The best rung's batches, for a model and torch's loss that are compiled."""
    model = torch.compile(nn.Sequential(*lesson.get_layers()), dynamic=False)
    return TrainingLoop("fused", "torch.compile", torch.compile(F.cross_entropy, dynamic=False), model)


LOOPS = [
    TrainingLoop("fused", "mbperf TensorDataset, collate, cross_entropy", mbperf.cross_entropy),
    ByHand("manual", "loop by hand", model=lesson.UnregisteredModel(784, 50, 10)),
    Sliced("slices", "slices, SGD"),
    TrainingLoop("loader", "the lesson's DataLoader of slices"),
    TrainingLoop("naive", "sampler, sample by sample, collate"),
    TrainingLoop("torch", "torch DataLoader, 0 workers"),
    TrainingLoop("torch_2_workers", "torch DataLoader, 2 workers"),
]
# Not a way to train, as its batches do not follow the order: it says what data would cost at best.
LEAST = TrainingLoop("least", "torch DataLoader around a bare copy", mbperf.cross_entropy)
# From the bottom up.
LABELS = {loop.name: loop.label for loop in [*LOOPS[1:], LOOPS[0]]} | {
    "compiled": "mbperf's batches, torch.compile of model and loss"
}
FACTS = {"N": ROWS, "bs": BS, "threads": 1, "rungs": LABELS}


def shuffled(n: int) -> Tensor:
    """A random order in which place i and place n - 1 - i hold samples k and n - 1 - k.

    The check reverses labels in place; in this order it reverses both copies of the data alike.
    """
    half = torch.randperm(n // 2)
    first = torch.where(torch.rand(n // 2) < 0.5, half, n - 1 - half)
    return torch.cat([first, n - 1 - first.flip(0)])


@cache
def digits() -> tuple[Tensor, Tensor]:
    return embedded_digits(n_train=ROWS, n_valid=1)[:2]


def make_inputs() -> tuple[Any, ...]:
    """The data in order, for slices; and stored in disorder, to be sampled into the same batches."""
    x, y = (tensor.clone() for tensor in digits())
    order = shuffled(ROWS)
    # Shared, as the check changes them under workers that are running.
    stored_x, stored_y = (torch.empty_like(tensor).share_memory_() for tensor in (x, y))
    stored_x[order], stored_y[order] = x, y
    weights = [p.detach() for p in nn.Sequential(*lesson.get_layers()).parameters()]
    return loaders(x, y, stored_x, stored_y, order), x, y, stored_x, stored_y, *weights


def loaders(x: Tensor, y: Tensor, stored_x: Tensor, stored_y: Tensor, order: Tensor) -> Loaders:
    stored = lesson.Dataset(stored_x, stored_y)
    by_torch = partial(DataLoader, batch_size=BS, sampler=order.tolist())
    return {
        "loader": lesson.SlicingDataLoader(lesson.Dataset(x, y), BS),
        "naive": lesson.SamplingDataLoader(stored, order.split(BS)),
        "torch": by_torch(stored),
        # Workers that stay: an epoch times batches, not the start of processes.
        "torch_2_workers": by_torch(stored, num_workers=2, persistent_workers=True),
        "fused": by_torch(mbperf.TensorDataset(stored_x, stored_y), collate_fn=mbperf.collate),
        "least": by_torch(CopiedInOrder(x, y), collate_fn=tuple),
    }


def expected(loaders: Loaders, x: Tensor, y: Tensor, *rest: Tensor) -> list[Tensor]:
    """The epoch in float64, in elementary steps."""
    w1, b1, w2, b2 = weights = [w.double().requires_grad_() for w in rest[-4:]]

    def loss(xb: Tensor, yb: Tensor) -> Tensor:
        return cross_entropy_float64((xb @ w1.T + b1).relu() @ w2.T + b2, yb)

    for xb, yb in zip(x.double().split(BS), y.split(BS), strict=True):
        gradients = torch.autograd.grad(loss(xb, yb), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= LR * gradient
    return [*weights, loss(x[:BS].double(), y[:BS])]


class CopiedInOrder(lesson.Dataset):
    """The least a shuffled batch costs: as many bytes copied, here of the rows that come next."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.batches = cycle(zip(x.split(BS), y.split(BS), strict=True))
        self.xb, self.yb = x[:BS].clone(), y[:BS].clone()

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        xb, yb = next(self.batches)
        return self.xb.copy_(xb), self.yb.copy_(yb)


@cache
def phases(with_compiled: bool, squares: int) -> dict[str, dict[str, float]]:
    """Seconds of each phase of each loop: medians over passes, as many to a square as there are loops.

    In each pass every loop runs once. One square takes 3 s, which a busy neighbour may fill.
    """
    loops = {loop.name: loop for loop in (*LOOPS, LEAST)}
    if with_compiled:
        loops["compiled"] = compiled()
    torch.manual_seed(SEED)
    inputs = make_inputs()
    rng = random.Random(SEED)
    orders = [order for _ in range(squares) for order in latin_square(list(loops), rng)]
    passes = [{name: loops[name].phases(*inputs) for name in order} for order in orders]
    return {name: medians([one[name] for one in passes]) for name in loops}


def medians(epochs: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(one[phase] for one in epochs) for phase in epochs[0]}


def phase_figures(measured: dict[str, dict[str, float]], name: str) -> dict[str, Any]:
    return {"phase_time_s": measured[name], "least_data_time_s": measured["least"]["data"]}


def extra_metrics(name: str) -> dict[str, Any]:
    # Compiling has then been asked for and paid if it is done.
    return phase_figures(phases(with_compiled=compiled.cache_info().currsize > 0, squares=3), name)


def live_rows() -> list[dict[str, Any]]:
    """The ladder in a few seconds, for a look: rows as in a record, of medians and without intervals."""
    measured = phases(with_compiled=False, squares=1)
    return [
        {
            "op": "training",
            "contender": loop.name,
            "facts": FACTS,
            "time_s": sum(measured[loop.name].values()),
            "ratios": {},
            **phase_figures(measured, loop.name),
        }
        for loop in LOOPS
    ]


LADDER = Group(
    op="training",
    case=f"epoch of {ROWS}x784 by {BS}",
    make_inputs=make_inputs,
    contenders={loop.name: loop for loop in LOOPS},
    optional={"compiled": compiled},
    expected=expected,
    facts=FACTS,
    extra_metrics={name: partial(extra_metrics, name) for name in LABELS},
    min_rounds=3,
    also_fresh=False,
    input_sets=2,
    weight=2,
    threads=1,
)


@pytest.mark.race([LADDER])
def test_training(race):
    race()
