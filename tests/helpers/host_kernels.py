"""The CUDA kernels of csrc/cuda, compiled by g++ and run on the CPU through csrc/cuda/host_shim.

Fills the structures of csrc/cuda/cross_entropy/problem.h as cross_entropy.cpp beside it does.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_objects import included
from torch import Tensor

ROOT = Path(__file__).parents[2]
COMPILER = (os.environ.get("CXX", "g++"), "-x", "c++")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of cuda::Dtype
# Ubuntu's g++ turns _FORTIFY_SOURCE on, under which longjmp refuses to enter another stack.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
VECTOR = {torch.float32: 4, torch.float64: 2, torch.bfloat16: 8, torch.float16: 8}  # elements in 16 bytes
# Rounding of one stored number; what arithmetic in the accumulation type may add, of the largest number.
UNIT = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SLACK = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}
SUBNORMAL = {torch.float16: 2**-25}
CLUSTERS, NO_CLUSTERS = (4, True), (4, False)
LONG = 50257  # of 2 blocks in bfloat16, 4 in float32, 16 in float64
# One case a kernel and geometry, in float32 as in bfloat16.
FAMILIES = {
    "tile": ((130, 12), CLUSTERS),
    "8 lanes": ((18, 100), CLUSTERS),
    "warp": ((5, 700), CLUSTERS),
    "block": ((2, 2500), CLUSTERS),
    "wide block": ((2, 9000), NO_CLUSTERS),
    "cluster": ((1, 33_000), CLUSTERS),
    "looped": ((1, 33_000), NO_CLUSTERS),
    "positions": ((2, 7, 140), CLUSTERS),
    "positions together": ((2, 300, 33), CLUSTERS),
}
GUARD = 64  # elements of NaN before and after every tensor that a kernel gets; keeps 16-byte alignment


def _compile(csrc: Path, sources: list[Path], folder: Path) -> list[Path]:
    assert shutil.which(COMPILER[0]), f"no C++ compiler ({COMPILER[0]})"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = [*COMPILER, *FLAGS, f"-I{csrc}", "-c", source, "-o", target]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert run.returncode == 0, run.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


def _link(objects: list[Path], library: Path) -> Path:
    fresh = library.with_suffix(f".{os.getpid()}")  # another run of the tests may be about to load it
    subprocess.run([COMPILER[0], "-shared", *objects, "-o", fresh], check=True, timeout=300)
    return fresh.replace(library)


def built_library() -> Path:
    """Return the library of this checkout's kernels, compiled where that is not done yet."""
    csrc = ROOT / "csrc"
    sources = sorted([*(csrc / "cuda").rglob("*.cu"), *(csrc / "cuda" / "host_shim").glob("*.cpp")])
    files = included(sources, *COMPILER)
    text = "".join([*FLAGS, *(file.read_text() for file in files)])
    folder = ROOT / "build" / "host_kernels" / hashlib.sha256(text.encode()).hexdigest()[:16]
    library = folder / "kernels_on_host.so"
    if library.exists():
        return library
    return _link(_compile(csrc, sources, folder), library)


def planted_library(folder: Path, file: str, right: str, wrong: str) -> Path:
    """Return a library with an error planted in csrc/cuda/`file`, seen by the rows of bfloat16 alone.

    Raises:
        AssertionError: `right` does not stand there just once.
    """
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / "cuda" / file
    text = source.read_text()
    assert text.count(right) == 1, "the kernels have changed: plant this error in another place"
    source.write_text(text.replace(right, wrong))
    (altered,) = _compile(csrc, [csrc / "cuda" / "cross_entropy" / "bfloat16.cu"], folder / "build")
    others = [built for built in built_library().parent.glob("*.o") if built.name != altered.name]
    return _link([altered, *others], folder / "build" / "altered.so")


def sweep(dtype: torch.dtype) -> list[int]:
    """Return class counts around the vectors and the geometries."""
    w = VECTOR[dtype]
    return sorted({1, 2, 3, w - 1, w, w + 1, 2 * w + 3, 10, 127, 129, 1000, 4097})


