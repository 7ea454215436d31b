"""The rows that join every group by themselves, and the base that a row is judged against.

It imports neither a clock nor torch, so that what shows saved runs may read it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

CONTROL, ROOF, NULL = "again", "roof", "null"


def reference(row: Mapping[str, Any]) -> str | None:
    """Return the base that a row is judged against: torch, or the first where torch is none.

    >>> reference({"ratios": {"numpy": {}, "torch": {}}}), reference({"ratios": {"roof": {}}})
    ('torch', None)
    """
    return reference_of(base for base in row["ratios"] if base != ROOF)


def reference_of(bases: Iterable[str]) -> str | None:
    """Return the one of these bases that a subject is judged against, or None where there is none.

    >>> reference_of(["numpy", "jax"])
    'numpy'
    """
    names = list(bases)
    return "torch" if "torch" in names else next(iter(names), None)
