"""Gather against index_select: every dtype, layout and conversion, and its errors."""

import numpy as np
import pytest
import torch
from batches import assert_same, values
from devices import DEVICES, here, on
from hypothesis import given
from hypothesis import strategies as st

from mbperf import gather
from mbperf.extension import _C
from mbperf.testing import test_near as near

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
INDICES = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.tensor,
    "int32": lambda index: torch.tensor(index, dtype=torch.int32),
    "array": lambda index: np.array(index, dtype="i8"),
    "tensors": lambda index: [torch.tensor(i) for i in index],
}


def laid_out(tensor, layout):
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "every other row":
        return torch.stack([tensor, tensor], 1).flatten(0, 1)[::2]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", "channels_last", "every other row", "transposed", "expanded"]),
    st.lists(st.integers(0, 5), max_size=9),
)
def test_fuzz_gather_equals_index_select(device, rest, dtype, layout, index):
    tensor = laid_out(values(np.random.default_rng(0), (6, *rest), dtype).to(device), layout)
    expected = tensor.index_select(0, torch.tensor(index, dtype=torch.int64, device=device))
    picked = gather(tensor, index)
    assert torch.equal(picked, expected)
    assert picked.dtype == dtype
    out = torch.empty_like(expected)
    assert gather(tensor, index, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_may_have_any_form(kind, device):
    x, y = torch.randn(9, 4, device=device), torch.arange(9, device=device)
    index = [3, 0, 8, 3]
    assert_same(gather((x, y), INDICES[kind](index)), (x[index], y[index]))


SOURCES = {
    "NCHW": ((7, 3, 5, 6), 1),
    "NHWC": ((7, 5, 6, 3), 3),
    "channels_last": ((7, 3, 5, 6), 1),
    "many channels": ((7, 5, 40), 2),
    "one channel": ((7, 784), None),
    "scalar rows": ((7,), None),
}


@pytest.fixture(params=[*_C.instruction_sets(), *(name for name in DEVICES if name != "cpu")])
def isa(request):
    """A device that computes: the CPU with one of its instruction sets, or a GPU."""
    if request.param in DEVICES:
        yield from on(request.param)
        return
    was = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32, torch.int16])
@pytest.mark.parametrize("source", SOURCES)
def test_conversion_equals_torchs_steps(source, stored, dtype, isa):
    shape, channel_dim = SOURCES[source]
    tensor = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape)).to(here(), stored)
    if source == "channels_last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    channels = shape[channel_dim] if channel_dim else 1
    mean, std = np.linspace(90.0, 140.0, channels), np.linspace(-50.0, 70.0, channels)
    along = [1] * len(shape)
    if channel_dim:
        along[channel_dim] = channels
    index = torch.tensor([6, 0, 3, 3, 1], device=here())
    means, scale = (torch.tensor(v, dtype=torch.float32, device=here()).view(along) for v in (mean, 1 / std))
    rows = tensor[index].float() - means
    picked = gather(tensor, index, dtype=dtype, mean=mean.tolist(), std=std.tolist())
    assert_same(picked.contiguous(), (rows * scale).to(dtype).contiguous())
    exact = (tensor[index].double().cpu() - torch.tensor(mean).view(along)) / torch.tensor(std).view(along)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    near(picked.double().cpu(), exact, rtol=tolerance, atol=tolerance)


