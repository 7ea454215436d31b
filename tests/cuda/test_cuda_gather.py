"""The CUDA kernels of gather and collate, run on the CPU by csrc/cuda/host_shim, against indexing."""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import torch
from host_kernels import built_library

GUARD = 32  # bytes of 0xAB before and after what a kernel may write
OUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class PickedRows(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p), ("rows", ctypes.c_int64), ("row_stride_bytes", ctypes.c_int64),
        ("index", ctypes.c_void_p), ("picked", ctypes.c_int64), ("out", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    library = ctypes.CDLL(str(built_library()))
    library.mbperf_last_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=[0, 1, 2], ids=["upwards", "downwards", "from the middle"])
def order(request, kernels):
    """In which order threads run: nothing may depend on it."""
    kernels.mbperf_set_order(request.param)
    yield request.param
    kernels.mbperf_set_order(0)


def memory(nbytes, shift):
    """A buffer of 0xAB, and the part of it that starts `shift` bytes after a 16-byte boundary."""
    whole = torch.full((nbytes + 2 * GUARD + 32,), 0xAB, dtype=torch.uint8)
    start = GUARD + -whole.data_ptr() % 16 + shift
    return whole, whole[start : start + nbytes]


def assert_untouched_around(whole, part):
    start = part.data_ptr() - whole.data_ptr()
    assert bool((whole[:start] == 0xAB).all()), "written before its start"
    assert bool((whole[start + len(part) :] == 0xAB).all()), "written beyond its end"


def placed(values, shift=0):
    """A copy whose memory starts `shift` bytes after a 16-byte boundary."""
    _, part = memory(values.numel() * values.itemsize, shift)
    part.copy_(values.contiguous().view(-1).view(torch.uint8))
    return part


def problem(rows, index, out, row_bytes, stride_bytes=None):
    return PickedRows(
        rows.data_ptr(), rows.numel() // (stride_bytes or row_bytes), stride_bytes or row_bytes,
        index.data_ptr(), index.numel(), out.data_ptr(),
    )  # fmt: skip


def pick(kernels, rows, index, row_bytes, *, stride_bytes=None, shift=0):
    whole, out = memory(index.numel() * row_bytes, shift)
    code = kernels.mbperf_pick(ctypes.byref(problem(rows, index, out, row_bytes, stride_bytes)),
                               ctypes.c_int64(row_bytes))  # fmt: skip
    if code:
        raise RuntimeError(kernels.mbperf_last_error().decode())
    assert_untouched_around(whole, out)
    return out.view(index.numel(), row_bytes)


def random_bytes(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


INDEX = torch.tensor([4, 0, 6, 6, 1])
# Around every vector width, every number of lanes, and what one block takes at a time (16 KiB).
ROW_BYTES = [
    1,
    2,
    3,
    4,
    7,
    8,
    12,
    15,
    16,
    17,
    24,
    31,
    32,
    48,
    100,
    508,
    512,
    513,
    528,
    1040,
    3136,
    16384,
    16400,
]


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_picked_rows(kernels, row_bytes):
    rows = random_bytes(7, row_bytes)
    for shift, out_shift in itertools.product((0, 1, 2, 4, 8), (0, 1, 4)):
        got = pick(kernels, placed(rows, shift), INDEX, row_bytes, shift=out_shift)
        assert torch.equal(got, rows[INDEX])


def test_the_order_of_threads_changes_nothing(kernels, order):
    rows = random_bytes(7, 3136)
    assert torch.equal(pick(kernels, placed(rows), INDEX, 3136), rows[INDEX])


def test_many_short_rows(kernels):
    rows = random_bytes(1000, 8)
    index = torch.randperm(1000)
    assert torch.equal(pick(kernels, placed(rows), index, 8), rows[index])


def test_a_long_row_is_cut_into_pieces(kernels):
    rows = random_bytes(3, 5 * 16384 + 48)
    index = torch.tensor([2, 0])
    assert torch.equal(pick(kernels, placed(rows), index, rows.shape[1]), rows[index])


@pytest.mark.parametrize(("row_bytes", "stride_bytes"), [(16, 20), (12, 16), (16, 32), (7, 9), (8, 0)])
def test_rows_of_any_stride(kernels, row_bytes, stride_bytes):
    storage = random_bytes(7 * max(stride_bytes, row_bytes) + row_bytes)
    rows = storage.as_strided((7, row_bytes), (stride_bytes, 1))
    source = placed(storage)
    whole, out = memory(INDEX.numel() * row_bytes, 0)
    p = PickedRows(source.data_ptr(), 7, stride_bytes, INDEX.data_ptr(), INDEX.numel(), out.data_ptr())
    assert kernels.mbperf_pick(ctypes.byref(p), ctypes.c_int64(row_bytes)) == 0
    assert_untouched_around(whole, out)
    assert torch.equal(out.view(-1, row_bytes), rows[INDEX])


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("row_bytes", [8, 16, 3136])
def test_an_index_is_checked_before_it_is_used(kernels, bad, row_bytes):
    # 2**40 rows past the end there is no memory: had the kernel read there, the process would be gone.
    with pytest.raises(RuntimeError, match=r"assertion failed: row >= 0 && row < p\.rows"):
        pick(kernels, placed(random_bytes(7, row_bytes)), torch.tensor([0, bad]), row_bytes)


def test_offsets_are_64_bits_wide(kernels):
    """Rows 2^33 bytes apart; nothing between them is touched, so nothing between them is paged in."""
    apart = 1 << 33
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    sparse = torch.frombuffer(mmap.mmap(-1, apart + 64, flags=flags), dtype=torch.uint8)
    sparse[:16], sparse[apart : apart + 16] = 1, 2
    p_index, (whole, out) = torch.tensor([1, 0]), memory(32, 0)
    p = PickedRows(sparse.data_ptr(), 2, apart, p_index.data_ptr(), 2, out.data_ptr())
    assert kernels.mbperf_pick(ctypes.byref(p), ctypes.c_int64(16)) == 0
    assert_untouched_around(whole, out)
    assert out.tolist() == [2] * 16 + [1] * 16


# Conversion.


def convert(kernels, rows, index, dtype, mean, scale, run, shift=0):
    row = rows.shape[1]
    whole, out = memory(index.numel() * row * dtype.itemsize, shift * dtype.itemsize)
    source = placed(rows, shift * rows.itemsize)
    p = PickedRows(source.data_ptr(), rows.shape[0], row * rows.itemsize, index.data_ptr(), index.numel(),
                   out.data_ptr())  # fmt: skip
    code = kernels.mbperf_convert(
        int(rows.dtype == torch.float32), OUT_DTYPES.index(dtype), ctypes.byref(p), ctypes.c_int64(row),
        ctypes.c_void_p(mean.data_ptr()), ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_uint32(mean.numel()), ctypes.c_uint32(run),
    )  # fmt: skip
    assert code == 0, kernels.mbperf_last_error().decode()
    assert_untouched_around(whole, out)
    return out.clone().view(dtype).view(index.numel(), row)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels", "run", "repeats"),
    [
        (1, 1, 784),
        (3, 64, 1),
        (3, 1, 64),
        (3, 1, 75),
        (3, 25, 1),
        (4, 2, 9),
        (40, 1, 3),
        (256, 5, 1),
        (1, 1, 1),
    ],
)
def test_converted_rows_are_torchs_to_the_bit(kernels, channels, run, repeats, stored, dtype):
    row = channels * run * repeats
    rows = random_bytes(7, row).to(stored)
    mean = torch.linspace(90, 140, channels)
    scale = torch.linspace(-0.02, 0.04, channels)
    channel = torch.arange(row) // run % channels
    expected = ((rows[INDEX].float() - mean[channel]) * scale[channel]).to(dtype)
    for shift in (0, 1, 2):
        assert torch.equal(convert(kernels, rows, INDEX, dtype, mean, scale, run, shift), expected)


