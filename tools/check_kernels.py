"""Compile every file of csrc/cuda, for several chips out of reach, and print what each kernel takes of one.

`make check-cuda`. Fails where a file does not compile, a kernel spills registers or no file compiles it, a
chip is missing from an object, or no file defines a launch. Without nvcc it says so, checks nothing, passes.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
FOLDER = ROOT / "build" / "check-cuda"
# A100; Hopper with its own instructions; Blackwell.
CHIPS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
NUMBER = {chip: int(re.sub(r"\D", "", chip)) for chip in CHIPS}
FAT_BINARY = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # its mark, version and header size
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<chip>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """One kernel for one chip, as ptxas reports it."""

    name: str
    chip: str
    registers: int
    spilled_bytes: int


def nvcc() -> tuple[Path | None, str]:
    """Return the compiler and where it was looked for: CUDA_HOME alone where that is set, as torch does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        place = Path(home, "bin", "nvcc")
        return (place if place.exists() else None), f"CUDA_HOME={home}"
    places = (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    found = next((Path(place) for place in places if place and Path(place).exists()), None)
    return found, "PATH and /usr/local/cuda"


def flags(source: Path) -> list[str]:
    """Return nvcc's flags for kernels, which include no torch, or for host code, which it hands to g++."""
    if source.suffix == ".cu":
        chips = [f"-gencode=arch={virtual},code={chip}" for chip, virtual in CHIPS.items()]
        # Without -O: that is the host's, device code is always optimised.
        return [f"-I{CSRC}", "-std=c++17", "-Xptxas", "-v", *chips]
    import torch
    from torch.utils.cpp_extension import include_paths

    standard = "c++20" if torch.__version__ >= "2.13" else "c++17"
    # A CPU wheel has c10's CUDA headers but not the one that its build would have generated.
    names = ("C10_CUDA_NO_CMAKE_CONFIGURE_FILE", "AT_PER_OPERATOR_HEADERS", "TORCH_EXTENSION_NAME=_C_cuda")
    macros = [f"-D{name}" for name in names]
    folders = [*include_paths(), sysconfig.get_path("include")]
    headers = [word for folder in folders for word in ("-isystem", folder)]
    return [
        f"-I{CSRC}",
        f"-std={standard}",
        "-Xcompiler=-Wall,-Werror,-fvisibility=hidden",
        *macros,
        *headers,
    ]


def compile_one(compiler: Path, source: Path) -> tuple[Path, str]:
    """Compile a file to an object; return it and what ptxas said. Raises RuntimeError with nvcc's words."""
    name = source.relative_to(CUDA)
    target = (FOLDER / name).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    command = [compiler, *flags(source), "-c", source, "-o", target]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name} does not compile:\n{run.stdout}{run.stderr}")
    print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return target, run.stdout + run.stderr


def sources() -> list[Path]:
    """Return the files of the extension: kernels first, those with most to compile at the head."""

    def order(file: Path) -> tuple[bool, int]:
        return file.suffix == ".cpp", -sum(header.stat().st_size for header in file.parent.glob("*.cuh"))

    files = [file for file in CUDA.rglob("*") if file.suffix in (".cu", ".cpp")]
    return sorted((file for file in files if not file.is_relative_to(CUDA / "host_shim")), key=order)


def demangled(names: list[str]) -> list[str]:
    """Return names as C++ has them."""
    text = "\n".join(names)
    run = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def kernels(report: str) -> list[Kernel]:
    """Return the kernels of one compilation, in the order of the report."""
    found = [m.groupdict() for m in ENTRY.finditer(report)]
    names = demangled([entry["name"] for entry in found])
    return [
        Kernel(short(name), e["chip"], int(e["registers"]), int(e["stores"]) + int(e["loads"]))
        for name, e in zip(names, found, strict=True)
    ]


def short(name: str) -> str:
    """Return a kernel's name and template arguments, without its namespace and its parameters."""
    name = re.sub(r"mbperf::(cuda::)?|^void ", "", name)
    for number, target in enumerate(("hard", "smooth", "any", "entropy")):
        name = name.replace(f"(Target){number}", target)
    name = re.sub(r"\((?:bool|int)\)", "", name)
    return re.sub(r"\((?!anonymous).*$", "", name)


