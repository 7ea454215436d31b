"""Plain records of a profile: one per trial, and the answer. Base units; `as_dict` gives what JSON holds."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mbperf.loader.settings import Settings

SCHEMA = "mbperf-loader-1"


@dataclass
class Trial:
    """One trial: its settings and figures, or why it was infeasible. Of several ranks, the slowest's."""

    settings: Settings
    mode: str = "drained"
    round: int = 0
    started_s: float = 0.0
    spent_s: float = 0.0
    rate_samples_per_s: float | None = None
    rate_batches_per_s: float | None = None
    samples: int = 0
    seconds: float = 0.0
    blocks: list[float] = field(default_factory=list)
    wait_p10_s: float | None = None
    wait_p50_s: float | None = None
    wait_p95_s: float | None = None
    wait_p99_s: float | None = None
    first_batch_s: float | None = None
    later_first_batch_s: float | None = None
    epoch_s: list[float] = field(default_factory=list)
    idle_fraction: float | None = None
    step_time_s: float | None = None
    memory: dict[str, Any] | None = None
    whole_epochs: bool = False
    rank_rates: list[float] = field(default_factory=list)
    infeasible: str | None = None
    cause: str | None = None

    @classmethod
    def from_answer(cls, settings: Settings, answer: dict[str, Any], **known: Any) -> "Trial":
        """Return the record of what a trial's process answered."""
        if "infeasible" in answer:
            return cls(settings, infeasible=answer["infeasible"], cause=answer["cause"], **known)
        seconds, waits = answer["seconds"], sorted(answer["waits_s"])
        busy = answer["step_s"] + sum(waits)
        warm = bool(answer["epoch_s"]) or not answer["whole_epochs"]  # else it was cut short in its warm-up
        return cls(
            settings,
            rate_samples_per_s=answer["samples"] / seconds if seconds else None,
            rate_batches_per_s=answer["batches"] / seconds if seconds else None,
            samples=answer["samples"],
            seconds=seconds,
            blocks=answer["blocks"],
            wait_p10_s=quantile(waits, 0.10),
            wait_p50_s=quantile(waits, 0.50),
            wait_p95_s=quantile(waits, 0.95),
            wait_p99_s=quantile(waits, 0.99),
            first_batch_s=answer["first_batch_s"],
            later_first_batch_s=answer["later_first_batch_s"],
            epoch_s=answer["epoch_s"],
            idle_fraction=sum(waits) / busy if known.get("mode") == "paced" and busy and warm else None,
            memory=answer["memory"],
            whole_epochs=answer["whole_epochs"],
            rank_rates=answer.get("rank_rates", []),
            **known,
        )


def quantile(ordered: list[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of the ordered values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else None


@dataclass
class Profile:
    """The answer to: which DataLoader configuration, for this dataset, on this machine, and how sure.

    `bound` is "loader", "compute", "start-up", "step-dependent" (no step time was given) or "infeasible".
    `idle_fraction` is the share to expect: `idle_measured` by a paced consumer, else from the drained rate
    (`idle_from_rate`, slowed as pacing slowed others); `idle_interval` is its 95 % interval.
    `recommendation` holds DataLoader keyword arguments; `call` is the same to paste. Of several ranks all of
    this is each one's own, and `ranks` says what they come to together.
    """

    verdict: str = ""
    bound: str = "infeasible"
    recommendation: dict[str, Any] | None = None
    recommended: Settings | None = None
    call: str | None = None
    confidence: float | None = None
    confidence_words: str = ""
    rate_samples_per_s: float | None = None
    rate_interval: tuple[float, float] | None = None
    rate_batches_per_s: float | None = None
    idle_fraction: float | None = None
    idle_interval: tuple[float, float] | None = None
    idle_from_rate: float | None = None
    idle_measured: float | None = None
    break_even_step_s: float | None = None
    first_batch_s: float | None = None
    later_first_batch_s: float | None = None
    knobs: list[dict[str, Any]] = field(default_factory=list)
    indistinguishable: list[str] = field(default_factory=list)
    configurations: list[dict[str, Any]] = field(default_factory=list)
    not_tried: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    lint: list[dict[str, str]] = field(default_factory=list)
    foreseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    ranks: dict[str, Any] = field(default_factory=dict)
    subject: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    step_time_s: float | None = None
    budget_s: float = 0.0
    spent_s: float = 0.0
    seed: int = 0
    interrupted: bool = False
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    @property
    def exit_code(self) -> int:
        """Return 0: an answer; 3: nothing ran; 4: an answer nobody should rely on; 130: interrupted."""
        if self.interrupted:
            return 130
        if self.recommendation is None:
            return 3
        return 4 if self.confidence is None or self.confidence < 0.5 else 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; numbers that JSON does not know become null."""
        data = {"schema": SCHEMA} | asdict(self) | {"exit_code": self.exit_code}
        return _plain(data)

    def save(self, folder: str | Path) -> Path:
        """Write the record as JSON into `folder` and return the file's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.created[:19].replace(":", "").replace("-", "")
        path = folder / f"loader-{self.subject.get('name', 'dataset')}-{stamp}.json"
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
