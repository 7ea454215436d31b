"""The kernels that include no torch, as objects: from the build of the extension, or compiled here."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from mbperf import build_info

ROOT = Path(__file__).parents[2]


def output(*command: str | Path, **settings) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, **settings).stdout


def compiled(source: Path, folder: Path, *command: str) -> Path:
    """Compile a source into a folder by `command`, or with the flags on record of the extension."""
    command = command or (os.environ.get("CXX", "g++"), *build_info.build_info()["cxx_flags"], "-fPIC")
    made = folder / f"{source.parent.name}-{source.stem}.o"
    output(*command, "-std=c++20", f"-I{ROOT / 'csrc'}", "-c", source, "-o", made)
    return made


def included(sources: Sequence[Path], *command: str) -> list[Path]:
    """Return sources and the headers of the project that `command`, or the compiler, reads for them."""
    command = command or (os.environ.get("CXX", "g++"),)
    csrc = ROOT / "csrc"
    relative = [source.relative_to(csrc) for source in sources]
    rules = output(*command, "-std=c++20", "-MM", "-I.", *relative, cwd=csrc)
    files = {csrc / word for word in rules.replace("\\\n", " ").split() if not word.endswith(":")}
    return sorted(files)


def object_of(source: Path, folder: Path) -> Path:
    """Return the object of a source from the build; one that is not there is compiled into the folder."""
    newest = max(file.stat().st_mtime for file in included([source]))
    built = ROOT / "build" / f"temp-torch-{torch.__version__}" / source.relative_to(ROOT).with_suffix(".o")
    fresh = built.exists() and built.stat().st_mtime > newest
    return built if fresh else compiled(source, folder)
