"""Known traps of a dataset and its loader, each found by looking, not by guessing.

Random streams and collate are compared through real workers; pickling is tried; attributes are walked.
"""

import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mbperf.loader.settings import Settings
from mbperf.loader.subject import Subject
from mbperf.loader.trial.time_loader import TrialInterrupted

MANY_OBJECTS = 100_000  # at 50 bytes or more each, 5 MB and up are copied into every worker as it reads
LOOK_AT = 8


def lint_subject(subject: Subject, settings: Settings) -> list[dict[str, str]]:
    """Return findings as {"code", "words"}; each check stands alone, so one that breaks hides no other."""
    findings: list[dict[str, str]] = []
    checks: tuple[Callable[[Subject, Settings], str | None], ...] = (
        unpicklable_parts,
        big_python_lists,
        duplicate_random_streams,
        unsharded_iteration,
        collate_disagreement,
    )
    for check in checks:
        try:
            words = check(subject, settings)
        except Exception as error:
            words = f"could not be checked: {type(error).__name__}: {error}".splitlines()[0]
        if words:
            findings.append({"code": check.__name__, "words": words})
    return findings


def unpicklable_parts(subject: Subject, settings: Settings) -> str | None:
    """Return what spawn and forkserver workers (the default from Python 3.14) could not be given."""
    parts = {
        "dataset": subject.dataset,
        "collate_fn": subject.user_collate(),
        "worker_init_fn": subject.template.worker_init_fn if subject.template else subject.worker_init_fn,
    }
    broken = [f"{name} ({error})" for name, part in parts.items() if (error := _pickle_error(part))]
    if not broken:
        return None
    return (
        f"does not pickle: {'; '.join(broken)}. Workers started by spawn or forkserver (the default on Linux "
        "from Python 3.14) fail; use a module-level function instead of a lambda"
    )


def _pickle_error(part: Any) -> str | None:
    try:
        pickle.dump(part, _Discard())
    except Exception as error:
        return str(error).splitlines()[0]
    return None


class _Discard:
    """A file that forgets: pickling is tried without holding a second copy of the dataset."""

    def write(self, data: bytes) -> int:
        return len(data)


def big_python_lists(subject: Subject, settings: Settings) -> str | None:
    """Return the attributes that hold very many Python objects: reading one writes its reference count."""
    found = [
        f"{name} holds about {count:,} Python objects ({size / 1e6:,.0f} MB)"
        for name, count, size in _containers(subject.dataset)
        if count >= MANY_OBJECTS
    ]
    if not found:
        return None
    return (
        f"{'; '.join(found)}: reading changes reference counts, so every worker ends up with its own copy; "
        "numpy arrays, tensors or Arrow tables are shared"
    )


def _containers(dataset: Any) -> Iterator[tuple[str, int, float]]:
    """Yield (name, objects, bytes) of each list, tuple or dict among the dataset and its attributes."""
    if isinstance(dataset, (list, tuple, dict)):
        yield "the dataset", *_estimate(dataset)
    for name, value in getattr(dataset, "__dict__", {}).items():
        if isinstance(value, (list, tuple, dict)):
            yield f"dataset.{name}", *_estimate(value)
    if isinstance(getattr(dataset, "dataset", None), Dataset):
        yield from _containers(dataset.dataset)


def _estimate(container: Any, depth: int = 3) -> tuple[int, float]:
    """Return objects and bytes inside a container, extrapolated from its first few elements."""
    values = container.values() if isinstance(container, dict) else container
    if not len(container):
        return 0, 0.0
    count, size, looked = 0, 0.0, 0
    for value in values:
        inner = isinstance(value, (list, tuple, dict)) and depth > 0
        below, bytes_below = _estimate(value, depth - 1) if inner else (0, 0.0)
        count += 1 + below
        size += sys.getsizeof(value) + bytes_below
        looked += 1
        if looked == LOOK_AT:
            break
    share = len(container) / looked
    return int(count * share), size * share + sys.getsizeof(container)


