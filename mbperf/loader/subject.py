"""The subject of a profile: a dataset, or a ready DataLoader whose class and arguments all trials keep.

Each trial rebuilds the loader from public arguments and attributes only, so any DataLoader subclass works.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from mbperf.loader.settings import Settings
from mbperf.loader.shard import Shard


@dataclass
class Hooks:
    """Stand-ins for the user's dataset, collate_fn and worker_init_fn in instrumented runs."""

    wrap_dataset: Callable[[Any], Any] = lambda dataset: dataset
    wrap_collate: Callable[[Callable], Callable] = lambda collate: collate
    wrap_init: Callable[[Callable | None], Callable | None] = lambda init: init


@dataclass
class Subject:
    """A dataset, what its user fixed for all trials, and which rank's share of it they read.

    A stream is not divided here: it splits itself by rank, as in training, or not.
    """

    dataset: Any
    template: DataLoader | None = None
    collate_fn: Callable | None = None
    step: Callable | None = None
    shuffle: bool | None = None
    drop_last: bool = False
    worker_init_fn: Callable | None = None
    shard: Shard = field(default_factory=Shard)
    notes: list[str] = field(default_factory=list)

    @property
    def iterable(self) -> bool:
        """True for an iterable-style dataset."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def shuffled(self) -> bool:
        """True when trials draw samples in random order."""
        if self.iterable:
            return False
        if self.template is not None:
            return isinstance(self.template.sampler, RandomSampler)
        return self.shuffle is not False

    def length(self) -> int | None:
        """Return the number of samples, or None where the dataset does not say (or is infinite)."""
        try:
            return len(self.dataset)
        except (TypeError, NotImplementedError, AttributeError):
            return None

    def share(self) -> int | None:
        """Return the number of samples that a rank's loader goes through; None where that is not known."""
        length = self.length()
        return length if length is None or self.iterable else self.shard.share_of(length)

    def own_settings(self) -> Settings | None:
        """Return the settings of the user's ready loader; None when only a dataset was given."""
        loader = self.template
        if loader is None:
            return None
        context = loader.multiprocessing_context
        return Settings(
            num_workers=loader.num_workers,
            batch_size=loader.batch_size,
            prefetch_factor=loader.prefetch_factor,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            multiprocessing_context=getattr(context, "_name", None) if context else None,
            in_order=getattr(loader, "in_order", True),
            collate="user" if self.user_collate() else "torch",
        )

    def user_collate(self) -> Callable | None:
        """Return the user's own collate_fn, or None when it is torch's."""
        if self.collate_fn is not None:
            return self.collate_fn
        if self.template is None or not self.batches:
            return None
        collate = self.template.collate_fn
        return None if collate is default_collate else collate

    @property
    def batches(self) -> bool:
        """True when the loader collates batches (batch_size=None without a batch sampler does not)."""
        return self.template is None or self.template.batch_sampler is not None

    @property
    def fixed_batches(self) -> bool:
        """True when the user's own batch sampler decides what a batch is."""
        loader = self.template
        return loader is not None and not (
            loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
        )

    def tensors(self) -> tuple[torch.Tensor, ...] | None:
        """Return the tensors of a plain torch TensorDataset; None for anything else."""
        return self.dataset.tensors if type(self.dataset) is TensorDataset else None

    def collate(self, name: str) -> Callable | None:
        """Return the collate function that `name` in Settings stands for."""
        if name == "mbperf":
            return mbperf_name("collate")
        return self.user_collate() if name == "user" else default_collate

    def dataset_for(self, settings: Settings) -> Any:
        """Return the dataset that these settings read."""
        if settings.dataset == "user":
            return self.dataset
        return mbperf_name("TensorDataset")(*(self.tensors() or ()))

    def make(self, settings: Settings, hooks: Hooks | None = None) -> DataLoader:
        """Return a fresh loader with these settings: the user's class and arguments, the given knobs."""
        hooks = hooks or Hooks()
        keywords = self._fixed_keywords(settings) | settings.keywords()
        dataset = hooks.wrap_dataset(self.dataset_for(settings))
        if self.batches:
            keywords["collate_fn"] = hooks.wrap_collate(self.collate(settings.collate) or default_collate)
        elif self.template is not None:
            keywords["collate_fn"] = hooks.wrap_collate(self.template.collate_fn)
        keywords["worker_init_fn"] = hooks.wrap_init(keywords.get("worker_init_fn"))
        if "batch_sampler" in keywords:
            keywords.pop("batch_size")
        if self.template is None:
            return DataLoader(dataset, **keywords)
        return type(self.template)(dataset, **accepted(self.template, keywords))

    def _fixed_keywords(self, settings: Settings) -> dict[str, Any]:
        loader = self.template
        if loader is None:
            fixed: dict[str, Any] = {"worker_init_fn": self.worker_init_fn, "drop_last": self.drop_last}
            if self.iterable:
                return fixed
            return fixed | self.shard.order(self.dataset, self.shuffled, self.drop_last)
        fixed = {
            "worker_init_fn": loader.worker_init_fn,
            "timeout": loader.timeout,
            "generator": loader.generator,
        }
        if self.iterable:
            return fixed | {"drop_last": loader.drop_last}
        if self.fixed_batches:
            batches = self.shard.part_of(loader.batch_sampler, self.dataset, loader.drop_last)
            return fixed | {"batch_sampler": batches}
        sampler = self.shard.part_of(loader.sampler, self.dataset, loader.drop_last)
        return fixed | {"sampler": sampler, "drop_last": loader.drop_last}


