"""Samples -> batch: a drop-in for default_collate, the same in the main process and in a worker."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch.utils.data import get_worker_info

from mbperf.extension import _C
from mbperf.ops.staging import staging_for


def collate(batch: Any) -> Any:
    """Put the samples of a batch together, as `torch.utils.data.default_collate` does in the main process.

    Unlike it, collate gives the same result in a DataLoader worker (where the whole batch lies in one
    piece of shared memory), names the sample and the key path in every error, never changes a sample, and
    takes dataclasses apart field by field.

    Args:
        batch: list of samples; a sample is a tensor, numpy array, number, string, or any nesting of these in
            dicts, lists, tuples, named tuples and dataclasses. Entries of
            `torch.utils.data._utils.collate.default_collate_fn_map` are honoured.

    Returns:
        The containers of sample 0 (a tuple as a list); a field of shape (...) becomes a tensor (N, ...).

    Raises:
        RuntimeError: shapes or lengths differ.
        TypeError: a sample of a type that is not known.
        KeyError: a key of sample 0 is missing in another.
        IndexError: the batch is empty.

    >>> collate([({"x": 1.0}, 3), ({"x": 2.0}, 4)])
    [{'x': tensor([1., 2.], dtype=torch.float64)}, tensor([3, 4])]
    """
    return _C.collate(batch)


Pad = float | str


@dataclass(frozen=True)
class FieldPads:
    """Which field is padded with what: the C++ walk calls it with the path of every tensor field."""

    pads: dict[tuple[Any, ...], Pad]

    def __call__(self, path: list[tuple[bool, Any]]) -> Pad | None:
        """Return the padding of the field at this path."""
        return self.pads.get(tuple(name for _, name in path))


class Collate:
    """`collate` with settings: a callable for DataLoader's `collate_fn`, picklable for any start method.

    With `pad`, samples may differ in their first dimension: `pad=0` pads to the longest of the batch, equal
    to `torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=0)`; `pad="packed"` lays them
    end to end for variable-length attention.

    Args:
        strict: refuse what `collate` settles: dtypes that promotion would join, keys that only some samples
            have, samples of different classes.
        pin_memory: put the batch into pinned memory, when called in the main process; in a worker it stays in
            shared memory, and DataLoader's own pin_memory pins it.
        device: where the batch shall lie. For a GPU ("cuda", "cuda:1", torch.device) all fields are packed
            into one pinned buffer and travel in one copy on the current stream; where samples differ in
            dtype, each travels as it is and is converted there (padded ones before). Samples that lie there
            already are stacked there. Main process only.
        pad: None, a number, "packed", or a mapping from field to one of these. A field is named by its key or
            position, or by a tuple of these where it is nested; without a mapping, all fields of one
            dimension or more are meant.
        lengths: give padded fields as Padded, with lengths (N,) int64.
        mask: give padded fields as Padded, with mask (N, L) bool, true where there is data.

    Returns:
        What `collate` returns; padded fields have shape (N, L, ...), packed ones come as
        Packed(values (total, ...), cu_seqlens (N + 1,) int32, max_seqlen int).

    Raises:
        ValueError: pad is not one of the above, lengths or mask ask for something that is not padded, device
            is no CPU or CUDA device, or pin_memory is asked for beside a GPU.
        RuntimeError: device names a GPU that is not there, or is asked for in a DataLoader worker.

    >>> Collate(pad=0)([torch.tensor([1, 2]), torch.tensor([3])])
    tensor([[1, 2],
            [3, 0]])
    >>> Collate(pad="packed")([torch.tensor([1, 2]), torch.tensor([3])]).cu_seqlens
    tensor([0, 2, 3], dtype=torch.int32)
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        pin_memory: bool = False,
        pad: Pad | Mapping[Any, Pad] | None = None,
        lengths: bool = False,
        mask: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.strict, self.pin_memory = bool(strict), bool(pin_memory)
        self.pad, self.lengths, self.mask = pad, bool(lengths), bool(mask)
        self.device = device
        self._staging = staging_for(device)
        if self._staging and pin_memory:
            raise ValueError(
                f"Collate: pin_memory=True keeps the batch on the CPU, device={device!r} does not"
            )
        pads = list(pad.values()) if isinstance(pad, Mapping) else [] if pad is None else [pad]
        for value in pads:
            if value != "packed" and not isinstance(value, Number):
                raise ValueError(f'Collate: pad expects a number or "packed", got {value!r}')
        if (lengths or mask) and all(value == "packed" for value in pads):
            raise ValueError("Collate: lengths and mask describe padded fields; pad names none")
        self._pad: Any = pad
        if isinstance(pad, Mapping):
            self._pad = FieldPads({k if isinstance(k, tuple) else (k,): v for k, v in pad.items()})

    def __call__(self, batch: Any) -> Any:
        """Return the batch; see the class."""
        if self.pin_memory and get_worker_info() is None and not torch.accelerator.is_available():
            raise RuntimeError("Collate: pin_memory=True needs an accelerator, and torch sees none")
        if self._staging and get_worker_info() is not None:
            raise RuntimeError(
                f"Collate: device={self.device!r} works in the main process only; with num_workers > 0 use "
                "Collate(), DataLoader(pin_memory=True) and batch.to(device, non_blocking=True)"
            )
        return _C.collate(
            batch, self.strict, self.pin_memory, self._pad, self.lengths, self.mask, self._staging
        )

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        settings = ("strict", "pin_memory", "pad", "lengths", "mask", "device")
        defaults = (None, False, "cpu")
        given = (
            f"{name}={getattr(self, name)!r}" for name in settings if getattr(self, name) not in defaults
        )
        return f"Collate({', '.join(given)})"