def test_extreme_values_round_as_torch_does(kernels):
    tiny = 2.0**-24
    values = [0.0, -0.0, tiny, tiny / 2, 1.5 * tiny, 6e-5, 65504.0, 65519.9, 65520.0, 1e30, float("inf")]
    rows = torch.tensor([values + [-v for v in values] + [float("nan")] + [0.1] * 9])
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in OUT_DTYPES:
        got = convert(kernels, rows, torch.tensor([0]), dtype, zero, one, 1)
        assert torch.equal(got.isnan(), rows.isnan())
        assert torch.equal(got.nan_to_num(7), rows.to(dtype).nan_to_num(7))


# The batch of samples that lie anywhere.


@pytest.mark.parametrize(("count", "row_bytes"), [(1, 16), (5, 3), (64, 3136), (448, 8), (449, 8), (4001, 4)])
def test_stacked_samples(kernels, count, row_bytes, order):
    samples = [placed(random_bytes(row_bytes).roll(k), shift=4 * (k % 3)) for k in range(count)]
    pointers = (ctypes.c_void_p * count)(*(sample.data_ptr() for sample in samples))
    whole, out = memory(count * row_bytes, 0)
    code = kernels.mbperf_stack(pointers, ctypes.c_int64(count), ctypes.c_void_p(out.data_ptr()),
                                ctypes.c_int64(row_bytes))  # fmt: skip
    assert code == 0, kernels.mbperf_last_error().decode()
    assert_untouched_around(whole, out)
    assert torch.equal(out.view(count, row_bytes), torch.stack(samples))


# The memory limit.


class Roof(ctypes.Structure):
    _fields_ = [
        ("src", ctypes.c_void_p), ("dst", ctypes.c_void_p), ("read", ctypes.c_int64),
        ("written", ctypes.c_int64), ("never", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "written"), [(0, 0), (1, 1), (1500, 1500), (3000, 10), (10, 3000), (2048, 0)]
)
def test_the_memory_limit_reads_and_writes_all_of_it(kernels, read, written):
    src, (whole, dst) = placed(random_bytes(read * 16)), memory(written * 16, 0)
    never = torch.zeros(1, dtype=torch.int32)
    roof = Roof(src.data_ptr(), dst.data_ptr(), read, written, never.data_ptr())
    assert kernels.mbperf_roof(ctypes.byref(roof)) == 0
    assert_untouched_around(whole, dst)
    both = min(read, written) * 16
    assert torch.equal(dst[:both], src[:both])
    assert not dst[both:].any()
    assert never.item() == 0


def test_the_memory_limit_looks_at_what_it_only_reads(kernels):
    """A sum that is the agreed value shows: the words are added up, each of them once a thread."""
    src, never = torch.zeros(4 * 1000, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    aligned = placed(src)
    aligned.view(torch.int32)[3999] = 0x9E3779B9 - 2**32
    roof = Roof(aligned.data_ptr(), None, 1000, 0, never.data_ptr())
    assert kernels.mbperf_roof(ctypes.byref(roof)) == 0
    assert never.item() == 0x9E3779B9 - 2**32