def test_extreme_floats_round_as_torch_does(device):
    tiny, big = 2.0**-24, 65504.0
    floats = [
        0.0,
        -0.0,
        tiny,
        tiny / 2,
        1.5 * tiny,
        6e-5,
        big,
        65519.9,
        65520.0,
        1e30,
        float("inf"),
        float("nan"),
    ]
    x = torch.tensor([floats + [-f for f in floats]])
    x = torch.cat([x, torch.randn(1, 24) * 1e-5, torch.full((1, 24), 1.0009765625)]).to(device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        picked = gather(x, [2, 1, 0], dtype=dtype)
        assert torch.equal(picked.nan_to_num(7), x[[2, 1, 0]].to(dtype).nan_to_num(7))
        assert torch.equal(picked.isnan(), x[[2, 1, 0]].isnan())


def test_a_large_gather_uses_several_threads(device):
    x = torch.randint(0, 256, (5_000, 784), dtype=torch.uint8, device=device)
    index = torch.randperm(5_000, device=device)
    assert torch.equal(gather(x, index), x[index])
    assert torch.equal(gather(x, index, dtype=torch.float32), x[index].float())


ORDERS = {
    "one run": lambda n: range(5, n),
    "runs": lambda n: [k for start in (n - 9, 3, n - 20, 0) for k in range(start, start + 9)],
    "backwards": lambda n: range(n - 1, -1, -1),
    "one row": lambda n: [n - 1] * 40,
}


# Rows that are copied as one element, as bytes, and so large that threads share one.
@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 8, 16, 17, 4_100, 300_001])
@pytest.mark.parametrize("order", ORDERS)
def test_neighbours_and_large_rows(order, row_bytes, device):
    x = torch.randint(0, 256, (48, row_bytes), dtype=torch.uint8, device=device)
    index = torch.tensor(list(ORDERS[order](48)), device=device)
    assert torch.equal(gather(x, index), x[index])
    assert torch.equal(gather(x[::2], index // 2), x[::2][index // 2])
    assert torch.equal(gather(x, index[:1]), x[index[:1]])


# Around the 64 floats that the kernels take at a time; channels last change with every element.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [1, 21, 63, 64, 65, 127, 128, 200])
@pytest.mark.parametrize("channels", [1, 2, 3, 17])
def test_rows_of_any_length_are_converted(channels, pixels, dtype, isa):
    x = torch.randint(0, 256, (4, pixels, channels), dtype=torch.uint8, device=here())
    x = torch.cat([x, x])[::2] if channels == 2 else x
    mean, std = [100.0 + c for c in range(channels)], [3.0 + c for c in range(channels)]
    picked = gather(x, [2, 0], dtype=dtype, mean=mean, std=std)
    scale = 1 / torch.tensor(std, dtype=torch.float64)
    rows = (x[[2, 0]].float() - torch.tensor(mean, device=here())) * scale.float().to(here())
    assert torch.equal(picked, rows.to(dtype))


def test_the_cpu_is_a_device_too():
    assert torch.equal(gather(X, [1, 1], device="cpu"), X[[1, 1]])
    assert torch.equal(gather(X, torch.tensor([2]), dtype=torch.float64, device="cpu"), X[[2]].double())


def test_gradients_flow(device):
    x = torch.randn(4, 2, requires_grad=True, device=device)
    gather(x, [1, 1, 3]).sum().backward()
    assert_same(x.grad, torch.tensor([[0.0, 0], [2, 2], [0, 0], [1, 1]], device=device))


X, NUMBERS = torch.zeros(5, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("tensors", "index", "options", "error", "words"),
    [
        (X, [0, -1], {}, IndexError, r"index\[1\] is -1, expected 0 <= index < 5"),
        (X, [5], {}, IndexError, r"index\[0\] is 5"),
        (X, [0, 2**40], {}, IndexError, r"index\[1\] is 1099511627776"),
        (X, [0.5], {}, TypeError, "float"),
        (X, torch.tensor([0.5]), {}, TypeError, "index must be 1-D integers"),
        (X, torch.tensor([True, False]), {}, TypeError, "index must be 1-D integers"),
        (X, torch.tensor(1), {}, TypeError, "index must be 1-D integers, got 0-D"),
        (X, 3, {}, TypeError, "index must be a list of ints"),
        (torch.tensor(1.0), [0], {}, ValueError, "same number of rows"),
        ((X, torch.zeros(4)), [0], {}, ValueError, r"shapes \[\(5, 3\), \(4,\)\]"),
        (X, [0], {"out": torch.zeros(2, 3)}, ValueError, r"expected out 0 of shape \(1, 3\)"),
        (X, [0], {"out": torch.zeros(1, 3).double()}, ValueError, "torch.float32"),
        (X, [0], {"std": 0.0}, ValueError, "std expects finite numbers other than zero"),
        (X, [0], {"mean": [1.0, 2.0]}, ValueError, "2 channels"),
        (X, [0], {"mean": 1.0, "dtype": torch.int64}, TypeError, "floating point dtype"),
        (X, [0], {"device": "gpu"}, ValueError, "gather: device expects a torch device, got 'gpu'"),
        (X, [0], {"device": "meta"}, ValueError, "gather: device expects a CPU or CUDA device, got 'meta'"),
        (X, [0], {"device": "cuda:99"}, RuntimeError, "gather: device='cuda:99', but torch"),
        (X, [0], {"mean": [1.0, 2.0], "std": [1.0, 2.0, 3.0]}, ValueError, "mean has 2 channels, std has 3"),
        (X, [0], {"out": X[:1]}, RuntimeError, "(?i)overlap|memory"),
        (X[:, 0].long(), NUMBERS[:3], {"out": NUMBERS[1:]}, RuntimeError, "(?i)overlap|memory"),
    ],
)
def test_an_error_names_the_argument(tensors, index, options, error, words):
    with pytest.raises(error, match=words):
        gather(tensors, index, **options)
