"""Build the C++ extension `mbperf._C` against the torch that will run it.

Use `pip install --no-build-isolation -e .`: an isolated build would see another torch, or none.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REMEDY = "pip install --no-build-isolation -e ."

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(f"mbperf: cannot import torch ({error}); install torch first, then run: {REMEDY}")

COMPILER = os.environ.get("CXX", "g++")
if shutil.which(COMPILER) is None:
    sys.exit(f"mbperf: no C++ compiler ({COMPILER!r} is not on PATH); install one, e.g. apt-get install g++")
if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("mbperf: Python's C headers are missing; install them, e.g. apt-get install python3-dev")

os.environ["CXX"] = COMPILER  # torch would take c++, which may be another one than the record names

SANITIZE = os.environ.get("MBPERF_SANITIZE", "")  # e.g. "address,undefined"; see `make sanitize`

CXX_FLAGS = [
    "-O1" if SANITIZE else "-O3",
    "-g1",
    "-fopenmp",  # without it at::parallel_for compiles to a serial loop
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",  # about passing vectors between functions: here never from one file to another
    "-Werror=return-type",
]
LINK_FLAGS = ["-fopenmp"]
if SANITIZE:
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    LINK_FLAGS += [f"-fsanitize={SANITIZE}"]


def cpp_sources() -> list[str]:
    """Return every C++ file of the CPU extension, relative to the root as setuptools wants it."""
    files = [*ROOT.glob("csrc/*.cpp")]
    for room in ("autograd", "cpu", "python"):
        files += ROOT.glob(f"csrc/{room}/*.cpp")
    return sorted(str(file.relative_to(ROOT)) for file in files)


def first_line(*command: str) -> str:
    """Return the first line a command prints, or an empty string where it cannot run."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.splitlines()[0] if out else ""


class BuildWithInfo(BuildExtension):
    """Build, then leave a record beside the extension that the import compares with what is running."""

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
            "git_revision": first_line("git", "describe", "--always", "--dirty", "--abbrev=12"),
        }
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


setup(
    ext_modules=[
        CppExtension(
            "mbperf._C",
            cpp_sources(),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=LINK_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildWithInfo},
)
