"""The CUDA kernels of kl_div_from_logits, run on the CPU by csrc/cuda/host_shim, against float64."""

import ctypes
import math

import pytest
import torch
from host_kernels import DTYPES, UNIT, assert_guarded, built_library, guarded, placed, real_of

# What arithmetic in the accumulation type may add, of the largest number.
SLACK = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-6, torch.float16: 2e-6}
# A warp a row, its longest rows, a block a row; odd widths, whose rows start anywhere within 16 bytes.
WIDTHS = [1, 2, 3, 7, 8, 9, 10, 127, 129, 512, 1000, 1025, 2049, 4097, 9001]


def problem_of(real: type) -> type[ctypes.Structure]:
    class Problem(ctypes.Structure):
        _fields_ = [
            *[(name, ctypes.c_void_p) for name in ("student", "teacher", "grad")],
            *[(name, ctypes.c_int64) for name in ("student_stride", "teacher_stride", "rows", "classes")],
            *[(name, real) for name in ("inverse_temperature", "scale")],
            ("upstream", ctypes.c_void_p),
            ("upstream_per_row", ctypes.c_bool),
            ("loss", ctypes.c_void_p),
        ]

    return Problem


PROBLEM = {torch.float32: problem_of(ctypes.c_float), torch.float64: problem_of(ctypes.c_double)}


@pytest.fixture(scope="module")
def library():
    lib = ctypes.CDLL(str(built_library()))
    lib.mbperf_last_error.restype = ctypes.c_char_p
    for real, problem in PROBLEM.items():
        assert lib.mbperf_sizeof_kl_div(int(real == torch.float64)) == ctypes.sizeof(problem)
    return lib


def run(library, x, z, *, temperature=1.0, upstream=None):
    """Divergence and gradient of rows x, z (N, C), as csrc/cuda/kl_div/kl_div.cpp has them made."""
    real = real_of(x)
    (loss, losses), (grad, grads) = guarded((len(x),), real), guarded(tuple(x.shape), x.dtype)
    upstream = None if upstream is None else upstream.to(real)
    problem = PROBLEM[real](
        student=x.data_ptr(), teacher=z.data_ptr(), grad=grad.data_ptr(), student_stride=x.stride(0),
        teacher_stride=z.stride(0), rows=len(x), classes=x.shape[1], inverse_temperature=1 / temperature,
        scale=1 / temperature, upstream=None if upstream is None else upstream.data_ptr(),
        upstream_per_row=upstream is not None and upstream.dim() > 0, loss=loss.data_ptr(),
    )  # fmt: skip
    assert library.mbperf_kl_div(DTYPES.index(x.dtype), ctypes.byref(problem)) == 0, (
        library.mbperf_last_error()
    )
    assert_guarded(losses, grads)
    return loss, grad


def pair(rows, classes, dtype, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [
        placed((torch.randn(rows, classes, generator=source, dtype=torch.float64) * 3).to(dtype))
        for _ in range(2)
    ]


def exact(x, z, temperature=1.0):
    log_q, log_p = ((t.double() / temperature).log_softmax(1) for t in (x, z))
    p = log_p.exp()
    loss = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)
    return loss, (log_q.exp() - p) / temperature


def assert_near(found, right, unit, slack):
    allowed = 1.01 * unit * right.abs() + slack * right[right.isfinite()].abs().max().clamp(min=1e-3)
    if found.dtype == torch.float16:
        allowed += 2**-25  # below 6e-5 it is subnormal
    good = ((found.double() - right).abs() <= allowed) | (found == right)
    assert good.all(), (found[~good][:3], right[~good][:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_float64_over_the_widths(library, dtype, temperature):
    for classes in WIDTHS:
        x, z = pair(130 if classes < 100 else 5, classes, dtype)
        loss, grad = run(library, x, z, temperature=temperature)
        right = exact(x, z, temperature)
        assert_near(loss, right[0], 0, SLACK[dtype])
        assert_near(grad, right[1], UNIT[dtype], SLACK[dtype])


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_upstream_gradients(library, classes):
    x, z = pair(5, classes, torch.float32)
    right = exact(x, z)[1]
    for upstream in (torch.tensor(0.5), torch.arange(5.0)):
        grad = run(library, x, z, upstream=upstream)[1]
        assert_near(grad, right * upstream.double().reshape(-1, 1), 2**-24, 2e-6)


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_equal_logits_cost_exactly_nothing(library, classes):
    x, _ = pair(5, classes, torch.float32)
    for temperature in (1.0, 3.3):
        loss, grad = run(library, x, placed(x), temperature=temperature)
        assert (loss == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("classes", [10, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_without_probability_and_rows_without_any(library, dtype, classes):
    x, z = pair(7, classes, dtype)
    z[1, 0] = -math.inf
    x[2, -1] = z[2, -1] = -math.inf
    x[3, 1:] = z[3, 1:] = -math.inf
    x[4, 1] = -math.inf
    x[5] = -math.inf
    z[6] = -math.inf
    loss, grad = run(library, x, z)
    right = exact(x[:5], z[:5])
    assert loss[3] == 0
    assert loss[4] == math.inf
    assert loss[5:].isnan().all()
    assert grad[5:].isnan().all()
    for r in (0, 1, 2, 3):
        assert_near(loss[r : r + 1], right[0][r : r + 1], 0, SLACK[dtype])
    assert_near(grad[:5], right[1], UNIT[dtype], SLACK[dtype])


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_no_bit_depends_on_the_order_of_threads(library, classes):
    x, z = pair(5, classes, torch.float32)
    results = []
    for order in (0, 1, 2):
        library.mbperf_set_order(order)
        results.append(run(library, x, z))
    library.mbperf_set_order(0)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_rows_of_wider_tensors(library):
    x, z = pair(5, 72, torch.float32)
    wide = run(library, x[:, :40], z[:, :40])  # 32 more are a whole number of 16 bytes
    narrow = run(library, placed(x[:, :40].contiguous()), placed(z[:, :40].contiguous()))
    assert all(torch.equal(one, two) for one, two in zip(wide, narrow, strict=True))
