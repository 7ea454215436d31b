"""Cross entropy of classes that are spread over two ranks, against torch's ways and against one process.

pytest bench/bench_distributed.py                                       starts its own ranks
torchrun --nproc-per-node 2 -m pytest bench/bench_distributed.py        takes torchrun's
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DISTRIBUTED, DistributedCase
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import mbperf
from mbperf.distributed import vocab_parallel_cross_entropy
from mbperf.measure.group import Group
from mbperf.measure.ranks import measure_in_ranks

RANKS = 2
Outputs = tuple[Tensor, Tensor]


def ours(local: Tensor, target: Tensor, whole: Tensor) -> Outputs:
    loss = vocab_parallel_cross_entropy(local, target)
    return loss, torch.autograd.grad(loss, local)[0]


def torchs_loss_parallel(local: Tensor, target: Tensor, whole: Tensor) -> Outputs:
    with loss_parallel():
        logits = DTensor.from_local(local, _mesh(), [Shard(1)], run_check=False)
        loss = F.cross_entropy(logits, target)
        return loss.to_local(), torch.autograd.grad(loss, local)[0]


def gathered(local: Tensor, target: Tensor, whole: Tensor) -> Outputs:
    """All-gather, F.cross_entropy of the whole, and this rank's share of its gradient."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shards = funcol.all_gather_tensor(local.detach(), 0, dist.group.WORLD)
    logits = shards.view(ranks, *local.shape).transpose(0, 1).flatten(1).requires_grad_()
    del shards
    loss = F.cross_entropy(logits, target)
    return loss, torch.autograd.grad(loss, logits)[0].chunk(ranks, 1)[rank]


def one_process(loss: Callable[..., Tensor], local: Tensor, target: Tensor, whole: Tensor) -> Outputs | None:
    """The whole on the first rank, with as many threads as there are ranks, while the others wait."""
    if dist.get_rank():
        return None
    with _threads(dist.get_world_size()):
        value = loss(whole, target)
        grad = torch.autograd.grad(value, whole)[0]
    return value, grad.chunk(dist.get_world_size(), 1)[0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mesh() -> DeviceMesh:
    global _made
    if _made is None:
        _made = init_device_mesh("cpu", (dist.get_world_size(),))
    return _made


_made: DeviceMesh | None = None


def make_inputs(case: DistributedCase) -> tuple[Tensor, ...]:
    if not dist.is_initialized():  # --benchmark-disable: checked in this process, a world of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole = torch.randn(case.rows, case.classes)
    target = torch.randint(0, case.classes, (case.rows,))
    local = whole.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone()
    return local.requires_grad_(), target, whole.requires_grad_()


def expected(local: Tensor, target: Tensor, whole: Tensor) -> Outputs:
    whole = whole.detach().requires_grad_()
    loss = F.cross_entropy(whole, target)
    grad = torch.autograd.grad(loss, whole)[0]
    return loss, grad.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


def group(case: DistributedCase) -> Group:
    return Group(
        op="vocab_parallel_cross_entropy",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={
            "fused": ours,
            "loss_parallel": torchs_loss_parallel,
            "all_gather": gathered,
            "one_process": partial(one_process, mbperf.cross_entropy),
            "torch": partial(one_process, F.cross_entropy),
        },
        expected=expected,
        floors={"loss_parallel": case.floor} if case.floor else {},
        facts={
            "N": case.rows,
            "C": case.classes,
            "dtype": "f32",
            "pass": "fwd+bwd",
            "ranks": RANKS,
            "why": case.why,
        },
        threads=1,
        weight=2.0,
        also_fresh=False,
        measured_by=partial(measure_in_ranks, build=partial(group, case), ranks=RANKS),
    )


@pytest.mark.race([group(case) for case in DISTRIBUTED])
def test_vocab_parallel_cross_entropy(race: Any) -> None:
    race()
