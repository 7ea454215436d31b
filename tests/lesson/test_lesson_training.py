"""The ladder of training loops on real digits, `fit`, and the lesson's question about validation."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from mbperf.lesson.loaders import Dataset, Sampler, SamplingDataLoader, SlicingDataLoader, collate, get_dls
from mbperf.lesson.losses import accuracy
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
from mbperf.lesson.training import (
    evaluate,
    fit,
    train_dataset,
    train_layers,
    train_loader,
    train_parameters,
    train_slices,
)
from mbperf.testing import test_near

BS, LR = 64, 0.5
LAYER_TYPES = (nn.Linear, nn.ReLU)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers of 50 units gain nothing from threads, and lose 10 times over where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_layers(x, y):
    model = UnregisteredModel(784, 50, 10)
    train_layers(1, model, F.cross_entropy, LR, x, y, BS)
    return model


def by_parameters(make):
    def train(x, y):
        model = make()
        train_parameters(1, model, F.cross_entropy, LR, x, y, BS)
        return model

    return train


def by_own_optimizer(x, y):
    model = nn.Sequential(*get_layers())
    train_slices(1, model, F.cross_entropy, Optimizer(model.parameters()), x, y, BS)
    return model


def by_sgd(x, y):
    model, opt = get_model()
    train_slices(1, model, F.cross_entropy, opt, x, y, BS)
    return model


def by_dataset(x, y):
    model, opt = get_model()
    train_dataset(1, model, F.cross_entropy, opt, Dataset(x, y), BS)
    return model


def by_loader(make_dl):
    def train(x, y):
        model, opt = get_model()
        train_loader(1, model, F.cross_entropy, opt, make_dl(Dataset(x, y)))
        return model

    return train


IN_ORDER = {
    "layers": by_layers,
    "attributes": by_parameters(lambda: Model(784, 50, 10)),
    "dummy": by_parameters(lambda: DummyModule(784, 50, 10)),
    "add_module": by_parameters(lambda: RegisteredModel(get_layers())),
    "module_list": by_parameters(lambda: SequentialModel(get_layers())),
    "sequential": by_parameters(lambda: nn.Sequential(*get_layers())),
    "optimizer": by_own_optimizer,
    "sgd": by_sgd,
    "dataset": by_dataset,
    "slicing loader": by_loader(lambda ds: SlicingDataLoader(ds, BS)),
    "sampling loader": by_loader(lambda ds: SamplingDataLoader(ds, Sampler(ds, BS), collate)),
    "torch loader": by_loader(
        lambda ds: DataLoader(ds, BS, sampler=SequentialSampler(ds), collate_fn=collate)
    ),
}
SHUFFLED = {
    "sampling loader": by_loader(lambda ds: SamplingDataLoader(ds, Sampler(ds, BS, shuffle=True))),
    "random sampler": by_loader(lambda ds: DataLoader(ds, BS, sampler=RandomSampler(ds), collate_fn=collate)),
    "torch loader": by_loader(lambda ds: DataLoader(ds, BS, shuffle=True, drop_last=True)),
}


def parameters(model):
    """Weights in order, also of the model that hides them."""
    layers = [layer for layer in getattr(model, "layers", []) if isinstance(layer, LAYER_TYPES)]
    return [p.detach() for p in (nn.Sequential(*layers) if layers else model).parameters()]


def train(rung, x, y, seed=0):
    torch.manual_seed(seed)
    return rung(x, y)


@pytest.fixture(scope="module")
def first_rung(digits):
    """The lesson's first loop, all by hand, over the whole training set."""
    return train(by_layers, *digits[:2])


@pytest.mark.parametrize("rung", IN_ORDER)
def test_every_rung_in_order_learns_and_ends_at_the_weights_of_the_first(rung, digits, first_rung):
    x_train, y_train, x_valid, y_valid = digits
    model = train(IN_ORDER[rung], x_train, y_train)
    # The learning rate is a power of two, so p - grad * lr rounds alike with and without fused multiply-add:
    # 782 steps of the same arithmetic.
    test_near(parameters(model), parameters(first_rung))
    last = slice(-(len(x_train) % BS), None)
    assert accuracy(model(x_train[last]), y_train[last]) > 0.7
    assert accuracy(model(x_valid), y_valid) > 0.85


