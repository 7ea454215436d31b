"""What the derivatives of every operator are asked."""

import pytest
import torch


def functional_transforms(x, tangent):
    """Transforms of a function of x: forward, reverse, nested and over a batch of x and tangent."""
    return [
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jacfwd(f)(x),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, tangent])),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, tangent])),
    ]


def check_backward_twice(loss, leaf, scales):
    """A second backward gives the same bits in memory of its own, and none comes after the graph is gone."""
    for scale in scales:
        first, second = (
            torch.autograd.grad(loss, leaf, loss.new_tensor(scale), retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
