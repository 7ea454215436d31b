"""The lesson's training loop, from everything by hand to `fit`.

Each `train_*` runs whole epochs over the same batches and does the same arithmetic; what differs is who keeps
the parameters, updates them, and makes the batches. `loss_func(preds, yb)` gives the batch's mean loss.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mbperf.lesson.losses import accuracy

LossFunc = Callable[[Tensor, Tensor], Tensor]


def train_layers(
    epochs: int, model: Any, loss_func: LossFunc, lr: float, x: Tensor, y: Tensor, bs: int
) -> None:
    """Train by hand: slice the batch, and update each layer's weight and bias.

    Args:
        epochs: times to go through the data.
        model: has `layers`; its parameters need not be registered.
        loss_func: mean loss of (preds, yb).
        lr: learning rate.
        x: inputs (n, n_in).
        y: targets (n,).
        bs: samples in a batch; the last batch may have fewer.

    Source: fast.ai part 2 (2019), lesson 9, "Basic training loop".

    >>> from mbperf.lesson.modules import UnregisteredModel
    >>> model = UnregisteredModel(4, 3, 2); x = torch.rand(8, 4)
    >>> train_layers(1, model, nn.functional.cross_entropy, 0.5, x, torch.arange(8) % 2, bs=4)
    """
    n = len(x)
    for _ in range(epochs):
        for i in range((n - 1) // bs + 1):
            xb, yb = x[i * bs : i * bs + bs], y[i * bs : i * bs + bs]
            loss_func(model(xb), yb).backward()
            with torch.no_grad():
                for layer in model.layers:
                    if hasattr(layer, "weight"):
                        layer.weight -= layer.weight.grad * lr
                        layer.bias -= layer.bias.grad * lr
                        layer.weight.grad.zero_()
                        layer.bias.grad.zero_()


def train_parameters(
    epochs: int, model: Any, loss_func: LossFunc, lr: float, x: Tensor, y: Tensor, bs: int
) -> None:
    """Train with `model.parameters()`: one update for them all, whatever the layers are.

    Args:
        epochs: times to go through the data.
        model: has `parameters()`.
        loss_func: mean loss of (preds, yb).
        lr: learning rate.
        x: inputs (n, n_in).
        y: targets (n,).
        bs: samples in a batch; the last batch may have fewer.

    Source: fast.ai part 2 (2019), lesson 9, "Parameters".

    >>> from mbperf.lesson.modules import DummyModule
    >>> model = DummyModule(4, 3, 2); x = torch.rand(8, 4)
    >>> train_parameters(1, model, nn.functional.cross_entropy, 0.5, x, torch.arange(8) % 2, bs=4)
    """
    n = len(x)
    for _ in range(epochs):
        for i in range((n - 1) // bs + 1):
            xb, yb = x[i * bs : i * bs + bs], y[i * bs : i * bs + bs]
            loss_func(model(xb), yb).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad * lr
                    p.grad.zero_()


def train_slices(
    epochs: int, model: Any, loss_func: LossFunc, opt: Any, x: Tensor, y: Tensor, bs: int
) -> None:
    """Train with an optimizer, and inputs and targets sliced apart.

    Args:
        epochs: times to go through the data.
        model: a callable.
        loss_func: mean loss of (preds, yb).
        opt: has `step()` and `zero_grad()`.
        x: inputs (n, n_in).
        y: targets (n,).
        bs: samples in a batch; the last batch may have fewer.

    Source: fast.ai part 2 (2019), lesson 9, "optim".

    >>> from mbperf.lesson.modules import get_model
    >>> model, opt = get_model(4, 3, 2); x = torch.rand(8, 4)
    >>> train_slices(1, model, nn.functional.cross_entropy, opt, x, torch.arange(8) % 2, bs=4)
    """
    n = len(x)
    for _ in range(epochs):
        for i in range((n - 1) // bs + 1):
            xb, yb = x[i * bs : i * bs + bs], y[i * bs : i * bs + bs]
            _step(model, loss_func, opt, xb, yb)


def train_dataset(epochs: int, model: Any, loss_func: LossFunc, opt: Any, train_ds: Any, bs: int) -> None:
    """Train on a dataset, which is sliced once for inputs and targets together.

    Args:
        epochs: times to go through the data.
        model: a callable.
        loss_func: mean loss of (preds, yb).
        opt: has `step()` and `zero_grad()`.
        train_ds: has a length and takes slices.
        bs: samples in a batch; the last batch may have fewer.

    Source: fast.ai part 2 (2019), lesson 9, "Dataset".

    >>> from mbperf.lesson import Dataset, get_model
    >>> model, opt = get_model(4, 3, 2); ds = Dataset(torch.rand(8, 4), torch.arange(8) % 2)
    >>> train_dataset(1, model, nn.functional.cross_entropy, opt, ds, bs=4)
    """
    n = len(train_ds)
    for _ in range(epochs):
        for i in range((n - 1) // bs + 1):
            xb, yb = train_ds[i * bs : i * bs + bs]
            _step(model, loss_func, opt, xb, yb)


def train_loader(
    epochs: int, model: Any, loss_func: LossFunc, opt: Any, train_dl: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Train on whatever gives batches.

    Args:
        epochs: times to go through the data.
        model: a callable.
        loss_func: mean loss of (preds, yb).
        opt: has `step()` and `zero_grad()`.
        train_dl: gives (xb, yb), from the start on each pass.

    Source: fast.ai part 2 (2019), lesson 9, "DataLoader".

    >>> from mbperf.lesson import Dataset, SlicingDataLoader, get_model
    >>> model, opt = get_model(4, 3, 2); ds = Dataset(torch.rand(8, 4), torch.arange(8) % 2)
    >>> train_loader(1, model, nn.functional.cross_entropy, opt, SlicingDataLoader(ds, 4))
    """
    for _ in range(epochs):
        for xb, yb in train_dl:
            _step(model, loss_func, opt, xb, yb)


