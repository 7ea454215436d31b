"""The CPU's kernels without torch, run by csrc/kernel_runner: here, or on an emulator of another processor.

A case is a dataclass that knows its bytes and how to read its results; a run takes many of them.
"""

import hashlib
import io
import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from kernel_objects import ROOT, compiled, included, object_of
from torch import Tensor

from mbperf.extension import _C

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of the runner's
PATHS = ["rows", "groups", "tiles", "columns"]  # in the order of cpu/cross_entropy/path.h
FOLDERS = (
    "cross_entropy",
    "cross_entropy/stats",
    "softcap",
    "kl_div",
    "gather",
)  # of csrc/cpu: a source each for every instruction set
SOURCES = {"baseline", "avx2", "avx512", "neon"}  # one that is for another processor is empty
END, CROSS_ENTROPY, KL_DIV, GATHER, SCAN_TARGETS, STATS, SOFTCAP = range(7)

CROSS = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
# Optimised as little as goes with intrinsics: cross_entropy's kernels compile for a minute under -O3.
CROSS_FLAGS = ("-O1", "-fno-math-errno", "-Wall", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Processor:
    """An instruction set, and where it runs: on this processor or emulated."""

    instruction_set: str
    emulated: bool

    def __str__(self) -> str:
        return f"emulated {self.instruction_set}" if self.emulated else self.instruction_set


def processors() -> list[Processor]:
    """Return this processor with each of its instruction sets, and AArch64 where this is another."""
    here = [Processor(name, False) for name in _C.instruction_sets()]
    if platform.machine() == "aarch64":
        return here
    return [*here, *(Processor(name, True) for name in ("neon", "baseline"))]


def why_not(processor: Processor) -> str:
    """Return what an emulation lacks, or an empty string."""
    if processor.emulated and not shutil.which(CROSS):
        return f"no {CROSS}: apt-get install g++-aarch64-linux-gnu"
    if processor.emulated and not any(map(shutil.which, EMULATORS)):
        return f"no {EMULATORS[0]}: apt-get install qemu-user"
    return ""


@cache
def runner(emulated: bool) -> Path:
    """Return the program, linked where that is not done yet."""
    csrc = ROOT / "csrc"
    sources = [file for name in FOLDERS for file in sorted((csrc / "cpu" / name).glob("*.cpp"))]
    sources = [file for file in sources if file.stem in SOURCES]
    sources.append(csrc / "kernel_runner" / "kernel_runner.cpp")
    files = included(sources, CROSS) if emulated else included(sources)
    text = "".join([*CROSS_FLAGS, *(file.read_text() for file in files)])
    folder = ROOT / "build" / "kernel_runner" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"kernel_runner-{'aarch64' if emulated else platform.machine()}"
    if program.exists():
        return program
    with ThreadPoolExecutor(2) as pool:
        if emulated:
            objects = list(pool.map(lambda file: compiled(file, folder, CROSS, *CROSS_FLAGS), sources))
        else:
            objects = list(pool.map(lambda file: object_of(file, folder), sources))
    # Static: the emulator needs no libraries of the other processor.
    command = [CROSS, "-static"] if emulated else ["g++"]
    subprocess.run([*command, *objects, "-o", program], check=True, timeout=300)
    return program


def run(processor: Processor, cases: Sequence["Case"]) -> list:
    """Run cases in one process; return the results of each."""
    program = [str(runner(processor.emulated)), processor.instruction_set]
    if processor.emulated:
        program.insert(0, next(filter(None, map(shutil.which, EMULATORS))))
    asked = b"".join(case.packed() for case in cases) + integers(END)
    done = subprocess.run(program, input=asked, capture_output=True, check=False, timeout=250)
    assert done.returncode == 0, f"{program[-1]}: exit {done.returncode}: {done.stderr.decode()}"
    answer = io.BytesIO(done.stdout)
    results = [case.read(answer) for case in cases]
    assert not answer.read()
    return results


# Bytes


def integers(*values: int) -> bytes:
    """Return int64 numbers as bytes."""
    return struct.pack(f"<{len(values)}q", *values)


def reals(*values: float) -> bytes:
    """Return doubles as bytes."""
    return struct.pack(f"<{len(values)}d", *values)


def array(t: Tensor | None) -> bytes:
    """Return an array as bytes; none of None."""
    data = b"" if t is None or not t.numel() else t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return integers(len(data)) + data


def read_integer(answer: io.BytesIO) -> int:
    """Read an int64."""
    return struct.unpack("<q", answer.read(8))[0]


def read_real(answer: io.BytesIO) -> float:
    """Read a double."""
    return struct.unpack("<d", answer.read(8))[0]


def read_array(answer: io.BytesIO, dtype: torch.dtype) -> Tensor:
    """Read an array."""
    data = answer.read(read_integer(answer))
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the type that kernels of this dtype compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Layouts: of elements (outer, inner, classes), a position each (outer, inner)

LAYOUTS = ["rows", "apart", "positions", "scattered"]


def strides_in(layout: str, shape: torch.Size) -> tuple[int, int, int]:
    """Return the strides of one of LAYOUTS: dense, with gaps, positions adjacent, nothing adjacent."""
    _, inner, classes = shape
    pitch = classes + 3
    outer_inner_classes = {
        "rows": (inner * classes, classes, 1),
        "apart": (inner * pitch, pitch, 1),
        "positions": (inner * classes, 1, inner),
        "scattered": (2 * inner * classes, 2, 2 * inner),
    }[layout]
    return (*outer_inner_classes[:2], 0) if classes == 1 else outer_inner_classes  # as tile_strides


def span_of(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Return how many elements lie from the first to the last one."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the memory of t with these strides, NaN in its gaps."""
    memory = torch.full((span_of(t.shape, strides),), float("nan"), dtype=t.dtype)
    memory.as_strided(t.shape, strides).copy_(t)
    return memory


def taken_from(memory: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Return the elements, once it is sure that the gaps are as they were: every byte 255."""
    gaps = torch.ones(memory.numel(), dtype=torch.bool)
    gaps.as_strided(shape, strides).fill_(False)
    assert (memory[gaps].view(torch.uint8) == 255).all(), "a gap between rows was written"
    return memory.as_strided(shape, strides)


# Cases


@dataclass
class Pass:
    """What one path of a case computed; tensors of a value for each position, and the gradient."""

    path: str
    underflowed: bool
    total: float
    loss: Tensor
    grad: Tensor
    row_max: Tensor | None = None
    row_sum: Tensor | None = None
    entropy: Tensor | None = None
    predicted: Tensor | None = None
    probability: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class CrossEntropyCase:
    """A problem of cpu/cross_entropy/problem.h with logits (outer, inner, classes), along every path."""

    x: Tensor
    target: Tensor
    layout: str = "rows"
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    z_loss: float = 0.0
    upstream: Tensor | None = None
    two_passes: bool = False
    streaming: bool = False

    temperature: float = 0.0
    """With it the loss is log p_y, and there is an entropy."""

    stats: bool = False
    """With them an entropy, the predicted class and its probability."""

    entropy_upstream: Tensor | None = None

    @property
    def strides(self) -> tuple[int, int, int]:
        """The strides of logits, soft targets and the gradient."""
        return strides_in(self.layout, self.x.shape)

    def packed(self) -> bytes:
        """Return the bytes that the runner reads."""
        outer, inner, classes = self.x.shape
        soft = self.target.is_floating_point()
        real = accumulated(self.x.dtype)
        widened = [
            t if t is None else t.to(real) for t in (self.weight, self.upstream, self.entropy_upstream)
        ]
        weight, upstream, entropy_upstream = widened
        return b"".join((
            integers(STATS if self.stats else CROSS_ENTROPY, DTYPES.index(self.x.dtype)),
            integers(outer * inner, inner, classes, self.ignore_index, self.two_passes, self.streaming,
                     span_of(self.x.shape, self.strides)),
            integers(*self.strides, *self.strides, *self.strides),
            reals(-1.0 if self.temperature else 1 - self.label_smoothing, self.label_smoothing / classes,
                  classes if weight is None else weight.sum().item(), self.z_loss, 1.0,
                  1 / self.temperature if self.temperature else 0.0),
            array(laid_out(self.x, self.strides)),
            array(None if soft else self.target),
            array(laid_out(self.target, self.strides) if soft else None),
            array(weight), array(upstream), array(entropy_upstream),
        ))  # fmt: skip

    def read(self, answer: io.BytesIO) -> list[Pass]:
        """Read the results of all paths."""
        passes, real = [], accumulated(self.x.dtype)
        while (path := read_integer(answer)) >= 0:
            underflowed, total = bool(read_integer(answer)), read_real(answer)
            loss, row_max, row_sum, entropy, _ = (
                read_array(answer, real).view(self.x.shape[:2]) for _ in range(5)
            )
            memory = read_array(answer, self.x.dtype)
            grad = taken_from(memory, self.x.shape, self.strides)
            stats = [read_array(answer, dtype) for dtype in (torch.int64, real)]
            if self.stats:
                stats = [t.view(self.x.shape[:2]) for t in stats]
            passes.append(
                Pass(PATHS[path], underflowed, total, loss, grad, row_max, row_sum, entropy, *stats)
            )
        return passes


@dataclass(frozen=True, kw_only=True)
class KlDivCase:
    """A problem of cpu/kl_div/problem.h with logits (rows, classes) of both, along every path."""

    student: Tensor
    teacher: Tensor
    temperature: float = 1.0
    pitch: int = 0
    upstream: Tensor | None = None
    gradient: bool = True
    streaming: bool = False

    def packed(self) -> bytes:
        """Return the bytes that the runner reads."""
        rows, classes = self.student.shape
        pitch = self.pitch or classes
        upstream = None if self.upstream is None else self.upstream.to(accumulated(self.student.dtype))
        return b"".join((
            integers(KL_DIV, DTYPES.index(self.student.dtype), rows, classes, classes, pitch, self.streaming,
                     self.gradient),
            reals(1 / self.temperature, 1 / self.temperature),
            array(self.student), array(laid_out(self.teacher, (pitch, 1))), array(upstream),
        ))  # fmt: skip

    def read(self, answer: io.BytesIO) -> list[Pass]:
        """Read the results of all paths."""
        passes = []
        while (path := read_integer(answer)) >= 0:
            underflowed, total = bool(read_integer(answer)), read_real(answer)
            loss = read_array(answer, accumulated(self.student.dtype))
            grad = read_array(answer, self.student.dtype)
            if self.gradient:
                grad = grad.view(self.student.shape)
            passes.append(Pass(PATHS[path], underflowed, total, loss, grad))
        return passes


@dataclass(frozen=True, kw_only=True)
class SoftcapCase:
    """A line of logits that are capped, and the upstream gradient of what that leaves."""

    x: Tensor
    upstream: Tensor
    cap: float
    stride: int = 1
    streaming: bool = False

    def packed(self) -> bytes:
        """Return the bytes that the runner reads."""
        return b"".join((
            integers(SOFTCAP, DTYPES.index(self.x.dtype), self.x.numel(), self.stride, self.streaming),
            reals(self.cap), array(laid_out(self.x, (self.stride,))),
            array(self.upstream.to(accumulated(self.x.dtype))),
        ))  # fmt: skip

    def read(self, answer: io.BytesIO) -> tuple[Tensor, Tensor]:
        """Read the capped logits and their gradient."""
        y = read_array(answer, accumulated(self.x.dtype))
        return y, taken_from(read_array(answer, self.x.dtype), self.x.shape, (self.stride,))


@dataclass(frozen=True, kw_only=True)
class GatherCase:
    """A row that gather converts: (x - mean) * scale, channels changing every `run` elements."""

    x: Tensor
    dtype: torch.dtype
    mean: Tensor
    scale: Tensor
    run: int

    def packed(self) -> bytes:
        """Return the bytes that the runner reads."""
        channels = self.mean.numel()
        interleaved = self.run == 1 and channels > 1
        blocks = 64 if interleaved else 1  # kConvertBlock of cpu/gather/rows.h
        return b"".join((
            integers(GATHER, self.x.dtype == torch.uint8, DTYPES.index(self.dtype), self.x.numel(), channels,
                     self.run),
            array(self.x), array(self.mean.repeat(blocks)), array(self.scale.repeat(blocks)),
        ))  # fmt: skip

    def read(self, answer: io.BytesIO) -> Tensor:
        """Read the converted row."""
        return read_array(answer, self.dtype)


@dataclass(frozen=True, kw_only=True)
class ScanCase:
    """Targets, of which the first one out of bounds is looked for."""

    target: Tensor
    classes: int
    ignore_index: int

    def packed(self) -> bytes:
        """Return the bytes that the runner reads."""
        return integers(SCAN_TARGETS, self.classes, self.ignore_index) + array(self.target)

    def read(self, answer: io.BytesIO) -> tuple[int, int]:
        """Read where that is, or -1, and how many targets before it count."""
        return read_integer(answer), read_integer(answer)


Case = CrossEntropyCase | KlDivCase | GatherCase | ScanCase