def rows_for(classes: int) -> int:
    """Return enough rows for two blocks where threads are cheap."""
    return 130 if classes <= 10 else 18 if classes < 1000 else 5 if classes < 4000 else 2


def assert_near(
    found: Tensor, exact: Tensor, unit: float, slack: float, least: float = 0.0, what: str = ""
) -> None:
    """Check numbers up to their rounding, and that of arithmetic on numbers of the size of the largest."""
    found, scale = (
        found.double(),
        exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0,
    )
    allowed = 1.01 * unit * exact.abs() + slack * scale + least
    good = (found - exact).abs() <= allowed
    good |= (found == exact) | (found.isnan() & exact.isnan())
    assert good.all(), (
        f"{what}: {int((~good).sum())} of {good.numel()} wrong, "
        f"e.g. {found[~good][:3]} for {exact[~good][:3]}"
    )


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "inner", "classes")]


class Totals(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("denominator", "scale", "z_ratio")]


class Device(ctypes.Structure):
    _fields_ = [("multiprocessors", ctypes.c_int), ("has_clusters", ctypes.c_bool)]


def _problem(real: type) -> type[ctypes.Structure]:
    pointer, long, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool

    class Problem(ctypes.Structure):
        _fields_ = [
            *[(name, pointer) for name in ("input", "grad", "soft_target")],
            *[(name, Strides) for name in ("input_strides", "grad_strides", "soft_strides")],
            *[(name, pointer) for name in ("target", "weight")],
            *[(name, long) for name in ("positions", "inner", "classes", "ignore_index")],
            *[(name, real) for name in ("target_coeff", "prob_coeff", "z_loss", "scale")],
            *[(name, pointer) for name in ("totals", "upstream")],
            *[(name, flag) for name in ("upstream_per_position", "known_softmax")],
            *[(name, pointer) for name in ("loss", "row_max", "row_sum")],
            ("inverse_temperature", real),
            *[(name, pointer) for name in ("entropy_scale", "entropy", "row_moment")],
        ]

    return Problem


PROBLEM = {torch.float32: _problem(ctypes.c_float), torch.float64: _problem(ctypes.c_double)}


