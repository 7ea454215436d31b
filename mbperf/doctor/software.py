"""Findings about what is installed: Python, torch, the extension's build, extras, the lesson's data."""

import sys
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from mbperf import build_info, extras
from mbperf.doctor.finding import Finding

GET_MNIST = "python -c \"from mbperf.lesson.data import get_data; get_data('mnist')\""
SOURCES = Path(__file__).parents[2] / "csrc"


def torch_module() -> ModuleType:
    """Import and return torch."""
    return import_module("torch")


def extension_module() -> ModuleType:
    """Import and return `mbperf._C`, with its checks.

    Raises:
        ImportError: it is not built, was built for another torch, or does not load.
    """
    return import_module("mbperf.extension")._C


def ask_extension(question: str) -> Any:
    """Call a function of `mbperf._C` that takes nothing, and return its answer.

    Raises:
        ImportError: the extension does not load, or is too old to know the function.
    """
    extension = extension_module()
    if not hasattr(extension, question):
        raise ImportError(f"the extension has no {question}(); rebuild with: {build_info.REBUILD}")
    return getattr(extension, question)()


def versions() -> Finding:
    """Return the versions of mbperf and Python."""
    version, python = metadata.version("mbperf"), sys.version.split()[0]
    return Finding("mbperf", f"{version}, on Python {python}", values={"mbperf": version, "python": python})


def torch() -> Finding:
    """Tell whether torch imports, and which it is."""
    try:
        module = torch_module()
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        return Finding("torch", f"cannot be imported: {first_line(error)}", "wrong", "pip install torch")
    kind = f"with CUDA {module.version.cuda}" if module.version.cuda else "without CUDA"
    values = {"torch": module.__version__, "cuda": module.version.cuda}
    return Finding("torch", f"{module.__version__}, built {kind}", values=values)


def build() -> Finding:
    """Tell whether the extension is built, for this torch, from these sources, and loads."""
    try:
        info = build_info.build_info()
        extension_module()
    except (ImportError, OSError) as error:
        return Finding("extension", first_line(error), "wrong", build_info.REBUILD)
    if complaint := build_complaint(info):
        return Finding("extension", complaint, "wrong", build_info.REBUILD, info)
    made = (
        f"built for torch {info['torch']} by {info['compiler']}, revision {info['git_revision'] or 'unknown'}"
    )
    return Finding("extension", made, values=info)


def build_complaint(info: dict[str, Any]) -> str:
    """Return why a build that loads should not be used, or an empty string."""
    if info["sanitize"]:
        return f"built with sanitizers ({info['sanitize']}): many times slower"
    cuda = info.get("cuda", {}).get("built", False)
    changed = sorted(path.name for path in newer(sources(cuda), build_info.BUILD_INFO_FILE))
    if not changed:
        return ""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"older than its sources: {', '.join(changed[:3])}{more} changed since"


def sources(cuda: bool, below: Path | None = None) -> list[Path]:
    """Return the sources of a checkout, csrc/cuda only if asked for; none where there is no checkout."""
    below = below or SOURCES
    files = [file for kind in ("cpp", "h", "cu", "cuh") for file in below.rglob(f"*.{kind}")]
    return [file for file in files if cuda or below / "cuda" not in file.parents]


def newer(files: list[Path], than: Path) -> list[Path]:
    """Return the files that changed after another one did."""
    return [file for file in files if file.stat().st_mtime > than.stat().st_mtime]


def extra(name: str) -> Finding:
    """Tell whether an optional part can be used."""
    absent = extras.missing(name)
    if absent:
        fact = f"not installed: {', '.join(absent)}"
        return Finding(f"extra {name}", fact, "note", extras.pip_command(name), {"missing": absent})
    return Finding(f"extra {name}", "installed", values={"missing": []})


def lesson_data() -> Finding:
    """Tell whether MNIST lies in the cache, whole, or the embedded digits take its place."""
    mnist = import_module("mbperf.lesson.mnist")
    folder = mnist.cache_folder()
    if not mnist.has_mnist(folder):
        fact = f"MNIST is not in {folder}; the embedded digits take its place"
        return Finding("lesson data", fact, "note", GET_MNIST, {"mnist": False, "folder": str(folder)})
    values = {"mnist": True, "folder": str(folder)}
    try:
        mnist.read_mnist(folder)
    except (ValueError, OSError, EOFError) as error:
        return Finding("lesson data", first_line(error), "wrong", f"rm -r {folder}", values)
    return Finding("lesson data", f"MNIST, in {folder}", values=values)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
