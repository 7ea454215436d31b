"""Import what only measuring and reporting need, or say which extra brings it."""

import importlib
from typing import Any

from mbperf.extras import pip_command


def require(module: str, extra: str = "bench") -> Any:
    """Import and return `module`, an optional dependency.

    Args:
        module: dotted name, for instance "scipy.stats".
        extra: the extra of mbperf that installs it.

    Returns:
        The module.

    Raises:
        ImportError: not installed; the message has the pip command that brings it.

    >>> require("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"mbperf: {package} is missing; run: {pip_command(extra)}") from error
