"""Random logits, layouts, dtypes, special values, targets and settings against F.cross_entropy in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from devices import here
from hypothesis import given
from hypothesis import strategies as st

from mbperf import cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SPECIALS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40]
classes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 100, 127, 129, 257, 1000, 4096, 4100]))


@st.composite
def logits(draw):
    """Logits of any dtype and rank in some memory layout."""
    C, N = draw(classes), draw(st.integers(1, 70))
    inner = draw(st.lists(st.integers(1, 5), max_size=3))
    if C > 300:
        N, inner = min(N, 3), inner[:1]
    shape = [N, C, *inner] if draw(st.booleans()) or inner else [C]
    stretched = [2 * n for n in shape] if draw(st.booleans()) else shape
    order = draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn([stretched[d] for d in order], generator=generator, dtype=torch.float64) * 4
    x = x.to(here(), draw(st.sampled_from(list(TOLERANCE)))).permute(
        [order.index(d) for d in range(len(shape))]
    )
    offset = draw(st.integers(0, 1))
    return x[
        tuple(
            slice(offset, None, 2) if s != n else slice(None) for s, n in zip(stretched, shape, strict=True)
        )
    ]


@st.composite
def calls(draw):
    """Logits, a target that fits them, and keyword arguments of F.cross_entropy."""
    x = draw(logits())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dim = 0 if x.dim() == 1 else 1
    C = x.shape[dim]
    settings = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        settings["weight"] = (torch.rand(C, dtype=x.dtype) + 0.1).to(here())
    if draw(st.integers(0, 3)) == 0:
        soft = torch.randn(x.shape, dtype=torch.float64).softmax(dim)
        return x, soft.to(here(), x.dtype), settings
    y = torch.randint(0, C, (*x.shape[:dim], *x.shape[dim + 1 :]))
    settings["ignore_index"] = draw(st.sampled_from([-100, 0, C - 1, C, -1]))
    if draw(st.booleans()) and y.numel():
        y.view(-1)[draw(st.integers(0, y.numel() - 1))] = settings["ignore_index"]
    if draw(st.booleans()) and C < 256 and settings["ignore_index"] >= 0 and x.dim() <= 2:
        y = y.byte()
    return x, y.to(here()), settings


def value_and_gradient(function, x, y, settings):
    leaf = x.detach().requires_grad_()
    value = function(leaf, y, **settings)
    return value.double(), torch.autograd.grad(value.sum(), leaf)[0].double()


def exact(x, y, settings):
    wide = {**settings, "weight": settings["weight"].double()} if "weight" in settings else settings
    # long(): for uint8, 1-D logits and weights torch's smoothing raises an error of its own gather().
    wide_y = y.double() if y.is_floating_point() else y.long()
    return value_and_gradient(F.cross_entropy, x.double(), wide_y, wide)


@given(calls())
def test_fuzz_against_float64(call):
    x, y, settings = call
    before = x.clone()
    ours, truth = value_and_gradient(cross_entropy, x, y, settings), exact(x, y, settings)
    tolerance = TOLERANCE[x.dtype]
    for mine, reference in zip(ours, truth, strict=True):
        scale = max(1.0, float(reference.nan_to_num().abs().max()))
        test_near(mine, reference, equal_nan=True, rtol=tolerance, atol=tolerance * scale)
    assert torch.equal(x, before)


@given(calls(), st.data())
def test_fuzz_special_values(call, data):
    x, y, settings = call
    x = x.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        place = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
        x[place] = data.draw(st.sampled_from(SPECIALS))
    # In float64: in float32 torch's smoothing sums to inf where the loss itself is finite.
    ours, truth = value_and_gradient(cross_entropy, x, y, settings), exact(x, y, settings)
    for mine, reference in zip(ours, truth, strict=True):
        dim = 0 if x.dim() == 1 else 1
        if not y.is_floating_point() and mine.shape == x.shape:
            # An ignored position is not read here, while torch lets its NaN through to the gradient.
            ignored = (y == settings["ignore_index"]).reshape(*x.shape[:dim], 1, *x.shape[dim + 1 :])
            assert (mine.masked_select(ignored.expand_as(mine)) == 0).all()
            mine, reference = mine.masked_fill(ignored, 0), reference.masked_fill(ignored, 0)
        tolerance = TOLERANCE[x.dtype]
        scale = max(1.0, float(reference.nan_to_num(0, 0, 0).abs().max()))
        if scale < 1e30:
            test_near(mine, reference, equal_nan=True, rtol=max(tolerance, 1e-4), atol=tolerance * scale)


@given(calls(), st.data())
def test_fuzz_bad_targets(call, data):
    if here() == "cuda":
        pytest.skip("a wrong target ends the process's use of the GPU; test_cuda_device.py has it in another")
    x, y, settings = call
    dim = 0 if x.dim() == 1 else 1
    if y.is_floating_point() or y.dtype == torch.uint8:
        return
    bad = data.draw(st.sampled_from([x.shape[dim], x.shape[dim] + 1, -2, -101, 2**62, -(2**62)]))
    if bad == settings["ignore_index"]:
        return
    y.view(-1)[data.draw(st.integers(0, y.numel() - 1))] = bad
    leaf = x.detach().requires_grad_()
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        cross_entropy(leaf, y, **settings)