def fit(
    epochs: int,
    model: nn.Module,
    loss_func: LossFunc,
    opt: Any,
    train_dl: Iterable[tuple[Tensor, Tensor]],
    valid_dl: Iterable[tuple[Tensor, Tensor]],
    progress: bool | None = None,
) -> tuple[float, float]:
    """Train, and after each epoch validate and print: epoch, validation loss, validation accuracy.

    Args:
        epochs: times to go through the training data, at least 1.
        model: set to train() and eval() for its two phases.
        loss_func: mean loss of (preds, yb), 0-D.
        opt: has `step()` and `zero_grad()`.
        train_dl: gives (xb, yb), from the start on each pass.
        valid_dl: likewise.
        progress: show a bar while an epoch runs, which needs rich; None: on a terminal, if rich is there.

    Returns:
        Validation loss and accuracy of the last epoch, over samples: see `evaluate`.

    Raises:
        ValueError: fewer than 1 epoch, or nothing to validate on.
        ImportError: progress=True without rich.

    Source: fast.ai part 2 (2019), lesson 9, "Validation".

    >>> from mbperf.lesson import Dataset, get_dls, get_model
    >>> model, opt = get_model(4, 3, 2); ds = Dataset(torch.rand(8, 4), torch.arange(8) % 2)
    >>> loss, acc = fit(1, model, nn.functional.cross_entropy, opt, *get_dls(ds, ds, 4))  # doctest: +ELLIPSIS
    0 ...
    """
    if epochs < 1:
        raise ValueError(f"fit: epochs must be at least 1, got {epochs}")
    for epoch in range(epochs):
        # Layers such as dropout and batch norm do different things in the two phases.
        model.train()
        for xb, yb in _watched(train_dl, f"epoch {epoch}", progress):
            _step(model, loss_func, opt, xb, yb)
        loss, acc = evaluate(model, loss_func, valid_dl)
        print(f"{epoch} {loss:.4f} {acc:.4f}")
    return loss, acc


def evaluate(
    model: nn.Module, loss_func: LossFunc, valid_dl: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over all samples of `valid_dl`; leaves the model in eval().

    "Are these validation results correct if batch size varies?" Here, yes: a batch counts by its size, where
    the lesson's mean over batches counts a last batch of one sample as much as a full one.

    Args:
        model: set to eval().
        loss_func: mean loss of (preds, yb), 0-D.
        valid_dl: gives (xb, yb).

    Returns:
        Loss per sample in the unit of `loss_func`, and accuracy 0 to 1.

    Raises:
        ValueError: `valid_dl` gives no sample.

    Source: fast.ai part 2 (2019), lesson 9, "Validation".

    >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))]
    >>> round(evaluate(nn.Identity(), nn.functional.cross_entropy, batches)[1], 4)
    0.6667
    """
    model.eval()
    total_loss, total_correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    n = 0
    with torch.no_grad():
        for xb, yb in valid_dl:
            pred = model(xb)
            # Added up on the CPU in double: a float32 sum over many batches drifts.
            total_loss += loss_func(pred, yb).to("cpu", torch.float64) * len(yb)
            total_correct += accuracy(pred, yb).to("cpu", torch.float64) * len(yb)
            n += len(yb)
    if n == 0:
        raise ValueError("evaluate: valid_dl must give at least one sample, got none")
    return (total_loss / n).item(), (total_correct / n).item()


def _step(model: Any, loss_func: LossFunc, opt: Any, xb: Tensor, yb: Tensor) -> None:
    """One batch: predict, compare, find the gradients, update."""
    loss_func(model(xb), yb).backward()
    opt.step()
    opt.zero_grad()


def _watched(batches: Iterable[Any], description: str, progress: bool | None) -> Iterable[Any]:
    """Wrap `batches` in a progress bar if one is wanted and can be had."""
    if progress is False or (progress is None and not sys.stdout.isatty()):
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        if progress is None:
            return batches
        raise ImportError('fit: progress needs rich; run: pip install "mbperf[lesson]"') from None
    # A console of its own: rich's shared one keeps the stdout it was first used with.
    return track(batches, description, transient=True, console=Console())
