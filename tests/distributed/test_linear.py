"""The linear layer with sharded classes against the unfused way of one process, in worlds of one to four."""

import pytest
import torch
import torch.nn.functional as F
from sharded import layer

import mbperf
from mbperf.distributed import vocab_parallel_linear_cross_entropy

SHARDS = {1: [(13,)], 2: [(20, 9), (0, 11)], 3: [(9, 1, 12)], 4: [(5, 0, 3, 16)]}
SETTINGS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"z_loss": 0.01, "memory_budget": 300},
    {"reduction": "none", "return_lse": True, "memory_budget": 0},
]
CASES = [
    *((settings, torch.float32) for settings in SETTINGS),
    ({"memory_budget": 300}, torch.float64),
    ({"memory_budget": 300}, torch.bfloat16),
]


def total(result):
    parts = result if isinstance(result, tuple) else (result,)
    return sum((part.double() * torch.linspace(1, 2, part.numel()).view(part.shape)).sum() for part in parts)


def in_rank(rank, shards, sequence_parallel):
    out = []
    start = sum(shards[:rank])
    mine = slice(start, start + shards[rank])
    for settings, dtype in CASES:
        input, weight, bias, target = layer(sum(shards), dtype)
        if sequence_parallel:
            input = input.chunk(len(shards))[rank]
        leaves = [t.clone().requires_grad_() for t in (input, weight[mine], bias[mine])]
        result = vocab_parallel_linear_cross_entropy(
            leaves[0],
            leaves[1],
            target,
            local_bias=leaves[2],
            sequence_parallel=sequence_parallel,
            **settings,
        )
        loss = result[0] if isinstance(result, tuple) else result
        out.append((loss.detach(), torch.autograd.grad(total(result), leaves)))
    return out


def in_one_process(classes, settings, dtype, compute_dtype):
    leaves = [t.to(compute_dtype).requires_grad_() for t in layer(classes, dtype)[:3]]
    settings = {name: value for name, value in settings.items() if name != "memory_budget"}
    result = mbperf.cross_entropy(F.linear(*leaves), layer(classes, dtype)[3], **settings)
    loss = result[0] if isinstance(result, tuple) else result
    return loss.detach(), *torch.autograd.grad(total(result), leaves)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_agrees_with_one_process(world, size, sequence_parallel):
    for shards in SHARDS[size]:
        ranks = world.run(size, in_rank, shards, sequence_parallel)
        for number, (settings, dtype) in enumerate(CASES):
            exact = in_one_process(sum(shards), settings, dtype, torch.float64)
            whole = in_one_process(sum(shards), settings, dtype, dtype)
            losses = [rank[number][0] for rank in ranks]
            grads = [rank[number][1] for rank in ranks]
            assert all(torch.equal(loss, losses[0]) for loss in losses)
            inputs_grad = torch.cat([grad[0] for grad in grads]) if sequence_parallel else grads[0][0]
            if not sequence_parallel:
                assert all(torch.equal(grad[0], grads[0][0]) for grad in grads)
            ours = losses[0], inputs_grad, *(torch.cat([grad[i] for grad in grads]) for i in (1, 2))
            for mine, one, right in zip(ours, whole, exact, strict=True):
                assert mine.dtype == one.dtype == dtype
                slack = 4 * torch.finfo(dtype).eps * right.abs().max()
                assert (mine - right).abs().max() <= 2 * (one - right).abs().max() + slack


def frozen(rank):
    input, weight, _, target = layer(8, torch.float32)
    input.requires_grad_()
    vocab_parallel_linear_cross_entropy(input, weight[4 * rank : 4 * rank + 4], target).backward()
    return input.grad


def test_of_a_frozen_weight_the_input_alone_has_a_gradient(world):
    input, weight, _, target = layer(8, torch.float32)
    input.requires_grad_()
    mbperf.cross_entropy(F.linear(input, weight), target).backward()
    for grad in world.run(2, frozen):
        torch.testing.assert_close(grad, input.grad)