def accepted(template: DataLoader, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that a DataLoader subclass takes, with its own extra arguments from its attributes.

    Raises:
        TypeError: the class needs an argument that is neither a DataLoader keyword nor an attribute.
    """
    kind, own = type(template), own_arguments(template)
    parameters = list(inspect.signature(kind.__init__).parameters.values())[2:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        chosen = dict(keywords)
    else:
        names = {parameter.name for parameter in parameters}
        chosen = {name: value for name, value in keywords.items() if name in names}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in keywords:
            continue
        if parameter.name in own:
            chosen[parameter.name] = own[parameter.name]
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"profile: {kind.__name__} cannot be rebuilt: its argument {parameter.name!r} is neither a "
                f"DataLoader keyword nor an attribute of the loader; pass the dataset instead"
            )
    return chosen


_PUBLIC = frozenset(inspect.signature(DataLoader.__init__).parameters)


def own_arguments(template: DataLoader) -> dict[str, Any]:
    """Return the arguments that only the user's subclass takes and that it keeps as attributes."""
    parameters = inspect.signature(type(template).__init__).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {n: getattr(template, n) for n in names if n not in _PUBLIC and hasattr(template, n)}


def mbperf_name(name: str) -> Any:
    """Return a public name of mbperf, imported only now.

    Raises:
        ImportError: this installation does not have it.
    """
    import mbperf

    try:
        return getattr(mbperf, name)
    except (AttributeError, ImportError) as error:
        raise ImportError(f"this installation has no mbperf.{name}") from error


def resolve(obj: Any, **fixed: Any) -> Subject:
    """Return the Subject for a dataset, a DataLoader, plain tensors, or a callable that makes one of these.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(obj, type):
        obj = obj()
    if isinstance(obj, DataLoader):
        return Subject(obj.dataset, template=obj, **fixed)
    if isinstance(obj, torch.Tensor):
        obj = (obj,)
    if isinstance(obj, tuple) and obj and all(isinstance(part, torch.Tensor) for part in obj):
        return Subject(TensorDataset(*obj), **fixed)
    if isinstance(obj, IterableDataset) or (hasattr(obj, "__getitem__") and hasattr(obj, "__len__")):
        return Subject(obj, **fixed)
    if isinstance(obj, torch.utils.data.Dataset) and not callable(obj):
        return Subject(obj, **fixed)
    if callable(obj):
        return resolve(obj(), **fixed)
    raise TypeError(
        "profile: dataset must be a map-style or iterable Dataset, a DataLoader, tensors of equal length, or "
        f"a function that returns one of these; got {type(obj).__name__}"
    )


def fixed_words(subject: Subject) -> list[str]:
    """Return the arguments as they stand in a call; what has no short spelling becomes `your_<name>`.

    >>> fixed_words(Subject(list(range(3)), drop_last=True))
    ['shuffle=True', 'drop_last=True']
    """
    loader = subject.template
    words = order_words(subject)
    if loader is not None:
        words += [f"{name}={spelled(name, value)}" for name, value in own_arguments(loader).items()]
        words += ["generator=your_generator"] if loader.generator is not None else []
        words += [f"timeout={loader.timeout!r}"] if loader.timeout else []
    kept = subject if loader is None else loader
    words += ["drop_last=True"] if kept.drop_last else []
    words += ["worker_init_fn=your_worker_init_fn"] if kept.worker_init_fn is not None else []
    return words


def order_words(subject: Subject) -> list[str]:
    """Return which argument decides the order of samples: none, shuffle, or the user's own sampler."""
    if subject.iterable:
        return []
    if subject.template is None:
        return subject.shard.words(subject.shuffled)
    if subject.fixed_batches:
        return ["batch_sampler=your_batch_sampler"]
    sampler = subject.template.sampler
    plain = type(sampler) is SequentialSampler
    if plain or is_plain_shuffle(sampler, subject.length()):
        return subject.shard.words(not plain)
    return ["sampler=your_sampler"]


def is_plain_shuffle(sampler: Any, length: int | None) -> bool:
    """Tell whether shuffle=True would make this sampler: each sample once."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == length


def spelled(name: str, value: Any) -> str:
    """Return a value as a call would spell it."""
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"your_{name}"
