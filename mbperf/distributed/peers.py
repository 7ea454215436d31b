"""What the ranks of a group tell each other beside their collective: through its store, and seldom.

A collective whose messages differ in size ends processes (gloo) or waits for ever (NCCL). So ranks compare
what they are about to do whenever the size of their message changes, and once more when a collective fails:
who does not answer then is the one that is named.
"""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

# A rank gives up a little later than the others' collectives do, so that it still hears why.
_GRACE_S = 2.0
# After a failure; groups often have half an hour, which nobody should wait to learn who is gone.
_LONGEST_WAIT_S = 30.0

Said = Mapping[str, Any]


class Peers:
    """This rank's view of one process group.

    Args:
        name: of the group.
        device: of the tensors that it sends.

    `start_of` holds where this rank's classes began when it last had that many of them.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.group = _group_of(name)
        self.rank, self.size = self.group.rank(), self.group.size()
        self.start_of: dict[int, int] = {}
        self._store = c10d._get_process_group_store(self.group)
        self._timeout_s = _timeout_of(self.group, device).total_seconds()
        self._exchanges = 0
        self._agreed_bytes = -1
        self._began_s = 0.0

    def begin(self, said: Said, message_bytes: int) -> None:
        """Compare `said` with the other ranks, if this message has another size than the last one.

        Raises:
            RuntimeError: the ranks disagree, or one has not come within the group's timeout.
        """
        self._began_s = time.monotonic()
        if message_bytes == self._agreed_bytes:
            return
        heard = self._exchange(said, self._timeout_s + _GRACE_S)
        self._raise_missing(said, heard, None)
        self.raise_disagreement(said, heard)
        self._agreed_bytes = message_bytes

    def wait(self, result: torch.Tensor, said: Said) -> torch.Tensor:
        """Return the result of a collective when it is there.

        Raises:
            RuntimeError: it failed; names the ranks that are gone or late, or what they disagree in.
        """
        try:
            return torch.ops._c10d_functional.wait_tensor(result)
        except RuntimeError as error:
            self._explain(error, said)

    def compare(self, said: Said) -> None:
        """Say in what the ranks differ; every rank has to call this."""
        self.raise_disagreement(said, self._exchange(said, self._timeout_s + _GRACE_S))

    def raise_disagreement(self, said: Said, heard: Mapping[int, Said]) -> None:
        """Raise if one rank's `said` differs from another's."""
        for name in said:
            values = {rank: its.get(name) for rank, its in heard.items()}
            if len(set(map(str, values.values()))) > 1:
                each = ", ".join(f"{value} on rank {self.global_rank(r)}" for r, value in values.items())
                raise RuntimeError(f"{said['function']}: the ranks disagree in {name}: {each}")

    def global_rank(self, rank: int) -> int:
        """Return the number of a rank of this group in the whole world."""
        return dist.get_global_rank(self.group, rank)

    def _explain(self, error: RuntimeError, said: Said) -> NoReturn:
        left_s = self._began_s + self._timeout_s - time.monotonic()
        try:
            heard = self._exchange(said, min(max(left_s, 0) + _GRACE_S, _LONGEST_WAIT_S))
        except RuntimeError as lost:
            raise RuntimeError(
                f"{said['function']}: a collective failed, and the store of the group does not answer: the "
                f"process that holds it has ended (rank 0, unless a launcher holds it)"
            ) from lost
        self._raise_missing(said, heard, error)
        self.raise_disagreement(said, heard)
        raise RuntimeError(f"{said['function']}: a collective failed though all ranks answer") from error

    def _raise_missing(self, said: Said, heard: Mapping[int, Said], error: RuntimeError | None) -> None:
        missing = [str(self.global_rank(rank)) for rank in range(self.size) if rank not in heard]
        if missing:
            raise RuntimeError(
                f"{said['function']}: rank {', '.join(missing)} does not answer: it has ended, or did not "
                f"come within {self._timeout_s:g} s (the timeout of the process group)"
            ) from error

    def _exchange(self, said: Said, wait_s: float) -> dict[int, Said]:
        """Return what each rank says, of those that say it in time."""
        until_s = time.monotonic() + wait_s
        number, self._exchanges = self._exchanges, self._exchanges + 1
        self._store.set(_key(number, self.rank), json.dumps(said))
        heard = {
            rank: json.loads(self._store.get(_key(number, rank)))
            for rank in range(self.size)
            if self._is_there(_key(number, rank), until_s)
        }
        # Whoever has come this far has read the exchange before this one's predecessor.
        if number >= 2 and len(heard) == self.size:
            self._store.delete_key(_key(number - 2, self.rank))
        return heard

    def _is_there(self, key: str, until_s: float) -> bool:
        # Asked again and again: what a store raises when a wait is over differs from store to store.
        pause_s = 1e-4
        while not self._store.check([key]):
            if time.monotonic() > until_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return True


def _key(number: int, rank: int) -> str:
    return f"mbperf/{number}/{rank}"


def _group_of(name: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", c10d.default_pg_timeout)


_known: dict[str, Peers] = {}


def peers_of(name: str, device: torch.device) -> Peers:
    """Return this rank's view of the group of this name."""
    known = _known.get(name)
    # Names are given again when a world is destroyed and another one made.
    if known is None or known.group is not _group_of(name):
        known = _known[name] = Peers(name, device)
    return known