class LossSum(ctypes.Structure):
    _fields_ = [
        ("positions", ctypes.c_int64),
        ("denominator", ctypes.c_double),
        ("totals", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
    ]


class Scaling(ctypes.Structure):
    _fields_ = [
        ("grad", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("upstream", ctypes.c_void_p),
        ("upstream_dtype", ctypes.c_int),
        ("target", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("positions", "classes", "ignore_index")],
    ]


def guarded(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Return a tensor that starts `shift` elements after a 16-byte boundary, and all of its buffer."""
    n = torch.Size(shape).numel()
    buffer = torch.full((n + 2 * GUARD + shift,), float("nan"), dtype=dtype)
    return buffer[GUARD + shift : GUARD + shift + n].view(shape), buffer


def placed(t: Tensor, shift: int = 0) -> Tensor:
    """Return a copy of t among NaN."""
    out = guarded(tuple(t.shape), t.dtype, shift)[0]
    return out.copy_(t)


def strides_of(t: Tensor, inner: int) -> Strides:
    """Return the strides of logits t of shape (N, C) or (N, C, d); (C,) is (1, C)."""
    if t.dim() == 2:
        return Strides(0, t.stride(0), t.stride(1))
    assert t.dim() == 3
    assert t.shape[2] == inner
    return Strides(t.stride(0), t.stride(2), t.stride(1))


def assert_guarded(*buffers: Tensor) -> None:
    """Check that nothing was written around the tensors that `guarded` made."""
    for whole in buffers:
        assert whole[:GUARD].isnan().all(), "written before its start"
        assert whole[-GUARD:].isnan().all(), "written beyond its end"


def real_of(x: Tensor) -> torch.dtype:
    """Return the dtype that logits x are accumulated in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class Result:
    """The results of a run of the kernels."""

    loss: Tensor
    rows: Tensor
    grad: Tensor | None
    row_max: Tensor
    row_sum: Tensor

    def bits(self) -> list[Tensor]:
        """Everything, for torch.equal: NaN must agree as well."""
        parts = [self.loss, self.rows, self.row_max, self.row_sum]
        return [part.reshape(-1).view(torch.uint8) for part in (*parts, self.grad) if part is not None]


@dataclass
class TokenRows:
    """Log-probabilities and entropies of logits, and the statistics that their gradient is made of."""

    log_probs: Tensor
    entropy: Tensor | None
    statistics: Tensor


class Kernels:
    """The library, with what csrc/cuda/cross_entropy/cross_entropy.cpp makes of tensors."""

    def __init__(self, library: Path) -> None:
        """Load it, and check that its structures are those above."""
        self.lib = ctypes.CDLL(str(library))
        self.lib.mbperf_last_error.restype = ctypes.c_char_p
        for real, problem in PROBLEM.items():
            assert self.lib.mbperf_sizeof_problem(int(real == torch.float64)) == ctypes.sizeof(problem)

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self.lib.mbperf_last_error().decode())

    def set_order(self, order: int) -> None:
        """Let threads run upwards (0), downwards (1) or from the middle (2)."""
        self.lib.mbperf_set_order(order)

    def _problem(self, x: Tensor, target: Tensor, ignore_index: int, **given: object) -> ctypes.Structure:
        inner = x.shape[0] if x.dim() == 2 else x.shape[2]
        p = PROBLEM[real_of(x)](
            input=x.data_ptr(), input_strides=strides_of(x, inner), positions=x.numel() // x.shape[1],
            inner=inner, classes=x.shape[1], ignore_index=ignore_index, **given,
        )  # fmt: skip
        if target.is_floating_point():
            p.soft_target, p.soft_strides = target.data_ptr(), strides_of(target, inner)
        else:
            p.target = target.data_ptr()
        return p

    def _set_gradient(self, p: ctypes.Structure, grad: Tensor) -> None:
        p.grad, p.grad_strides = grad.data_ptr(), strides_of(grad, p.inner)

    def _rows(self, x: Tensor, p: ctypes.Structure, device: tuple[int, bool]) -> None:
        self._check(
            self.lib.mbperf_rows(DTYPES.index(x.dtype), ctypes.byref(p), ctypes.byref(Device(*device)))
        )

    def cross_entropy(
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        gradient: bool = True,
        upstream: Tensor | None = None,
        known: Result | None = None,
        inplace: bool = False,
        grad: Tensor | None = None,
        grad_shift: int = 0,
        device: tuple[int, bool] = (4, True),
    ) -> Result:
        """Run the launches of one operator on x of shape (N, C) or (N, C, d); target (N), (N, d) or x's."""
        real, soft = real_of(x), target.is_floating_point()
        p = self._problem(
            x, target, ignore_index, target_coeff=1 - label_smoothing,
            prob_coeff=label_smoothing / x.shape[1], z_loss=z_loss, scale=1.0,
        )  # fmt: skip
        positions = p.positions
        wide = None if weight is None else weight.to(real)
        p.weight = None if wide is None else wide.data_ptr()
        totals, scratch = Totals(), torch.full((2048,), float("nan"), dtype=torch.float64)
        pointer = ctypes.c_void_p(scratch.data_ptr())
        is_double = int(real == torch.float64)
        if reduction == "mean" and not soft:
            self._check(self.lib.mbperf_totals(is_double, ctypes.byref(p), ctypes.byref(totals), pointer))
            p.totals = ctypes.addressof(totals)
        elif reduction == "mean":
            p.scale = 1 / positions
        rows, row_max, row_sum = (guarded((positions,), real) for _ in range(3))
        p.loss, p.row_max, p.row_sum = rows[0].data_ptr(), row_max[0].data_ptr(), row_sum[0].data_ptr()
        if known is not None:
            p.known_softmax = True
            row_max[0].copy_(known.row_max)
            row_sum[0].copy_(known.row_sum)
        fresh, buffer = guarded(tuple(x.shape), x.dtype, grad_shift)
        grad = x if inplace else fresh if grad is None else grad
        if gradient:
            self._set_gradient(p, grad)
        if upstream is not None:
            upstream = upstream.to(real)
            p.upstream, p.upstream_per_position = upstream.data_ptr(), upstream.dim() > 0
        self._rows(x, p, device)
        loss = rows[0]
        if reduction != "none" and known is None:
            loss = torch.full((), float("nan"), dtype=real)
            divisor = positions if reduction == "mean" else 1
            total = LossSum(positions, divisor, p.totals, loss.data_ptr(), DTYPES.index(real))
            self._check(
                self.lib.mbperf_loss(
                    is_double, ctypes.c_void_p(rows[0].data_ptr()), ctypes.byref(total), pointer
                )
            )
        assert_guarded(rows[1], row_max[1], row_sum[1], buffer)
        return Result(loss, rows[0], grad if gradient else None, row_max[0], row_sum[0])

    def _tokens(
        self, x: Tensor, target: Tensor, statistics: Tensor, temperature: float, entropy: bool
    ) -> ctypes.Structure:
        """What csrc/token_log_probs.h sets of a problem."""
        p = self._problem(x, target, -100, target_coeff=-1.0, scale=1.0)
        if entropy or temperature != 1:
            p.inverse_temperature = 1 / temperature
        p.row_max, p.row_sum = statistics[0].data_ptr(), statistics[1].data_ptr()
        if len(statistics) > 2:
            p.row_moment = statistics[2].data_ptr()
        return p

    def token_log_probs(
        self,
        x: Tensor,
        target: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
        device: tuple[int, bool] = (4, True),
    ) -> TokenRows:
        """Run the forward pass on x of shape (N, C) or (N, C, d) and target (N) or (N, d)."""
        shape = (3 if entropy else 2, target.numel())
        (statistics, around), *outputs = (
            guarded(shape, real_of(x)) for shape in (shape, shape[1:], shape[1:])
        )
        p = self._tokens(x, target, statistics, temperature, entropy)
        p.loss = outputs[0][0].data_ptr()
        if entropy:
            p.entropy = outputs[1][0].data_ptr()
        self._rows(x, p, device)
        assert_guarded(around, *(whole for _, whole in outputs))
        log_probs, entropies = (of_rows.view(target.shape) for of_rows, _ in outputs)
        return TokenRows(log_probs, entropies if entropy else None, statistics)

    def token_log_probs_gradient(
        self,
        x: Tensor,
        target: Tensor,
        statistics: Tensor,
        grad_log_probs: Tensor | None,
        grad_entropy: Tensor | None,
        *,
        temperature: float = 1.0,
        grad: Tensor | None = None,
        device: tuple[int, bool] = (4, True),
    ) -> Tensor:
        """Run the backward pass; upstream gradients are one a position, `grad` may be x."""
        p = self._tokens(x, target, statistics, temperature, grad_entropy is not None)
        upstream = [
            None if g is None else g.to(real_of(x)).contiguous() for g in (grad_log_probs, grad_entropy)
        ]
        p.scale, p.known_softmax, p.upstream_per_position = float(grad_log_probs is not None), True, True
        p.upstream, p.entropy_scale = (None if g is None else g.data_ptr() for g in upstream)
        fresh, whole = guarded(tuple(x.shape), x.dtype)
        grad = fresh if grad is None else grad
        self._set_gradient(p, grad)
        self._rows(x, p, device)
        assert_guarded(whole)
        return grad

    def scale_(self, grad: Tensor, upstream: Tensor, target: Tensor | None, classes: int) -> None:
        """Run the launch that scales a gradient taken in the forward pass."""
        scaling = Scaling(
            grad.data_ptr(), grad.numel(), upstream.data_ptr(), DTYPES.index(upstream.dtype),
            None if target is None else target.data_ptr(),
            0 if target is None else target.numel(), classes, -100,
        )  # fmt: skip
        device = Device(4, False)
        self._check(
            self.lib.mbperf_scaling(DTYPES.index(grad.dtype), ctypes.byref(scaling), ctypes.byref(device))
        )
