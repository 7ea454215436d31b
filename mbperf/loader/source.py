"""How the user's dataset reaches the process that trials are forked from, in the order of preference:

an import path; a pickle read by a fresh interpreter; a fork of this very process, with a warning, where the
object cannot be pickled. Nothing in this process is changed: no start method fixed, no random number drawn.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader


class LoaderError(RuntimeError):
    """The profiler cannot begin, or found no configuration that runs; the message says why."""


@dataclass
class Source:
    """A dataset on its way to another process.

    Args:
        path: `package.module:attribute`, or None when `pickled` or `live` holds the object.
        arguments: keyword arguments for what `path` names.
        fixed: shuffle, drop_last, collate_fn, step, worker_init_fn: the same in every trial.
        pickled: name of a file with the pickled object and `fixed`.
        live: the object itself, to be inherited by fork.
        warning: what the user should know about the way chosen.
    """

    path: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    pickled: bytes | None = None
    live: Any = None
    warning: str | None = None

    def order(self, folder: str) -> dict[str, Any]:
        """Return the plain message that tells a fresh interpreter what to make."""
        order: dict[str, Any] = {"preparation": preparation(), "fixed": self.fixed}
        if self.pickled is None:
            return order | {"path": self.path, "arguments": self.arguments}
        handle, name = tempfile.mkstemp(suffix=".pickle", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(self.pickled)
        return {"preparation": preparation(), "pickled": name}


def preparation() -> dict[str, Any]:
    """Return what a fresh interpreter needs to import what this one can; `multiprocessing.spawn` applies it.

    Its own `get_preparation_data` would settle this process's start method for good, so it is not called.
    """
    data: dict[str, Any] = {
        "name": "mbperf-loader",
        "sys_path": [path or os.getcwd() for path in sys.path],
        "sys_argv": sys.argv,
        "orig_dir": os.getcwd(),
        "dir": os.getcwd(),
    }
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        data["start_method"] = method
    return data | _main_module()


def _main_module() -> dict[str, str]:
    """Return how to import `__main__` elsewhere; the classes of a user's script live there."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return {"init_main_from_name": spec.name}
    path = getattr(main, "__file__", None)
    if path is None or hasattr(sys, "ps1"):
        return {}
    return {"init_main_from_path": os.path.abspath(path)}


def source_of(dataset: Any, fixed: dict[str, Any]) -> Source:
    """Return how `dataset` will travel.

    Raises:
        LoaderError: it neither pickles nor may this process be forked.
    """
    if isinstance(dataset, str):
        return Source(path=dataset, fixed=fixed)
    if isinstance(dataset, DataLoader):
        dataset = without_iterator(dataset)
    try:
        pickled = pickle.dumps({"dataset": dataset, **fixed}, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return forked_source(dataset, fixed, f"does not pickle ({str(error).splitlines()[0]})")
    if _defined_interactively(dataset):
        return forked_source(
            dataset, fixed, "is defined interactively, where no fresh interpreter can import it"
        )
    return Source(fixed=fixed, pickled=pickled)


def without_iterator(loader: DataLoader) -> DataLoader:
    """Return a shallow copy of a loader without its live iterator: persistent workers cannot travel."""
    if loader._iterator is None:
        return loader
    copy = object.__new__(type(loader))
    copy.__dict__.update(loader.__dict__)
    copy.__dict__["_iterator"] = None
    return copy


def _defined_interactively(dataset: Any) -> bool:
    module = getattr(dataset, "__module__", None) or type(dataset).__module__
    main = sys.modules["__main__"]
    return module == "__main__" and (hasattr(sys, "ps1") or getattr(main, "__file__", None) is None)


def forked_source(dataset: Any, fixed: dict[str, Any], why: str) -> Source:
    """Return a source that is inherited by fork, with the warning that goes with it.

    Raises:
        LoaderError: no fork on this system, or CUDA is in use here (a fork of it cannot use CUDA).
    """
    remedy = "give an import path instead (package.module:dataset), or make it picklable"
    if not hasattr(os, "fork"):
        raise LoaderError(f"profile: dataset {why}, and this system cannot fork; {remedy}")
    if torch.cuda.is_initialized():
        raise LoaderError(f"profile: dataset {why}, and a process that uses CUDA cannot be forked; {remedy}")
    threads = threading.active_count()
    others = f", which runs {threads} threads" if threads > 1 else ""
    return Source(
        fixed=fixed,
        live=dataset,
        warning=f"the dataset {why}; trials are forked from this process{others}, with one thread of torch: "
        f"if they hang, {remedy}",
    )
