"""The options of cross_entropy beyond F.cross_entropy: z_loss, return_lse, out_dtype."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import DTYPES, REDUCTIONS, indices, logits, probabilities
from devices import here

from mbperf import cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [7, 130, 5000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_z_loss(classes, reduction, weighted, soft):
    x = logits(6, classes, dtype=torch.float64)
    y = probabilities(6, classes, dtype=torch.float64) if soft else indices(classes, 6)
    if not soft:
        y[4] = -100
    weight = torch.rand(classes, dtype=torch.float64).to(here()) if weighted else None
    live = torch.ones(6, device=here()) if soft else (y != -100).double()
    squares = x.logsumexp(1).square() * live
    penalty = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / live.sum()}[reduction]
    expected = F.cross_entropy(x, y, weight=weight, reduction=reduction) + 0.01 * penalty
    loss = cross_entropy(x, y, weight=weight, reduction=reduction, z_loss=0.01)
    test_near(loss, expected)
    upstream = torch.rand_like(expected)
    test_near(torch.autograd.grad(loss, x, upstream), torch.autograd.grad(expected, x, upstream))


@pytest.mark.parametrize("shape", [(5,), (4, 9), (3, 9, 5), (2, 200, 3, 3), (3, 5000)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_return_lse(shape, reduction):
    x = logits(*shape, dtype=torch.float64)
    dim = 0 if len(shape) == 1 else 1
    y = indices(shape[dim], *shape[:dim], *shape[dim + 1 :])
    loss, lse = cross_entropy(x, y, reduction=reduction, return_lse=True)
    expected = F.cross_entropy(x, y, reduction=reduction), x.logsumexp(dim)
    test_near((loss, lse), expected)
    upstream = torch.rand_like(loss), torch.rand_like(lse)
    test_near(torch.autograd.grad((loss, lse), x, upstream), torch.autograd.grad(expected, x, upstream))
    with torch.no_grad():
        test_near(cross_entropy(x, y, reduction=reduction, return_lse=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_out_dtype(dtype, out_dtype, reduction):
    x, y = logits(4, 30, dtype=dtype), indices(30, 4)
    loss = cross_entropy(x, y, reduction=reduction, out_dtype=out_dtype)
    assert loss.dtype == out_dtype
    loss.sum().backward()
    assert x.grad.dtype == dtype


def test_extras_refuse_nonsense():
    x, y = logits(4, 5), indices(5, 4)
    with pytest.raises(ValueError, match="z_loss must be a number >= 0, got -1"):
        cross_entropy(x, y, z_loss=-1.0)
    with pytest.raises(ValueError, match="z_loss must be a number >= 0, got nan"):
        cross_entropy(x, y, z_loss=float("nan"))
    with pytest.raises(TypeError, match="out_dtype must be float32, float64, bfloat16 or float16, got Long"):
        cross_entropy(x, y, out_dtype=torch.long)
