"""Build the extensions `mbperf._C` and, where it can be, `mbperf._C_cuda` against the torch that runs them.

Use `pip install --no-build-isolation -e .`: an isolated build would see another torch, or none. MBPERF_CUDA=0
leaves the CUDA kernels out, MBPERF_CUDA=1 fails where they cannot be built; no GPU is needed to build them.
MBPERF_PIN_TORCH=1 is for a wheel: what it installs beside is the torch that it was built for, and no other.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REMEDY = "pip install --no-build-isolation -e ."


def toolkit() -> Path | None:
    """Return the folder of the CUDA toolkit; above nvcc it need not be, which may be a link or a wrapper."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders.append(Path("/usr/local/cuda"))
    return next((folder for folder in folders if (folder / "include/cuda_runtime_api.h").exists()), None)


if not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ) and (folder := toolkit()):
    os.environ["CUDA_HOME"] = str(folder)  # torch takes the folder above nvcc unseen

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"mbperf: cannot import torch ({error}); install torch first, then run: {REMEDY}")

COMPILER = os.environ.get("CXX", "g++")
if shutil.which(COMPILER) is None:
    sys.exit(f"mbperf: no C++ compiler ({COMPILER!r} is not on PATH); install one, e.g. apt-get install g++")
if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("mbperf: Python's C headers are missing; install them, e.g. apt-get install python3-dev")

os.environ["CXX"] = COMPILER  # torch would take c++, which may be another one than the record names

SANITIZE = os.environ.get("MBPERF_SANITIZE", "")  # e.g. "address,undefined"; see `make sanitize`


def accepts(*flags: str, text: str = "") -> bool:
    """Return whether the compiler takes these flags, for a source of this text."""
    command = [COMPILER, "-Werror", *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).returncode == 0


if not accepts("-fopenmp", text="#include <omp.h>\n"):
    sys.exit(
        f"mbperf: {COMPILER} has no OpenMP, without which every loop is serial; install it, e.g. "
        "apt-get install libomp-dev for clang"
    )

CXX_FLAGS = [
    "-O1" if SANITIZE else "-O3",
    "-fopenmp",  # without it at::parallel_for compiles to a serial loop
    "-fvisibility=hidden",
    "-Wall",
    "-Werror=return-type",
    "-DNDEBUG",
    "-fwrapv",
    "-DAT_PER_OPERATOR_HEADERS",  # torch's headers then include the operators that they use, not all of them
]
# Of gcc, and of clang in some releases.
CXX_FLAGS += filter(
    accepts,
    [
        "-g1",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",  # about passing vectors between functions: here never from one file to another
    ],
)
LINK_FLAGS = ["-fopenmp"]
if platform.libc_ver()[0] == "glibc":
    LINK_FLAGS.append("-Wl,--wrap=pthread_once")  # see csrc/glibc.cpp
if SANITIZE:
    CXX_FLAGS += filter(accepts, ["-fno-tree-sra"])  # at which gcc 12 crashes in the kernels under -O1
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    LINK_FLAGS += [f"-fsanitize={SANITIZE}"]

# Kernels that use clusters need nothing beyond sm_90. Without a list torch would look for GPUs to build for.
CUDA_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHITECTURES
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]


# Folders of what is built by its own tool and belongs to no extension.
PROGRAMS = {"counters", "host_shim", "kernel_runner"}


def sources(cuda: bool) -> list[str]:
    """Return the sources below csrc/ of one extension, relative to the root as setuptools wants it."""
    files = [file.relative_to(ROOT) for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".cu")]
    module = Path("csrc/python/module.cpp")  # which includes the others of its folder
    return sorted(
        str(file)
        for file in files
        if ("cuda" in file.parts) is cuda
        and not PROGRAMS & set(file.parts)
        and (file == module or not file.is_relative_to(module.parent))
    )


def nvcc_release() -> str:
    """Return the release of the toolkit that torch would use, as in "13.0", or an empty string."""
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def why_no_cuda() -> str:
    """Return why the CUDA kernels are not built, or an empty string where they are."""
    asked = os.environ.get("MBPERF_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        sys.exit(f"mbperf: MBPERF_CUDA expects auto, 0 or 1, got {asked!r}")
    if asked == "0":
        return "MBPERF_CUDA=0"
    reason, release = "", nvcc_release()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif not release:
        reason = f"no CUDA toolkit (nvcc) beside torch's CUDA {torch.version.cuda}; set CUDA_HOME"
    elif release.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is CUDA {release}, torch is built for CUDA {torch.version.cuda}"
    elif SANITIZE:
        reason = "the sanitizers are those of the host compiler"
    if reason and asked == "1":
        sys.exit(f"mbperf: MBPERF_CUDA=1, but {reason}")
    return reason


WHY_NO_CUDA = why_no_cuda()


def extensions() -> list[CppExtension]:
    """Return what is to be built."""
    options = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": LINK_FLAGS}
    flags = {"cxx": CXX_FLAGS}
    built = [CppExtension("mbperf._C", sources(cuda=False), extra_compile_args=flags, **options)]
    if not WHY_NO_CUDA:
        flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
        built.append(CUDAExtension("mbperf._C_cuda", sources(cuda=True), extra_compile_args=flags, **options))
    return built


def cuda_record() -> dict[str, object]:
    """Return what the record says of the CUDA kernels: how they were built, or why not."""
    if WHY_NO_CUDA:
        return {"built": False, "because": WHY_NO_CUDA}
    return {
        "built": True,
        "nvcc": nvcc_release(),
        "architectures": CUDA_ARCHITECTURES,
        "nvcc_flags": NVCC_FLAGS,
    }


def first_line(*command: str) -> str:
    """Return the first line a command prints, or an empty string where it cannot run."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.splitlines()[0] if out else ""


class BuildWithInfo(BuildExtension):
    """Build, then leave a record beside the extension that the import compares with what is running."""

    def build_extensions(self) -> None:
        """Build with the flags above alone; those that Python was built with differ from one to the next."""
        self.compiler.compiler_so = [COMPILER, "-fPIC"]
        super().build_extensions()

    def run(self) -> None:
        """Build as torch does, in a folder that is kept; then write the record."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        if in_place:
            # Kept, so that a change of one file compiles one file; setuptools would take a fresh folder. One
            # for each torch: its headers are system headers, which ninja does not watch.
            self.build_temp = str(ROOT / "build" / f"temp-torch-{torch.__version__}")
        super().run()
        folder = ROOT / "mbperf" if in_place else Path(self.build_lib) / "mbperf"
        info = {
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "compiler": first_line(COMPILER, "--version"),
            "cxx_flags": CXX_FLAGS,
            "sanitize": SANITIZE,
            "cuda": cuda_record(),
            "git_revision": first_line("git", "describe", "--always", "--dirty", "--abbrev=12"),
        }
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


PIN_TORCH = os.environ.get("MBPERF_PIN_TORCH") == "1"
# The installed version, not the one torch tells: of a build for CUDA that has a label which no index has.
TORCH = f"torch=={version('torch')}" if PIN_TORCH else "torch>=2.11"

setup(
    ext_modules=extensions(),
    install_requires=[TORCH, "click>=8.1"],
    cmdclass={"build_ext": BuildWithInfo},
)
