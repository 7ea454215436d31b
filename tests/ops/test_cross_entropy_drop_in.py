"""cross_entropy in the place of F.cross_entropy, CrossEntropyLoss in the place of torch's."""

import copy
import functools
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import assert_same_outcome, indices, logits, outcome, weights
from devices import here
from torch import nn

import mbperf
from mbperf import CrossEntropyLoss, cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")


def test_the_signature_begins_with_torchs():
    ours = list(inspect.signature(cross_entropy).parameters.values())
    theirs = list(inspect.signature(F.cross_entropy).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_legacy_arguments():
    x, y = logits(4, 5), indices(5, 4)
    for size_average, reduce in itertools.product([None, True, False], repeat=2):
        kwargs = {"size_average": size_average, "reduce": reduce}
        with warnings.catch_warnings(record=True) as ours_warned:
            ours = outcome(cross_entropy, x, y, **kwargs)
        with warnings.catch_warnings(record=True) as theirs_warned:
            theirs = outcome(F.cross_entropy, x, y, **kwargs)
        assert_same_outcome(ours, theirs)
        assert [str(w.message) for w in ours_warned] == [str(w.message) for w in theirs_warned]


def test_it_can_stand_in_for_f_cross_entropy(monkeypatch):
    x, y = logits(4, 5), indices(5, 4)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(x, y)
    calls = []

    @functools.wraps(cross_entropy)
    def counted(*args, **kwargs):
        calls.append(args)
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", counted)
    test_near(nn.CrossEntropyLoss(label_smoothing=0.1)(x, y), expected)
    assert len(calls) == 1


def test_tensor_subclasses_are_heard():
    class Logged(torch.Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = logits(4, 5).detach().as_subclass(Logged)
    loss = cross_entropy(x, indices(5, 4))
    assert mbperf.cross_entropy in Logged.seen
    test_near(loss.as_subclass(torch.Tensor), F.cross_entropy(x.as_subclass(torch.Tensor), indices(5, 4)))


def test_a_reduction_by_its_old_name():
    x, y = logits(4, 5), indices(5, 4)
    with pytest.warns(UserWarning, match="reduction='elementwise_mean' is deprecated"):
        ours = cross_entropy(x, y, reduction="elementwise_mean")
    test_near(ours, F.cross_entropy(x, y))


def test_errors_stay_torchs_where_it_stands_in_for_f_cross_entropy(monkeypatch):
    expected = outcome(F.cross_entropy, logits(3, 5), [0, 1, 2])
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    assert expected[0] is TypeError
    assert outcome(F.cross_entropy, logits(3, 5), [0, 1, 2]) == expected


def trained(steps=25):
    """The losses and the weights of a small model trained with whatever F.cross_entropy is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).to(here())
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    x, y = torch.randn(40, 8).to(here()), indices(5, 40)
    y[::7] = -100
    criterion, losses = nn.CrossEntropyLoss(label_smoothing=0.05), []
    for step in range(steps):
        preds = model(x)
        loss = criterion(preds, y) if step % 2 else F.cross_entropy(preds, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return loss.grad_fn.name(), losses, list(model.parameters())


def test_a_training_run_with_f_cross_entropy_replaced(monkeypatch):
    _, losses, parameters = trained()
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    name, our_losses, our_parameters = trained()
    assert name == "CrossEntropyBackward"
    assert our_losses[-1] < our_losses[0] / 2
    test_near(our_losses, losses, rtol=1e-3)
    test_near(our_parameters, parameters, rtol=1e-3, atol=1e-4)


def test_the_module_is_copied_pickled_and_moved_like_torchs():
    arguments = {"weight": weights(4, 5, dtype=torch.float32), "ignore_index": 2, "label_smoothing": 0.1}
    x, y = logits(4, 5), indices(5, 4)
    expected = nn.CrossEntropyLoss(**arguments)(x, y)
    ours = CrossEntropyLoss(**arguments)
    restored = CrossEntropyLoss(weight=torch.zeros(5, device=here()), ignore_index=2, label_smoothing=0.1)
    restored.load_state_dict(nn.CrossEntropyLoss(**arguments).state_dict())
    for criterion in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), restored):
        assert isinstance(criterion, CrossEntropyLoss)
        assert isinstance(criterion, nn.CrossEntropyLoss)
        test_near(criterion(x, y), expected)
    test_near(ours.double()(x.double(), y), expected.double(), rtol=1e-5)
    assert repr(ours) == repr(nn.CrossEntropyLoss(**arguments))


def test_the_modules_reduction_and_its_old_arguments():
    x, y = logits(4, 5), indices(5, 4)
    for reduction in ("none", "mean", "sum"):
        test_near(CrossEntropyLoss(reduction=reduction)(x, y), F.cross_entropy(x, y, reduction=reduction))
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        criterion = CrossEntropyLoss(size_average=False)
    test_near(criterion(x, y), F.cross_entropy(x, y, reduction="sum"))
