"""The record that every check of the doctor returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        subject: what was looked at, in a word or two.
        fact: what was found, in one line.
        state: "wrong" makes the doctor exit with 1; "note" is worth knowing and does no harm.
        remedy: what to do about it: always given where the state is "wrong".
        values: the same as numbers and names, for `--json`.
    """

    subject: str
    fact: str
    state: State = "ok"
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
