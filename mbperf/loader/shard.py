"""One rank's share of a dataset, where training runs one process a device."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `ranks`.

    >>> Shard(1, 3).share_of(10)
    4
    """

    rank: int = 0
    ranks: int = 1

    def share_of(self, length: int) -> int:
        """Return how many of `length` samples one rank gets; DistributedSampler repeats some to even out."""
        return -(-length // self.ranks)

    def announce(self) -> None:
        """Tell code of the user that asks, by environment or torch.distributed, which rank this process is.

        The process group is torch's "fake" one: it knows rank and size, starts no thread and sends nothing,
        so trials can be forked. What splits itself by rank does so as it would in training.
        """
        if self.ranks == 1 or dist.is_initialized():
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.setdefault("LOCAL_RANK", str(self.rank))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(self.ranks))
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.ranks)}
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.ranks)

    def order(self, dataset: Any, shuffled: bool, drop_last: bool) -> dict[str, Any]:
        """Return the DataLoader argument that orders samples: shuffle, or a DistributedSampler."""
        if self.ranks == 1:
            return {"shuffle": shuffled}
        # A trial has seeded every rank alike, and the next trial otherwise: it has to read other samples.
        seed = torch.initial_seed() % 2**32
        return {
            "sampler": DistributedSampler(
                dataset, self.ranks, self.rank, shuffle=shuffled, seed=seed, drop_last=drop_last
            )
        }

    def words(self, shuffled: bool) -> list[str]:
        """Return the same argument as a call spells it."""
        if self.ranks == 1:
            return ["shuffle=True"] if shuffled else []
        return ["sampler=DistributedSampler(dataset" + (")" if shuffled else ", shuffle=False)")]

    def part_of(self, sampler: Any, dataset: Any, drop_last: bool) -> Any:
        """Return what this rank takes of a ready loader's sampler, or of its batch sampler."""
        if self.ranks == 1 or splits_itself(sampler):
            return sampler
        if replaceable(sampler):
            shuffled = getattr(sampler, "shuffle", type(sampler) is RandomSampler)
            return self.order(dataset, shuffled, drop_last)["sampler"]
        return EveryNth(sampler, self)


def replaceable(sampler: Any) -> bool:
    """Tell whether a DistributedSampler takes the place of this sampler: it reads each sample once."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) in (SequentialSampler, DistributedSampler)


def splits_itself(sampler: Any) -> bool:
    """Tell whether a sampler is of a user's own kind of DistributedSampler, or batches one."""
    inner = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
    return isinstance(inner, DistributedSampler) and not (inner is sampler and replaceable(sampler))


class EveryNth(Sampler):
    """Every `ranks`-th index, or batch, of a sampler that knows nothing of ranks.

    >>> list(EveryNth(range(7), Shard(1, 3)))
    [1, 4]
    """

    def __init__(self, sampler: Any, shard: Shard):
        self.sampler, self.shard = sampler, shard

    def __iter__(self) -> Iterator[Any]:
        """Return those of this rank."""
        return itertools.islice(iter(self.sampler), self.shard.rank, None, self.shard.ranks)

    def __len__(self) -> int:
        """Return how many this rank has."""
        return len(range(self.shard.rank, len(self.sampler), self.shard.ranks))
