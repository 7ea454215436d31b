"""The Python part of collate: rebuilding containers, calling torch's own functions, wording errors.

The C++ walk (csrc/python/collate) calls these by name; nothing here runs for a batch of plain tensors,
numbers, dicts, lists and tuples.
"""

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from mbperf.ops.gathered import GatheredBatch

__all__ = ["FUNCTIONS", "GatheredBatch", "Packed", "Padded", "get_worker_info"]

FUNCTIONS = torch_collate.default_collate_fn_map
MAPPING, NAMED_TUPLE, SEQUENCE, DATACLASS, UNSUPPORTED = range(5)

Path = list[tuple[bool, Any]]  # (is it an attribute, its name, key or position)


class Padded(NamedTuple):
    """Ragged samples padded to the longest: values (N, L, ...), lengths (N,) int64, mask (N, L) bool."""

    values: Tensor
    lengths: Tensor | None
    mask: Tensor | None


class Packed(NamedTuple):
    """Ragged samples end to end: values (total, ...), cu_seqlens (N + 1,) int32, max_seqlen."""

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def samples(batch: Any) -> list:
    """Return the samples of a batch that is no plain list or tuple."""
    if isinstance(batch, (Mapping, Tensor)) or not hasattr(type(batch), "__getitem__"):
        raise TypeError(f"collate: batch must be a list of samples, got {describe(batch)}")
    return list(batch)


def container(sample: Any) -> int:
    """Return how a sample that the map does not know is taken apart, in default_collate's order."""
    if isinstance(sample, Mapping):
        return MAPPING
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return NAMED_TUPLE
    if isinstance(sample, Sequence):
        return SEQUENCE
    if dataclasses.is_dataclass(sample) and not isinstance(sample, type):
        return DATACLASS
    return UNSUPPORTED


def default_item(sample: dict, key: Any) -> Any:
    """Return sample[key] of a dict that lacks the key; a defaultdict gives its default without keeping it."""
    if isinstance(sample, defaultdict) and sample.default_factory is not None:
        return sample.default_factory()
    return sample[key]


def field_names(sample: Any) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(sample)]


def rebuild_mapping(sample: Mapping, values: dict) -> Mapping:
    """Return a mapping of the sample's class holding `values`, or a dict where its class refuses."""
    try:
        if not isinstance(sample, MutableMapping):
            return type(sample)(values)  # type: ignore[call-arg]
        clone = copy.copy(sample)
        if isinstance(clone, Counter):  # its update() adds to what is there
            for key, value in values.items():
                clone[key] = value
        else:
            clone.update(values)
        return clone
    except TypeError:
        return values


def rebuild_sequence(sample: Sequence, values: list) -> Sequence:
    """Return a sequence of the sample's class holding `values`, or a list where its class refuses."""
    try:
        if not isinstance(sample, MutableSequence):
            return type(sample)(values)  # type: ignore[call-arg]
        clone = copy.copy(sample)
        for i, value in enumerate(values):
            clone[i] = value
        return clone
    except TypeError:
        return values


def rebuild_dataclass(sample: Any, values: dict[str, Any]) -> Any:
    """Return a shallow copy of a dataclass, frozen or not, with other fields and no __post_init__."""
    clone = copy.copy(sample)
    for name, value in values.items():
        object.__setattr__(clone, name, value)
    return clone


def new_shared(nbytes: int) -> torch.UntypedStorage:
    """Return shared memory of the sharing strategy in force."""
    return torch.UntypedStorage._new_shared(nbytes)


stack, as_tensor = torch.stack, torch.as_tensor


def refuse(samples: list[Tensor]) -> NoReturn:
    """Raise torch's own error about nested and sparse tensors."""
    torch_collate.collate_tensor_fn(samples)
    raise TypeError(f"tensors of layout {samples[0].layout} are not supported")


def leaf(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph, which cannot be sent to another process."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def stack_leaf(samples: list[Tensor]) -> Tensor:
    """Return torch.stack of the samples, fit to be sent from a worker."""
    return leaf(torch.stack(samples))


def join(samples: list[Tensor], pad: float | str, path: Path, worker: bool) -> Tensor:
    """Return ragged samples that require grad packed, or padded with torch's pad_sequence."""
    try:
        if isinstance(pad, str):
            joined = torch.cat(samples)
        else:
            joined = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=pad)
        return leaf(joined) if worker else joined
    except Exception as error:
        fail_torch(path, samples, error)


