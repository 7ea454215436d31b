"""What ranks tell each other of their rows in one all-gather, and how they see that they agree.

A message is HEADER numbers of int64, then the rows of `statistics` in the accumulation dtype. Sizes of
messages are compared before one is sent (peers.py); all else that ranks may disagree in stands in the header.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mbperf.distributed.peers import Peers, peers_of

HEADER = 4  # what must be equal, hash of the targets, classes of this rank, where they were taken to start


class Call(Protocol):
    """The part of an operator's arguments that an exchange needs."""

    @property
    def input(self) -> Tensor:
        """Logits or hidden states."""

    @property
    def target(self) -> Tensor:
        """Class indices among all classes."""

    @property
    def group(self) -> str:
        """The name of the process group."""

    @property
    def ignore_index(self) -> int:
        """The class index whose positions count for nothing."""

    @property
    def classes(self) -> int:
        """How many classes this rank has."""

    @property
    def numbers(self) -> int:
        """How many statistics a row has."""

    @property
    def dtype(self) -> torch.dtype:
        """What statistics are kept in."""

    def said(self) -> dict[str, Any]:
        """Return what has to be equal on all ranks."""

    def statistics(self, start: int) -> Sequence[Tensor]:
        """Return this rank's rows of a message, its classes beginning at `start`."""


class Gathered(NamedTuple):
    """The statistics of every rank, (ranks, numbers, positions), and where this rank stands.

    Args:
        statistics: of every rank.
        classes: how many each rank has.
        shard: start of this rank's classes, and how many all ranks have; int64, shape (2,), on the CPU.
    """

    statistics: Tensor
    classes: list[int]
    shard: Tensor


def peers_of_call(call: Call) -> Peers:
    """Return the other ranks."""
    return peers_of(call.group, call.input.device)


def message_of(call: Call) -> Tensor:
    """Return what this rank tells the others, shape (bytes,).

    Raises:
        RuntimeError: the ranks disagree, or one does not come.
    """
    peers = peers_of_call(call)
    # Before the reading of the logits: a rank that disagrees should not wait for it.
    peers.begin(call.said(), message_bytes(call))
    return _message(call, peers.start_of.get(call.classes, peers.rank * call.classes))


def message_bytes(call: Call) -> int:
    """Return the size of a message."""
    return HEADER * 8 + call.numbers * call.target.numel() * call.dtype.itemsize


def gathered_statistics(call: Call, gathered: Tensor) -> Gathered:
    """Return what all ranks have told, once they are seen to agree.

    Raises:
        IndexError: a target is no rank's.
        RuntimeError: the ranks disagree, or one is gone.
    """
    peers, said = peers_of_call(call), call.said()
    gathered = peers.wait(gathered, said).view(peers.size, -1)
    header = _header(gathered)
    _check_header(call, header)
    classes = [its[2] for its in header]
    starts = [sum(classes[:rank]) for rank in range(peers.size)]
    check_targets(call, sum(classes))
    peers.start_of[call.classes] = starts[peers.rank]
    if starts != [its[3] for its in header]:
        # A rank looked for its targets in the wrong place, as it can at its first call; all ranks see it.
        again = _message(call, starts[peers.rank])
        sent = torch.ops._c10d_functional.all_gather_into_tensor(again, peers.size, call.group)
        gathered = peers.wait(sent, said).view(peers.size, -1)
    return Gathered(_statistics(gathered, call), classes, torch.tensor([starts[peers.rank], sum(classes)]))


def check_targets(call: Call, classes: int) -> None:
    """Raise if a target that counts is none of `classes`."""
    live = call.target != call.ignore_index
    bad = live & ((call.target < 0) | (call.target >= classes))
    if bad.any():
        raise IndexError(f"Target {call.target[bad][0].item()} is out of bounds.")
    if classes == 0:
        raise RuntimeError(f"{call.said()['function']}: no rank has a class")


def _message(call: Call, start: int) -> Tensor:
    message = call.input.new_empty(message_bytes(call), dtype=torch.uint8)
    header, statistics = message[: HEADER * 8].view(torch.int64), _statistics(message, call)
    header.copy_(torch.tensor([_hash_of_call(call.said()), 0, call.classes, start]))
    _hash_of_targets(call.target, out=header[1])
    for row, its in zip(statistics, call.statistics(start), strict=True):
        row.copy_(its)
    return message


def _statistics(messages: Tensor, call: Call) -> Tensor:
    """The rows of messages of shape (..., bytes), as (..., numbers, positions)."""
    return messages[..., HEADER * 8 :].view(call.dtype).unflatten(-1, (call.numbers, -1))


def _hash_of_call(said: dict[str, Any]) -> int:
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _hash_of_targets(target: Tensor, out: Tensor) -> None:
    """A sum that changes with the order too; integers wrap around, on every rank alike."""
    flat = target.flatten()
    torch.sum(flat * torch.arange(1, flat.numel() + 1, device=flat.device), 0, out=out)


def _header(gathered: Tensor) -> list[list[int]]:
    return gathered[:, : HEADER * 8].clone(memory_format=torch.contiguous_format).view(torch.int64).tolist()


def _check_header(call: Call, header: list[list[int]]) -> None:
    if any(its[0] != header[0][0] for its in header):
        peers_of_call(call).compare(call.said())
    if any(its[1] != header[0][1] for its in header):
        name = call.said()["function"]
        raise RuntimeError(f"{name}: the ranks hold different targets; every rank needs the same")
