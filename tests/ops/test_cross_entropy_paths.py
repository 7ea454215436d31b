"""Every path that serves a problem gives its answer, and the one that is forced is the one that is taken."""

import pytest
import torch

from mbperf import cross_entropy
from mbperf.extension import _C
from mbperf.testing import test_near

# Few, middling and many classes; a row alone; whole vectors and parts of one; maps.
SHAPES = [(70, 3), (70, 10), (33, 64), (40, 100), (5, 257), (3, 1_000), (1, 40_000), (2, 21, 6, 7)]


@pytest.fixture
def forced():
    yield _C.set_cross_entropy_path
    _C.set_cross_entropy_path(None)


def problem(shape, dtype):
    source = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=source)


def value_and_gradient(x, y):
    x = x.clone().requires_grad_()
    loss = cross_entropy(x, y, label_smoothing=0.1)
    return loss.detach(), *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paths_agree(shape, dtype, instruction_set, forced):
    x, y = problem(shape, dtype)
    names = _C.cross_entropy_paths(x, y)
    assert {"rows", "columns"} <= set(names)
    exact = value_and_gradient(x.double(), y)
    for name in names:
        forced(name)
        assert _C.cross_entropy_paths(x, y)[0] == name
        for got, right in zip(value_and_gradient(x, y), exact, strict=True):
            rtol = 32 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
            test_near(got.double(), right, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("shape", "path"), [((50_000, 3), "tiles"), ((2_000, 100), "groups"), ((64, 5_000), "rows")]
)
def test_the_choice_for_one_thread(shape, path):
    x, y = problem(shape, torch.float32)
    _C.set_instruction_set(_C.instruction_sets()[0])
    assert _C.cross_entropy_paths(x, y)[0] == path


def test_a_forced_path_that_cannot_serve_gives_way(forced):
    forced("groups")
    x, y = problem((2, 30_000), torch.float32)
    assert "groups" not in _C.cross_entropy_paths(x, y)
    test_near(cross_entropy(x, y), torch.nn.functional.cross_entropy(x.double(), y).float(), rtol=1e-5)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="expected rows, groups, tiles, columns or None, got diagonals"):
        _C.set_cross_entropy_path("diagonals")
