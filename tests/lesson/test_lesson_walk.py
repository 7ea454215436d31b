"""The lesson from top to bottom with what `from mbperf.lesson import *` gives: every name, every result.

One test is one section of the lesson, in its order; the numbers are the lesson's own where they do not depend
on random weights, and its bounds where they do.
"""

# ruff: noqa: F403, F405 -- that the star import works is what is tested
import ast
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.data

import mbperf.lesson
from mbperf.lesson import *

# Names that the lesson's cells define or export, and those that its first line brings from earlier lessons.
NAMES = {
    "get_data test_near nn F torch",
    "log_softmax nll logsumexp accuracy",
    "Model DummyModule SequentialModel Optimizer optim get_model",
    "Dataset Sampler collate DataLoader SequentialSampler RandomSampler",
    "fit get_dls",
}
# Names that the lesson gives two or three times over; here each version keeps one of its own.
VERSIONS = {
    "log_softmax": ["log_softmax_ratio", "log_softmax_difference", "log_softmax_stable"],
    "Model": ["UnregisteredModel", "Model", "RegisteredModel"],
    "DataLoader": ["SlicingDataLoader", "SamplingDataLoader", "DataLoader"],
    "fit": ["train_layers", "train_parameters", "train_slices", "train_dataset", "train_loader", "fit"],
}
bs, lr, epochs, nh = 64, 0.5, 1, 50


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def train_ds(digits):
    return Dataset(digits[0], digits[1])


@pytest.fixture
def valid_ds(digits):
    return Dataset(digits[2], digits[3])


@pytest.fixture
def pred(digits):
    """The untrained model's predictions for the whole training set."""
    return UnregisteredModel(784, nh, 10)(digits[0])


def check_learned(model, xb, yb):
    """Assert as the lesson does after each loop."""
    loss, acc = F.cross_entropy(model(xb), yb), accuracy(model(xb), yb)
    assert acc > 0.7
    assert loss < math.log(10)


def test_every_name_is_exported():
    expected = set(" ".join(NAMES).split()) | {name for names in VERSIONS.values() for name in names}
    assert expected <= set(mbperf.lesson.__all__)
    assert expected <= globals().keys()
    assert all(hasattr(mbperf.lesson, name) for name in mbperf.lesson.__all__)
    assert DataLoader is torch.utils.data.DataLoader
    assert log_softmax is log_softmax_stable


def test_data(digits):
    x_train, y_train, x_valid, y_valid = digits
    n, m = x_train.shape
    c = y_train.max() + 1
    assert (n, m, c) == (50_000, 28 * 28, 10)
    assert y_train.shape[0] == 50_000
    assert x_valid.shape == (10_000, 28 * 28)
    assert y_valid.shape == (10_000,)


def test_cross_entropy_loss(digits, pred):
    y_train = digits[1]
    sm_pred = log_softmax_ratio(pred)
    rows = sm_pred[[0, 1, 2], y_train[:3]]
    assert rows.shape == (3,)
    assert (rows < 0).all()
    loss = nll(sm_pred, y_train)
    assert loss.item() == pytest.approx(2.30, abs=0.05)  # the lesson: 2.3019; log(10) = 2.3026
    test_near(nll(log_softmax_difference(pred), y_train), loss)
    test_near(logsumexp(pred), pred.logsumexp(-1))
    test_near(nll(log_softmax(pred), y_train), loss)
    test_near(F.nll_loss(F.log_softmax(pred, -1), y_train), loss)
    test_near(F.cross_entropy(pred, y_train), loss)


def test_basic_training_loop(digits):
    x_train, y_train = digits[:2]
    model = UnregisteredModel(784, nh, 10)
    xb, yb = x_train[0:bs], y_train[0:bs]
    preds = model(xb)
    assert preds.shape == (bs, 10)
    assert F.cross_entropy(preds, yb).item() == pytest.approx(2.30, abs=0.05)
    assert 0 <= accuracy(preds, yb) < 0.4
    train_layers(epochs, model, F.cross_entropy, lr, x_train, y_train, bs)
    check_learned(model, x_train[-16:], y_train[-16:])


def test_parameters(digits):
    model = Model(784, nh, 10)
    assert [f"{name}: {layer}" for name, layer in model.named_children()] == [
        "l1: Linear(in_features=784, out_features=50, bias=True)",
        "l2: Linear(in_features=50, out_features=10, bias=True)",
    ]
    assert repr(model) == (
        "Model(\n"
        "  (l1): Linear(in_features=784, out_features=50, bias=True)\n"
        "  (l2): Linear(in_features=50, out_features=10, bias=True)\n"
        ")"
    )
    train_parameters(epochs, model, F.cross_entropy, lr, *digits[:2], bs)
    check_learned(model, digits[0][-16:], digits[1][-16:])


def test_dummy_module(digits):
    model = DummyModule(784, nh, 10)
    assert repr(model).startswith("{'l1': Linear(in_features=784, out_features=50, bias=True), 'l2': ")
    assert [tuple(o.shape) for o in model.parameters()] == [(50, 784), (50,), (10, 50), (10,)]
    train_parameters(epochs, model, F.cross_entropy, lr, *digits[:2], bs)
    check_learned(model, digits[0][-16:], digits[1][-16:])


