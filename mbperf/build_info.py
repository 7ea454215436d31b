"""The record that setup.py leaves beside the extension: what it was built with. Needs no torch."""

import json
from pathlib import Path
from typing import Any

IN_CHECKOUT = (Path(__file__).parents[1] / "setup.py").exists()
REBUILD = (
    "pip install --no-build-isolation -e ."
    if IN_CHECKOUT
    else "pip install --force-reinstall --no-deps --no-build-isolation --no-binary mbperf mbperf"
)
BUILD_INFO_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """Return what the extensions were built with: torch, compiler, flags, git revision, CUDA or why not.

    Raises:
        ImportError: the extension has not been built, or its record is damaged.
    """
    try:
        return json.loads(BUILD_INFO_FILE.read_text())
    except FileNotFoundError:
        raise ImportError(f"mbperf: the C++ extension is not built; run: {REBUILD}") from None
    except json.JSONDecodeError as error:
        raise ImportError(
            f"mbperf: {BUILD_INFO_FILE.name} is damaged ({error}); rebuild with: {REBUILD}"
        ) from None


def cuda_build() -> dict[str, Any]:
    """Return what the record says of the CUDA kernels: "built", and with what, or "because" of what not.

    Raises:
        ImportError: as `build_info`.
    """
    unknown = {"built": False, "because": "the build is older than its CUDA kernels"}
    return build_info().get("cuda", unknown)
