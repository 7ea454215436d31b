"""Load the extensions, after checking that they were built for the torch that is running."""

from types import ModuleType

import torch

from mbperf.build_info import REBUILD, build_info, cuda_build


def load() -> ModuleType:
    """Import and return `mbperf._C`.

    Raises:
        ImportError: not built, built for another torch, or not loadable; the message says how to rebuild.
    """
    built_for = build_info()["torch"]
    if built_for != torch.__version__:
        # Of a release without a label pip may take the build for CUDA; that one's own label is on no index.
        back = built_for if built_for.endswith("+cpu") else built_for.partition("+")[0]
        raise ImportError(
            f"mbperf: the C++ extension was built for torch {built_for}, but torch {torch.__version__} "
            f"is running; go back to it: pip install torch=={back}, "
            f"or rebuild with: {REBUILD}"
        )
    try:
        from mbperf import _C
    except ImportError as error:
        raise ImportError(
            f"mbperf: cannot load the C++ extension ({error}); rebuild with: {REBUILD}"
        ) from error
    return _C


def load_cuda() -> ModuleType | None:
    """Import and return `mbperf._C_cuda`, whose operators register themselves; None where it is not built.

    Raises:
        ImportError: the record says that it was built, but it does not load.
    """
    if not cuda_build()["built"]:
        return None
    try:
        from mbperf import _C_cuda
    except ImportError as error:
        raise ImportError(
            f"mbperf: cannot load the CUDA extension ({error}); rebuild with: {REBUILD}, or without CUDA: "
            f"MBPERF_CUDA=0 {REBUILD}"
        ) from error
    return _C_cuda


_C = load()
_C.memory_stats()  # reads MBPERF_MEMORY_CACHE: a bad value is an error here, not in the middle of a step
_C_cuda = load_cuda()