@pytest.mark.parametrize("make", ["RegisteredModel", "SequentialModel", "nn.Sequential"])
def test_registering_modules(make, digits):
    layers = get_layers(784, nh, 10)
    model = nn.Sequential(*layers) if make == "nn.Sequential" else globals()[make](layers)
    names = {
        "RegisteredModel": ["(layer_0): Linear", "(layer_1): ReLU", "(layer_2): Linear"],
        "SequentialModel": ["(layers): ModuleList", "(0): Linear", "(1): ReLU", "(2): Linear"],
        "nn.Sequential": ["(0): Linear", "(1): ReLU", "(2): Linear"],
    }
    assert all(name in repr(model) for name in names[make])
    train_parameters(epochs, model, F.cross_entropy, lr, *digits[:2], bs)
    check_learned(model, digits[0][-16:], digits[1][-16:])


def test_optim(digits):
    model = nn.Sequential(*get_layers())
    train_slices(epochs, model, F.cross_entropy, Optimizer(model.parameters()), *digits[:2], bs)
    check_learned(model, digits[0][-16:], digits[1][-16:])
    model, opt = get_model()
    assert isinstance(model, nn.Sequential)
    assert isinstance(opt, optim.SGD)
    untrained = F.cross_entropy(model(digits[0][:bs]), digits[1][:bs])
    assert untrained.item() == pytest.approx(2.30, abs=0.05)  # the lesson: 2.3222
    train_slices(epochs, model, F.cross_entropy, opt, *digits[:2], bs)
    check_learned(model, digits[0][-16:], digits[1][-16:])


def test_dataset(digits, train_ds, valid_ds):
    assert len(train_ds) == len(digits[0])
    assert len(valid_ds) == len(digits[2])
    xb, yb = train_ds[0:5]
    assert xb.shape == (5, 28 * 28)
    assert yb.shape == (5,)
    test_near((xb, yb), (digits[0][:5], digits[1][:5]))
    model, opt = get_model()
    train_dataset(epochs, model, F.cross_entropy, opt, train_ds, bs)
    check_learned(model, *train_ds[-16:])


def test_data_loader(train_ds, valid_ds):
    train_dl, valid_dl = SlicingDataLoader(train_ds, bs), SlicingDataLoader(valid_ds, bs)
    xb, yb = next(iter(valid_dl))
    assert xb.shape == (bs, 28 * 28)
    assert yb.shape == (bs,)
    assert xb[0].view(28, 28).shape == (28, 28)
    model, opt = get_model()
    train_loader(epochs, model, F.cross_entropy, opt, train_dl)
    check_learned(model, xb, yb)


def test_random_sampling(train_ds, valid_ds):
    small_ds = Dataset(*train_ds[:10])
    in_order = list(Sampler(small_ds, 3, False))
    assert [o.tolist() for o in in_order] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    shuffled = list(Sampler(small_ds, 3, True))
    assert [len(o) for o in shuffled] == [3, 3, 3, 1]
    assert sorted(torch.cat(shuffled).tolist()) == list(range(10))
    assert torch.cat(shuffled).tolist() != list(range(10))

    train_dl = SamplingDataLoader(train_ds, Sampler(train_ds, bs, shuffle=True), collate)
    valid_dl = SamplingDataLoader(valid_ds, Sampler(valid_ds, bs, shuffle=False), collate)
    # The validation set comes in the same order each time, the training set does not.
    (x_first, y_first), (x_again, y_again) = next(iter(valid_dl)), next(iter(valid_dl))
    test_near((x_first, y_first), (x_again, y_again))
    test_near((x_first, y_first), valid_ds[:bs])
    assert not torch.equal(next(iter(train_dl))[0], next(iter(train_dl))[0])
    model, opt = get_model()
    train_loader(epochs, model, F.cross_entropy, opt, train_dl)
    check_learned(model, *next(iter(train_dl)))


def test_pytorch_data_loader(train_ds, valid_ds):
    with_samplers = DataLoader(train_ds, bs, sampler=RandomSampler(train_ds), collate_fn=collate)
    with_defaults = DataLoader(train_ds, bs, shuffle=True, drop_last=True)
    in_order = DataLoader(valid_ds, bs, sampler=SequentialSampler(valid_ds), collate_fn=collate)
    test_near(next(iter(in_order)), valid_ds[:bs])
    test_near(next(iter(DataLoader(valid_ds, bs, shuffle=False))), list(valid_ds[:bs]))
    assert (len(with_samplers), len(with_defaults)) == (782, 781)
    for train_dl in (with_samplers, with_defaults):
        model, opt = get_model()
        train_loader(epochs, model, F.cross_entropy, opt, train_dl)
        check_learned(model, *next(iter(train_dl)))


def test_validation_in_three_lines(train_ds, valid_ds, capsys):
    train_dl, valid_dl = get_dls(train_ds, valid_ds, bs)
    model, opt = get_model()
    loss, acc = fit(5, model, F.cross_entropy, opt, train_dl, valid_dl)
    assert acc > 0.9
    assert loss < 0.5
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "1", "2", "3", "4"]


def imports_of(path):
    """Every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_lesson_uses_nothing_that_it_is_the_reference_of():
    room = Path(inspect.getfile(mbperf.lesson)).parent
    files = [*room.glob("*.py"), room.parent / "testing.py"]
    assert len(files) > 5
    ours = {name for path in files for name in imports_of(path) if name.startswith((".", "mbperf"))}
    assert "mbperf.lesson.losses" in ours
    assert all(name.startswith("mbperf.lesson.") or name == "mbperf.testing" for name in ours), ours