class _SameSample(Dataset):
    """Give the digest of one and the same sample of a dataset, again and again."""

    def __init__(self, dataset: Any, index: Any):
        self.dataset, self.index = dataset, index

    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> int:
        return digest(self.dataset[self.index])


def digest(value: Any) -> int:
    """Return a number that is equal for equal samples, in whichever process."""
    if isinstance(value, torch.Tensor):
        # Neither pickled, which writes down where the storage lies, nor by numpy, which knows no bfloat16.
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts = [str((value.dtype, tuple(value.shape))).encode(), content]
    elif isinstance(value, dict):
        parts = [repr([(key, digest(item)) for key, item in value.items()]).encode()]
    elif isinstance(value, (list, tuple)):
        parts = [repr([digest(item) for item in value]).encode()]
    else:
        parts = [value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()]
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:8], "little")


def _first(batch: list) -> Any:
    return batch[0]


def duplicate_random_streams(subject: Subject, settings: Settings) -> str | None:
    """Return a finding when random samples vary within a worker but not between workers."""
    if subject.iterable or not subject.length():
        return None
    loader = DataLoader(_SameSample(subject.dataset, 0), 1, num_workers=2, collate_fn=_first,
                        worker_init_fn=_init_of(subject), **_forked())  # fmt: skip
    a, b, c, d = list(loader)  # workers take turns: a and c from worker 0, b and d from worker 1
    if a != c and a == b and c == d:
        return (
            "every worker draws the same random numbers: sample 0 varies, but identically in workers 0 and 1;"
            " seed the dataset's own generator from torch.initial_seed() in worker_init_fn"
        )
    return None


def unsharded_iteration(subject: Subject, settings: Settings) -> str | None:
    """Return a finding when two workers of an iterable dataset deliver the same samples."""
    if not subject.iterable:
        return None
    loader = DataLoader(subject.dataset, batch_size=None, num_workers=2, collate_fn=digest,
                        worker_init_fn=_init_of(subject), **_forked())  # fmt: skip
    digests = [value for value, _ in zip(loader, range(8), strict=False)]
    if len(digests) == 8 and digests[0::2] == digests[1::2] and len(set(digests)) > 1:
        return (
            "every worker iterates over the same samples, so with N workers each arrives N times; "
            "divide the work by torch.utils.data.get_worker_info()"
        )
    return None


def collate_disagreement(subject: Subject, settings: Settings) -> str | None:
    """Return a finding when a worker collates the same samples to something else than the main process."""
    collate = subject.user_collate() or subject.collate("torch")
    if subject.iterable or not subject.batches or not subject.length():
        return None
    length = subject.length() or 0
    samples = [subject.dataset[index] for index in range(min(settings.batch_size or 1, length, 64))]
    main = _collated(samples, collate, {})
    worker = _collated(samples, collate, {"num_workers": 1, **_forked()})
    if main == worker:
        return None
    return f"the same {len(samples)} samples become {main} in the main process and {worker} in a worker"


def _collated(samples: list, collate: Any, workers: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return structure(next(iter(DataLoader(samples, len(samples), collate_fn=collate, **workers))))  # type: ignore[arg-type]
        except TrialInterrupted:
            raise  # the time is up, which says nothing about the batch
        except Exception as error:
            return type(error).__name__


def structure(batch: Any) -> str:
    """Return nesting, dtypes, shapes and a digest of the values of a batch."""
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}#{digest(batch) & 0xFFFF:04x}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {structure(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)) and len(batch) <= LOOK_AT:
        return "[" + ", ".join(structure(value) for value in batch) + "]"
    return type(batch).__name__


def _init_of(subject: Subject) -> Callable | None:
    return subject.template.worker_init_fn if subject.template else subject.worker_init_fn


def _forked() -> dict[str, Any]:
    """Start workers by fork where there is fork: the traps looked for are the dataset's."""
    return (
        {"multiprocessing_context": "fork"} if "fork" in torch.multiprocessing.get_all_start_methods() else {}
    )
