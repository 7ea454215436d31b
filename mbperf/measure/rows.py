"""The rows that join every group by themselves, and the base that a row is judged against.

It imports neither a clock nor torch, so that what shows saved runs may read it.
"""

from collections.abc import Mapping
from typing import Any

CONTROL, ROOF, NULL = "again", "roof", "null"


def reference(row: Mapping[str, Any]) -> str | None:
    """Return the base that a row is judged against: torch, or the first where torch is none.

    >>> reference({"ratios": {"numpy": {}, "torch": {}}}), reference({"ratios": {"roof": {}}})
    ('torch', None)
    """
    bases = [base for base in row["ratios"] if base != ROOF]
    return "torch" if "torch" in bases else next(iter(bases), None)
