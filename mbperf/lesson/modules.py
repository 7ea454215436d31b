"""The lesson's ladder of models: one network, 784 -> 50 -> ReLU -> 10, with less and less done by hand.

Built from the same seed, all of them start with the same weights, because all draw them in the same order.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim


def get_layers(n_in: int = 784, nh: int = 50, n_out: int = 10) -> list[nn.Module]:
    """Return the layers that the lesson's models chain: linear, ReLU, linear.

    Args:
        n_in: inputs, 28 * 28 for the lesson.
        nh: hidden units.
        n_out: classes.

    Source: fast.ai part 2 (2019), lesson 9, "Registering modules".

    >>> get_layers()[0]
    Linear(in_features=784, out_features=50, bias=True)
    """
    return [nn.Linear(n_in, nh), nn.ReLU(), nn.Linear(nh, n_out)]


class UnregisteredModel(nn.Module):
    """The first `Model`: layers in a plain list, which nn.Module does not see: it has no parameters().

    The torch equivalent is `nn.Sequential`.

    Args:
        n_in: inputs.
        nh: hidden units.
        n_out: classes.

    Source: fast.ai part 2 (2019), lesson 9, "Data".

    >>> len(list(UnregisteredModel(784, 50, 10).parameters()))
    0
    """

    def __init__(self, n_in: int, nh: int, n_out: int) -> None:
        super().__init__()
        self.layers = get_layers(n_in, nh, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, n_in) to logits (n, n_out)."""
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """Layers as attributes: nn.Module registers them, so that parameters() finds them. ReLU is a function.

    The torch equivalent is `nn.Sequential`.

    Args:
        n_in: inputs.
        nh: hidden units.
        n_out: classes.

    Source: fast.ai part 2 (2019), lesson 9, "Parameters".

    >>> [name for name, _ in Model(784, 50, 10).named_children()]
    ['l1', 'l2']
    """

    def __init__(self, n_in: int, nh: int, n_out: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(n_in, nh)
        self.l2 = nn.Linear(nh, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, n_in) to logits (n, n_out)."""
        return self.l2(F.relu(self.l1(x)))


class DummyModule:
    """The work of nn.Module behind the scenes: __setattr__ notes each attribute that is set.

    The torch equivalent is `nn.Module`.

    Args:
        n_in: inputs.
        nh: hidden units.
        n_out: classes.

    Source: fast.ai part 2 (2019), lesson 9, "Parameters".

    >>> [tuple(p.shape) for p in DummyModule(784, 50, 10).parameters()]
    [(50, 784), (50,), (10, 50), (10,)]
    """

    _modules: dict[str, Any]

    def __init__(self, n_in: int, nh: int, n_out: int) -> None:
        self._modules = {}
        self.l1 = nn.Linear(n_in, nh)
        self.l2 = nn.Linear(nh, n_out)

    def __setattr__(self, k: str, v: Any) -> None:
        """Set the attribute, and note it unless its name is private."""
        if not k.startswith("_"):
            self._modules[k] = v
        super().__setattr__(k, v)

    def __repr__(self) -> str:
        """Show what was noted."""
        return f"{self._modules}"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of everything noted, in the order it was set."""
        for layer in self._modules.values():
            yield from layer.parameters()

    def __call__(self, x: Tensor) -> Tensor:
        """Map inputs (n, n_in) to logits (n, n_out)."""
        return self.l2(F.relu(self.l1(x)))


class RegisteredModel(nn.Module):
    """A plain list of layers again, each registered by hand with `add_module`.

    The torch equivalent is `nn.Sequential(*layers)`.

    Args:
        layers: applied one after the other.

    Source: fast.ai part 2 (2019), lesson 9, "Registering modules".

    >>> [name for name, _ in RegisteredModel(get_layers()).named_children()]
    ['layer_0', 'layer_1', 'layer_2']
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = list(layers)
        for i, layer in enumerate(self.layers):
            self.add_module(f"layer_{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, n_in) to logits (n, n_out)."""
        for layer in self.layers:
            x = layer(x)
        return x


class SequentialModel(nn.Module):
    """The same with `nn.ModuleList`, which registers the layers by itself.

    The torch equivalent is `nn.Sequential(*layers)`.

    Args:
        layers: applied one after the other.

    Source: fast.ai part 2 (2019), lesson 9, "nn.ModuleList".

    >>> len(list(SequentialModel(get_layers()).parameters()))
    4
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, n_in) to logits (n, n_out)."""
        for layer in self.layers:
            x = layer(x)
        return x


class Optimizer:
    """Plain gradient descent: p -= lr * grad.

    The torch equivalent is `optim.SGD(params, lr)`.

    Args:
        params: what to update.
        lr: learning rate.

    Source: fast.ai part 2 (2019), lesson 9, "optim".

    >>> w = nn.Parameter(torch.tensor([1.0])); (w * 3).sum().backward()
    >>> opt = Optimizer([w], lr=0.5); opt.step(); opt.zero_grad(); w.data, w.grad
    (tensor([-0.5000]), tensor([0.]))
    """

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        self.params, self.lr = list(params), lr

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        with torch.no_grad():
            for p in self.params:
                if p.grad is not None:
                    p -= p.grad * self.lr

    def zero_grad(self) -> None:
        """Set the gradients to zero, in place."""
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()


def get_model(
    n_in: int = 784, nh: int = 50, n_out: int = 10, lr: float = 0.5
) -> tuple[nn.Sequential, optim.SGD]:
    """Return the lesson's final model, `nn.Sequential`, and `optim.SGD` on its parameters.

    Args:
        n_in: inputs.
        nh: hidden units.
        n_out: classes.
        lr: learning rate.

    Source: fast.ai part 2 (2019), lesson 9, `get_model`.

    >>> model, opt = get_model()
    >>> model(torch.zeros(64, 784)).shape
    torch.Size([64, 10])
    """
    model = nn.Sequential(*get_layers(n_in, nh, n_out))
    return model, optim.SGD(model.parameters(), lr=lr)
