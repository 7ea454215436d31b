"""The watch that the ladder puts on an epoch: every moment belongs to the phase it was spent in."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mbperf import lesson

SPENT = {"data": 1.0, "forward": 20.0, "loss": 300.0, "backward": 4_000.0, "step": 50_000.0}
N, BS = 10, 4  # three batches, the last one ragged


@pytest.fixture
def phases(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("phases")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def spend(self, phase):
        self.now += SPENT[phase]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def model(clock):
    """Spends time in forward, and in backward when the gradient reaches its first weight."""
    model = lesson.UnregisteredModel(6, 5, 3)
    next(model.layers[0].parameters()).register_hook(lambda grad: clock.spend("backward"))
    forward = model.forward

    def slow(x):
        clock.spend("forward")
        return forward(x)

    model.forward = slow
    return model


class Inputs(torch.Tensor):
    """Slicing takes time."""

    def __getitem__(self, index):
        self.clock.spend("data")
        return self.as_subclass(torch.Tensor)[index]


@pytest.fixture
def data(clock):
    x = torch.rand(N, 6).as_subclass(Inputs)
    x.clock = clock
    return x, torch.arange(N) % 3


class Optimizer(lesson.Optimizer):
    def __init__(self, params, clock):
        super().__init__(params)
        self.clock = clock

    def step(self):
        super().step()
        self.clock.spend("step")


def slow_loss(clock):
    def loss(preds, yb):
        clock.spend("loss")
        return F.cross_entropy(preds, yb)

    return loss


def watched(phases, clock, model):
    laps = phases.Laps(clock)
    parameters = [p for layer in model.layers for p in layer.parameters()]
    opt = phases.WatchedOptimizer(Optimizer(parameters, clock), laps)
    return laps, phases.WatchedModel(model, laps), phases.watched_loss(slow_loss(clock), laps), opt


@pytest.mark.parametrize("loop", ["slices", "loader"])
def test_phases_of_a_loop_with_an_optimizer(loop, phases, clock, model, data):
    x, y = data
    laps, watched_model, loss, opt = watched(phases, clock, model)
    if loop == "slices":
        lesson.train_slices(2, watched_model, loss, opt, x, y, BS)
    else:
        lesson.train_loader(2, watched_model, loss, opt, lesson.SlicingDataLoader(lesson.Dataset(x, y), BS))
    assert laps.seconds == {phase: 6 * seconds for phase, seconds in SPENT.items()}


def test_phases_of_a_loop_by_hand(phases, clock, model, data):
    x, y = data
    laps, watched_model, loss, _ = watched(phases, clock, model)
    lesson.train_layers(1, watched_model, loss, 0.5, phases.WatchedInputs(x, laps), y, BS)
    laps.end("step")
    assert laps.seconds == {phase: 3 * seconds for phase, seconds in SPENT.items()} | {"step": 0.0}


def test_the_watch_changes_nothing_that_is_computed(phases):
    x, y = torch.rand(N, 6), torch.arange(N) % 3
    weights = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = lesson.UnregisteredModel(6, 5, 3)
        laps = phases.Laps()
        given = phases.WatchedModel(model, laps) if watch else model
        inputs = phases.WatchedInputs(x, laps) if watch else x
        lesson.train_layers(2, given, F.cross_entropy, 0.5, inputs, y, BS)
        weights.append([p.detach() for layer in model.layers for p in layer.parameters()])
    lesson.test_near(*weights, rtol=0, atol=0)