def as_tensors(samples: list, path: Path) -> list[Tensor]:
    """Return each sample as a tensor, as default_collate does with numpy arrays."""
    try:
        return list(map(torch.as_tensor, samples))
    except Exception:  # once more, to see which it was
        for k, sample in enumerate(samples):
            try:
                torch.as_tensor(sample)
            except Exception as error:
                raise type(error)(f"collate: {place(path, k)} is {describe(sample)}: {error}") from error
        raise


def place(path: Path, k: int | None = None) -> str:
    """Return how the user would write it: batch[17]["image"], or batch[:]["image"] for all samples."""
    names = [
        f".{name}" if attribute else f'["{name}"]' if isinstance(name, str) else f"[{name!r}]"
        for attribute, name in path
    ]
    return f"batch[{':' if k is None else k}]" + "".join(names)


def describe(sample: Any) -> str:
    """Return an object as an error shows it: its class, and its shape where it has one."""
    shape = getattr(sample, "shape", None)
    name = f"{type(sample).__module__}.{type(sample).__qualname__}".removeprefix("builtins.")
    return f"of type {name}" if shape is None else f"of type {name}, shape {tuple(shape)}"


def fail_empty() -> NoReturn:
    """Refuse a batch without samples."""
    raise IndexError("collate: the batch is empty; at least one sample was expected")


def fail_key(path: Path, samples: list, k: int, key: Any, error: Exception) -> NoReturn:
    """Refuse a sample that lacks a key of sample 0, or that has no keys at all."""
    if isinstance(error, LookupError):
        message = f"collate: {place(path, k)} has no key {key!r}, {place(path, 0)} has it"
        raise type(error)(message) from error
    if isinstance(error, TypeError) and type(samples[k]) is not type(samples[0]):
        fail("type", path, samples, k, error)
    raise error


def fail_torch(path: Path, samples: list, error: Exception) -> NoReturn:
    """Raise torch's error again with the place, and the first sample of another class than sample 0."""
    where = f"{place(path)} ({len(samples)} samples, the first {describe(samples[0])})"
    for k, sample in enumerate(samples):
        if type(sample) is not type(samples[0]):
            where = f"{place(path, k)} is {describe(sample)}, {place(path, 0)} is {describe(samples[0])}"
            break
    try:
        located = type(error)(f"collate: {where}: {error}")
    except Exception:  # a class that is not made from one message
        raise error from None
    raise located from error


def fail(reason: str, path: Path, samples: list, k: int, cause: Exception | None = None) -> NoReturn:
    """Refuse sample k: one message that names both samples and what differs."""
    this, first = place(path, k), place(path, 0)
    error, message = REASONS[reason](this, samples[k], first, samples[0])
    raise error(f"collate: {message}") from cause


def _differ(error: type[Exception], verb: str, show: Callable[[Any], Any]) -> Callable:
    def reason(this: str, sample: Any, first: str, other: Any) -> tuple[type[Exception], str]:
        return error, f"{this} {verb} {show(sample)}, {first} {verb} {show(other)}"

    return reason


def _shape(sample: Any) -> tuple[int, ...]:
    return tuple(sample.shape)


REASONS: dict[str, Callable[[str, Any, str, Any], tuple[type[Exception], str]]] = {
    "shape": _differ(RuntimeError, "has shape", _shape),
    "dtype": _differ(TypeError, "has dtype", lambda sample: sample.dtype),
    "type": _differ(TypeError, "is", describe),
    "length": _differ(RuntimeError, "has length", len),
    "keys": _differ(KeyError, "has keys", list),
    "promotion": lambda this, sample, first, other: (
        RuntimeError,
        f"{this} has dtype {sample.dtype}, {first} has {other.dtype}, and torch has no dtype for both",
    ),
    "ragged_shape": lambda this, sample, first, other: (
        RuntimeError,
        f"{this} has shape {_shape(sample)}, {first} has {_shape(other)}; only the first dimension of "
        "padded and packed samples may differ",
    ),
    "ragged_kind": lambda this, sample, first, other: (
        TypeError,
        f"{this} is {describe(sample)} ({sample.layout}, {sample.device}); "
        "only strided CPU tensors are padded or packed",
    ),
    "pad": lambda this, sample, first, other: (
        ValueError,
        f"the padding value does not fit into {sample.dtype}, the dtype of {this}",
    ),
    "packed_size": lambda this, sample, first, other: (
        ValueError,
        f"{this} and those after it have 2**31 elements or more in all; cu_seqlens is int32",
    ),
    "unsupported": lambda this, sample, first, other: (
        TypeError,
        f"{this} is {describe(sample)}; batch must contain tensors, numpy arrays, numbers, strings, dicts, "
        "lists, tuples or dataclasses",
    ),
}
