"""The way of a batch to a GPU: packed into pinned memory that is used again, then one copy for all of it."""

from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # pinning costs a call of the driver, so the first buffer has room for later batches


class Staging:
    """Pinned buffers for batches on their way to one device.

    A buffer is handed out again only after the device has read the last batch out of it: an event is recorded
    behind each copy, and `take` waits for it. One buffer serves one caller; a second thread gets its own.

    Args:
        device: where batches go. Any but a CUDA device has no events and no pinned memory, and serves tests.

    >>> staging = Staging(torch.device("cpu"))
    >>> storage = staging.take(3)
    >>> staging.send(storage, 3).shape
    torch.Size([3])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[tuple[torch.UntypedStorage, Any]] = []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """Return a buffer of at least this many bytes that nobody reads any more."""
        try:
            storage, sent = self._free.pop()
        except IndexError:
            return self._new(nbytes)
        if sent is not None:
            sent.synchronize()
        return storage if storage.nbytes() >= nbytes else self._new(nbytes)

    def send(self, storage: torch.UntypedStorage, nbytes: int) -> Tensor:
        """Copy the first bytes of a buffer to the device, on its current stream, and keep the buffer.

        Returns:
            (nbytes,) uint8 on the device.
        """
        packed = torch.empty(0, dtype=torch.uint8).set_(storage)[:nbytes]
        sent = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        sent.copy_(packed, non_blocking=True)
        self._free.append((storage, self._event()))
        return sent

    def move(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is not packed (with a graph, of a class of its own, empty) on the device."""
        return tensor.to(self.device, non_blocking=True)

    def _new(self, nbytes: int) -> torch.UntypedStorage:
        room = max(LEAST_BYTES, nbytes + nbytes // 4)
        pinned = self.device.type == "cuda"
        return torch.empty(room, dtype=torch.uint8, pin_memory=pinned).untyped_storage()

    def _event(self) -> Any:
        """Return an event recorded behind the copy, or None where copies are done when they return."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the buffers, which belong to this process."""
        return Staging, (self.device,)


def staging_for(device: torch.device | str) -> Staging | None:
    """Return the staging for the `device` of `Collate`, or None for the CPU."""
    named = checked_device("Collate", device)
    return None if named.type == "cpu" else Staging(named)


def checked_device(function: str, device: torch.device | str) -> torch.device:
    """Return a device that is there.

    Raises:
        ValueError: no CPU or CUDA device.
        RuntimeError: torch has no CUDA, sees no GPU, or not that many.
    """
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{function}: device expects a torch device, got {device!r}: {error}") from None
    if named.type not in ("cpu", "cuda"):
        raise ValueError(f"{function}: device expects a CPU or CUDA device, got {device!r}")
    if named.type == "cuda" and torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
        raise RuntimeError(f"{function}: device={str(named)!r}, but {missing}")
    if named.type == "cuda" and (count := torch.cuda.device_count()) <= (named.index or 0):
        raise RuntimeError(f"{function}: device={str(named)!r}, but torch sees {count} GPUs")
    return named
