"""The optional parts of mbperf, and the packages each one needs, as the installed metadata lists them."""

import re
from importlib import metadata

EXTRAS = ("bench", "loader", "lesson", "test")

_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+)[^;]*;\s*extra\s*==\s*["'](?P<extra>[\w-]+)["']""")


def packages(extra: str) -> list[str]:
    """Return the names of the packages that an extra brings, in the order of pyproject.toml."""
    found = (_REQUIREMENT.match(line) for line in metadata.requires("mbperf") or [])
    return [match["name"] for match in found if match and match["extra"] == extra]


def missing(extra: str) -> list[str]:
    """Return those packages of an extra that are not installed."""
    return [name for name in packages(extra) if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Tell whether a package is installed, without importing it."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def extra_that_brings(module: str, prefer: str = "") -> str | None:
    """Return the extra whose package holds a module that failed to import, or None where none does.

    Args:
        module: dotted name of the module, as in `ModuleNotFoundError.name`.
        prefer: the extra to name where several bring it.
    """
    package = module.partition(".")[0].replace("_", "-")
    return next((extra for extra in (prefer, *EXTRAS) if package in packages(extra)), None)


def pip_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "mbperf[{extra}]"'