def chips_in(target: Path) -> set[int]:
    """Return the architectures, 90 for sm_90a, whose machine code the fat binary of an object holds.

    As `cuobjdump --list-elf` does, which a compiler-only install lacks. A fat binary is a header of 16 bytes,
    its size last, and entries: kind (2 is machine code), header and body size, architecture from byte 28 on.
    """
    data = target.read_bytes()
    found: set[int] = set()
    start = data.find(FAT_BINARY)
    while start >= 0:
        (size,) = struct.unpack_from("<Q", data, start + 8)
        entry, end = start + 16, start + 16 + size
        while entry < end:
            kind, _, header, body = struct.unpack_from("<HHIQ", data, entry)
            if kind == 2:
                found.add(struct.unpack_from("<I", data, entry + 28)[0])
            entry += header + body
        start = data.find(FAT_BINARY, end)
    return found


def table(found: list[Kernel]) -> list[str]:
    """Return a line a kernel, registers by chip; `!` marks a spill, with its bytes."""
    lines: dict[str, dict[str, str]] = {}
    for k in found:
        cell = f"{k.registers}" + (f"! {k.spilled_bytes} B" if k.spilled_bytes else "")
        lines.setdefault(k.name, {})[k.chip] = cell
    width = max(map(len, lines), default=0)
    head = "registers".ljust(width) + "".join(f"{chip:>10}" for chip in CHIPS)
    return [
        head,
        *(n.ljust(width) + "".join(f"{c.get(x, '-'):>10}" for x in CHIPS) for n, c in lines.items()),
    ]


def uncompiled(found: list[Kernel]) -> list[str]:
    """Return the kernels that some *kernels.cuh defines and no file compiles."""
    defined = set()
    for file in CUDA.rglob("*kernels.cuh"):
        defined |= set(re.findall(r"\b(\w+_kernel)\(", file.read_text()))
    return sorted(defined - {k.name.split("<")[0] for k in found})


def symbols(target: Path, which: str) -> set[str]:
    """Return the project's functions in an object: those it has `--defined-only` or `--undefined-only`."""
    lines = subprocess.run(["nm", which, target], capture_output=True, text=True, check=True).stdout
    return {name for line in lines.splitlines() if "6mbperf" in (name := line.split()[-1])}


def undefined(targets: list[Path]) -> list[str]:
    """Return the project's functions that an object needs and none has, which only a linker would miss."""
    needed = set().union(*(symbols(target, "--undefined-only") for target in targets))
    defined = set().union(*(symbols(target, "--defined-only") for target in targets))
    return demangled(sorted(needed - defined))


def main() -> int:
    """Compile everything; print the table; return the exit status."""
    compiler, places = nvcc()
    if compiler is None:
        print(f"check-cuda: skipped: no nvcc in {places}; no CUDA kernel was compiled or checked")
        return 0
    files = sources()
    hosts = sum(file.suffix == ".cpp" for file in files)
    print(f"check-cuda: {len(files) - hosts} files of kernels for {', '.join(CHIPS)} by {compiler},")
    print(f"  {hosts} of host code by the compiler that it hands them to, against torch's headers")
    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            built = list(pool.map(lambda source: compile_one(compiler, source), files))
    except RuntimeError as error:
        print(f"check-cuda: {error}", file=sys.stderr)
        return 1
    found = [k for _, report in built for k in kernels(report)]
    print("\n".join(table(found)))
    present = {target: chips_in(target) for target, report in built if kernels(report)}
    faults = [f"{k.name} spills {k.spilled_bytes} bytes on {k.chip}" for k in found if k.spilled_bytes]
    faults += [f"no file compiles {name}" for name in uncompiled(found)]
    faults += [f"no file defines {name}" for name in undefined([target for target, _ in built])]
    for target, numbers in present.items():
        lacking = [chip for chip in CHIPS if NUMBER[chip] not in numbers]
        faults += [f"{target.relative_to(FOLDER)} lacks {chip}" for chip in lacking]
    for fault in faults:
        print(f"check-cuda: {fault}", file=sys.stderr)
    print(f"check-cuda: {len(found)} kernels compiled, {len(faults)} faults; machine code by object:")
    for target, numbers in present.items():
        print(f"  {target.relative_to(FOLDER)}: {', '.join(f'sm_{number}' for number in sorted(numbers))}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
