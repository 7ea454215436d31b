"""The rows that join every group by themselves, the base a row is judged against, and the names of means.

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


def mean_label(op: str, facts: Mapping[str, Any]) -> str:
    """Return what the mean over an operation's groups is called: "op device dtype pass", of what there is.

    >>> mean_label("add", {"dtype": "f32", "N": 3}), mean_label("add", {"device": "cuda", "pass": "forward"})
    ('add f32', 'add cuda forward')
    """
    return " ".join(filter(None, [op, *map(facts.get, ("device", "dtype", "pass"))]))
