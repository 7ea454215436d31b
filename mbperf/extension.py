"""Load the C++ extension, after checking that it was built for the torch that is running."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."
BUILD_INFO_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """Return what the extension was built with: torch, compiler, flags, git revision.

    Raises:
        ImportError: the extension has not been built.
    """
    try:
        return json.loads(BUILD_INFO_FILE.read_text())
    except FileNotFoundError:
        raise ImportError(f"mbperf: the C++ extension is not built; run: {REBUILD}") from None


def load() -> ModuleType:
    """Import and return `mbperf._C`.

    Raises:
        ImportError: not built, built for another torch, or not loadable; the message says how to rebuild.
    """
    built_for = build_info()["torch"]
    if built_for != torch.__version__:
        raise ImportError(
            f"mbperf: the C++ extension was built for torch {built_for}, but torch {torch.__version__} "
            f"is running; rebuild with: {REBUILD}"
        )
    try:
        from mbperf import _C
    except ImportError as error:
        raise ImportError(
            f"mbperf: cannot load the C++ extension ({error}); rebuild with: {REBUILD}"
        ) from error
    return _C


_C = load()
