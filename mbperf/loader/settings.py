"""One configuration of a DataLoader: the knobs that the profiler turns, and how they are written down.

`Settings` is plain data (it travels to subprocesses and into JSON); `keywords` are the arguments that
`torch.utils.data.DataLoader` takes, `call` is the line a reader pastes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

COLLATES = ("user", "torch", "mbperf")
DATASETS = ("user", "mbperf.TensorDataset")
KNOBS = ("num_workers", "batch_size", "prefetch_factor", "pin_memory", "multiprocessing_context", "in_order",
         "persistent_workers", "collate", "dataset")  # fmt: skip


@dataclass(frozen=True, order=True)
class Settings:
    """One DataLoader configuration.

    Args:
        num_workers: worker processes; 0 loads in the consumer's own process.
        batch_size: samples in a batch; None leaves batching to the dataset or to the user's batch sampler.
        prefetch_factor: batches each worker loads ahead; None (and only None) without workers.
        pin_memory: copy batches to page-locked memory.
        persistent_workers: keep workers alive between epochs.
        multiprocessing_context: "fork", "spawn", "forkserver"; None is Python's default.
        in_order: hand batches out in the sampler's order.
        collate: "user" (the loader's own), "torch" (`default_collate`) or "mbperf" (`mbperf.collate`).
        dataset: "user" or "mbperf.TensorDataset" (the same tensors, gathered a batch at a time).

    >>> Settings(num_workers=2, prefetch_factor=4).call()
    'DataLoader(dataset, batch_size=64, num_workers=2, prefetch_factor=4)'
    """

    num_workers: int = 0
    batch_size: int | None = 64
    prefetch_factor: int | None = None
    pin_memory: bool = False
    persistent_workers: bool = False
    multiprocessing_context: str | None = None
    in_order: bool = True
    collate: str = "torch"
    dataset: str = "user"

    def with_workers(self, num_workers: int) -> "Settings":
        """Return the same configuration with another number of workers, and a prefetch that goes with it."""
        if num_workers == 0:
            return replace(
                self,
                num_workers=0,
                prefetch_factor=None,
                persistent_workers=False,
                multiprocessing_context=None,
                in_order=True,
            )
        return replace(self, num_workers=num_workers, prefetch_factor=self.prefetch_factor or 2)

    @property
    def prefetched_batches(self) -> int:
        """Batches in flight between workers and consumer: prefetch_factor x num_workers."""
        return self.num_workers * (self.prefetch_factor or 0)

    def keywords(self) -> dict[str, Any]:
        """Return the DataLoader keyword arguments, without collate_fn and dataset."""
        keywords: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        if self.num_workers:
            keywords["prefetch_factor"] = self.prefetch_factor
            keywords["persistent_workers"] = self.persistent_workers
            if self.multiprocessing_context is not None:
                keywords["multiprocessing_context"] = self.multiprocessing_context
            if not self.in_order:
                keywords["in_order"] = False
        if self.pin_memory:
            keywords["pin_memory"] = True
        return keywords

    def call(self, fixed: Sequence[str] = (), loader: str = "DataLoader") -> str:
        """Return the constructor call, ready to paste; `fixed` are arguments that no trial changes."""
        words = [f"{name}={value!r}" for name, value in self.keywords().items() if value is not False]
        if not self.in_order:
            words.append("in_order=False")
        sampled = any(word.startswith("batch_sampler=") for word in fixed)
        words = [*([] if sampled else words[:1]), *fixed, *words[1:]]
        if self.collate == "mbperf":
            words.append("collate_fn=mbperf.collate")
        elif self.collate == "user":
            words.append("collate_fn=your_collate_fn")
        dataset = "dataset" if self.dataset == "user" else "mbperf.TensorDataset(*tensors)"
        return f"{loader}({', '.join([dataset, *words])})"

    def label(self) -> str:
        """Return a short name for tables: `2 workers, prefetch 4, mbperf.collate`."""
        parts = [f"{self.num_workers} worker" + ("" if self.num_workers == 1 else "s")]
        if self.batch_size is not None:
            parts.append(f"batch {self.batch_size}")
        if self.num_workers and self.prefetch_factor != 2:
            parts.append(f"prefetch {self.prefetch_factor}")
        if self.dataset != "user":
            parts.append(self.dataset)
        if self.collate == "mbperf":
            parts.append("mbperf.collate")
        if self.multiprocessing_context:
            parts.append(self.multiprocessing_context)
        parts += [
            word
            for word, shown in (
                ("pinned", self.pin_memory),
                ("persistent", self.persistent_workers),
                ("any order", not self.in_order),
            )
            if shown
        ]
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return asdict(self)


def changed_knobs(a: Settings, b: Settings) -> list[str]:
    """Return the knobs in which two configurations differ; without workers, those of workers do not count."""
    with_workers = ("prefetch_factor", "multiprocessing_context", "in_order", "persistent_workers")
    skip = with_workers if 0 in (a.num_workers, b.num_workers) else ()
    return [knob for knob in KNOBS if knob not in skip and getattr(a, knob) != getattr(b, knob)]