@pytest.mark.parametrize("rung", SHUFFLED)
def test_every_shuffled_rung_learns_and_repeats_under_its_seed(rung, digits):
    x_train, y_train, x_valid, y_valid = digits
    model = train(SHUFFLED[rung], x_train, y_train)
    assert accuracy(model(x_train[-BS:]), y_train[-BS:]) > 0.7
    assert accuracy(model(x_valid), y_valid) > 0.85
    small = x_train[:640], y_train[:640]
    once, again, other = (train(SHUFFLED[rung], *small, seed=seed) for seed in (1, 1, 2))
    test_near(parameters(once), parameters(again), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        test_near(parameters(once), parameters(other))


def test_workers_do_not_change_the_weights(digits):
    small = digits[0][:640], digits[1][:640]
    models = []
    for num_workers in (0, 2):
        rung = by_loader(lambda ds, n=num_workers: DataLoader(ds, BS, shuffle=True, num_workers=n))
        models.append(parameters(train(rung, *small)))
    test_near(*models)


def test_first_loop_needs_no_registered_parameters_and_the_second_does(digits):
    small = digits[0][:128], digits[1][:128]
    model = UnregisteredModel(784, 50, 10)
    before = [p.clone() for p in parameters(model)]
    train_parameters(1, model, F.cross_entropy, LR, *small, BS)
    test_near(parameters(model), before)
    train_layers(1, model, F.cross_entropy, LR, *small, BS)
    assert not torch.equal(parameters(model)[0], before[0])


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_loops_run_whole_epochs_with_a_ragged_last_batch(epochs):
    x, y = torch.rand(10, 784), torch.zeros(10, dtype=torch.int64)
    ds = Dataset(x, y)
    model, opt = get_model()
    plain = UnregisteredModel(784, 50, 10)
    loops = [
        lambda loss: train_layers(epochs, plain, loss, LR, x, y, 4),
        lambda loss: train_parameters(epochs, model, loss, LR, x, y, 4),
        lambda loss: train_slices(epochs, model, loss, opt, x, y, 4),
        lambda loss: train_dataset(epochs, model, loss, opt, ds, 4),
        lambda loss: train_loader(epochs, model, loss, opt, SlicingDataLoader(ds, 4)),
    ]
    for loop in loops:
        sizes = []

        def counting(pred, yb, sizes=sizes):
            sizes.append(len(yb))
            return F.cross_entropy(pred, yb)

        loop(counting)
        assert sizes == [4, 4, 2] * epochs


def test_fit_reaches_the_lessons_accuracy(digits, capsys):
    x_train, y_train, x_valid, y_valid = digits
    torch.manual_seed(0)
    train_dl, valid_dl = get_dls(Dataset(x_train, y_train), Dataset(x_valid, y_valid), BS, collate_fn=collate)
    model, opt = get_model()
    loss, acc = fit(5, model, F.cross_entropy, opt, train_dl, valid_dl)
    assert acc > 0.9
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[-1][1:] == [f"{loss:.4f}", f"{acc:.4f}"]
    assert float(rows[0][1]) > loss


class Phases(nn.Module):
    """Notes in which phase it is called, and whether gradients are kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(("train" if self.training else "eval", torch.is_grad_enabled()))
        return self.linear(x)


@pytest.fixture
def small_dl():
    generator = torch.Generator().manual_seed(0)
    return SlicingDataLoader(Dataset(torch.rand(8, 4, generator=generator), torch.arange(8) % 2), 4)


def test_fit_trains_in_train_and_validates_in_eval_without_gradients(small_dl):
    model = Phases()
    fit(2, model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), small_dl, small_dl)
    assert model.seen == ([("train", True)] * 2 + [("eval", False)] * 2) * 2


def test_fit_returns_what_evaluate_says(small_dl):
    model, opt = get_model(4, 3, 2)
    assert fit(2, model, F.cross_entropy, opt, small_dl, small_dl) == evaluate(
        model, F.cross_entropy, small_dl
    )


def test_validation_is_right_when_batch_sizes_vary():
    # 64 rows that are right and sure, and a last batch of 2 that are wrong: 64 / 66, not (1 + 0) / 2.
    logits = torch.tensor([[4.0, 0.0]] * 64 + [[0.0, 4.0]] * 2)
    target = torch.zeros(66, dtype=torch.int64)
    batches = list(SlicingDataLoader(Dataset(logits, target), 64))
    true_loss, true_accuracy = F.cross_entropy(logits, target).item(), 64 / 66

    unweighted_loss = sum(F.cross_entropy(xb, yb).item() for xb, yb in batches) / len(batches)
    unweighted_accuracy = sum(accuracy(xb, yb).item() for xb, yb in batches) / len(batches)
    assert unweighted_accuracy == 0.5
    assert unweighted_loss > 10 * true_loss

    loss, acc = evaluate(nn.Identity(), F.cross_entropy, batches)
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert acc == pytest.approx(true_accuracy, rel=1e-6)


@pytest.mark.parametrize("bs", [1, 7, 64, 1000])
def test_validation_does_not_depend_on_the_batch_size(bs, digits):
    torch.manual_seed(0)
    model, _ = get_model()
    x, y = digits[2][:1000], digits[3][:1000]
    loss, acc = evaluate(model, F.cross_entropy, SlicingDataLoader(Dataset(x, y), bs))
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert acc == pytest.approx(accuracy(model(x), y).item(), rel=1e-6)


def test_fit_refuses_no_epochs_and_nothing_to_validate_on(small_dl):
    model, opt = get_model(4, 3, 2)
    with pytest.raises(ValueError, match="fit: epochs must be at least 1, got 0"):
        fit(0, model, F.cross_entropy, opt, small_dl, small_dl)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        fit(1, model, F.cross_entropy, opt, small_dl, [])


def test_fit_shows_progress_when_asked_and_the_same_results(small_dl, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws no bar unless it takes the output for a terminal
    results = []
    for progress in (False, True):
        torch.manual_seed(0)
        model, opt = get_model(4, 3, 2)
        results.append(fit(1, model, F.cross_entropy, opt, small_dl, small_dl, progress=progress))
        out = capsys.readouterr().out
        assert ("epoch 0" in out) is progress
        assert out.endswith("0 {:.4f} {:.4f}\n".format(*results[-1]))
    assert results[0] == results[1]


def test_fit_on_a_terminal_shows_progress_only_if_rich_is_there(small_dl, monkeypatch, capsys):
    model, opt = get_model(4, 3, 2)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(1, model, F.cross_entropy, opt, small_dl, small_dl)
    assert capsys.readouterr().out.startswith("0 ")
    with pytest.raises(ImportError, match=r'pip install "mbperf\[lesson\]"'):
        fit(1, model, F.cross_entropy, opt, small_dl, small_dl, progress=True)
