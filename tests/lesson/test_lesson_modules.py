"""The ladder of models: the same network each time, seen by nn.Module or not."""

import pytest
import torch
from torch import nn, optim

from mbperf.lesson.modules import (
    DummyModule,
    Model,
    Optimizer,
    RegisteredModel,
    SequentialModel,
    UnregisteredModel,
    get_layers,
    get_model,
)
from mbperf.testing import test_near

SHAPES = [(50, 784), (50,), (10, 50), (10,)]
RUNGS = {
    "layers": lambda: UnregisteredModel(784, 50, 10),
    "attributes": lambda: Model(784, 50, 10),
    "dummy": lambda: DummyModule(784, 50, 10),
    "add_module": lambda: RegisteredModel(get_layers()),
    "module_list": lambda: SequentialModel(get_layers()),
    "sequential": lambda: get_model()[0],
}


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_is_the_same_function_of_the_same_seed(rung):
    x = torch.rand(64, 784, generator=torch.Generator().manual_seed(1))
    out = seeded(RUNGS[rung])(x)
    assert out.shape == (64, 10)
    test_near(out, seeded(RUNGS["sequential"])(x))


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung != "layers"])
def test_every_registered_rung_has_the_same_parameters(rung):
    parameters = list(seeded(RUNGS[rung]).parameters())
    assert [tuple(p.shape) for p in parameters] == SHAPES
    test_near(parameters, list(seeded(RUNGS["sequential"]).parameters()))


def test_a_plain_list_hides_its_parameters():
    assert list(UnregisteredModel(784, 50, 10).parameters()) == []


def test_names_of_the_children():
    names = {rung: [name for name, _ in RUNGS[rung]().named_children()] for rung in RUNGS if rung != "dummy"}
    assert names == {
        "layers": [],
        "attributes": ["l1", "l2"],
        "add_module": ["layer_0", "layer_1", "layer_2"],
        "module_list": ["layers"],
        "sequential": ["0", "1", "2"],
    }


def test_dummy_module_notes_what_is_set_and_shows_it():
    model = DummyModule(784, 50, 10)
    assert repr(model) == (
        "{'l1': Linear(in_features=784, out_features=50, bias=True), "
        "'l2': Linear(in_features=50, out_features=10, bias=True)}"
    )
    model._note = nn.Linear(1, 1)
    assert len(list(model.parameters())) == 4
    model.l3 = nn.Linear(10, 2)
    assert len(list(model.parameters())) == 6


def test_optimizer_takes_the_steps_of_sgd():
    ours, theirs = seeded(RUNGS["sequential"]), seeded(RUNGS["sequential"])
    opt, sgd = Optimizer(ours.parameters(), lr=0.3), optim.SGD(theirs.parameters(), lr=0.3)
    x = torch.rand(8, 784)
    for _ in range(3):
        for model, optimizer in ((ours, opt), (theirs, sgd)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    test_near(list(ours.parameters()), list(theirs.parameters()))


def test_optimizer_zeroes_in_place_and_skips_what_has_no_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = Optimizer(iter([used, unused]))
    assert opt.lr == 0.5
    used.sum().backward()
    grad = used.grad
    opt.step()
    opt.zero_grad()
    assert used.tolist() == [0.5, 0.5]
    assert unused.tolist() == [1.0, 1.0]
    assert used.grad is grad
    assert grad.tolist() == [0.0, 0.0]


def test_get_model_gives_the_optimizer_of_its_model():
    model, opt = get_model(nh=7, lr=0.25)
    assert model[0].out_features == 7
    assert opt.param_groups[0]["lr"] == 0.25
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
