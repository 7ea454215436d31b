"""What the losses are under torch.compile, as DTensors, and to a counter of collectives."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.autograd import profiler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import mbperf
from mbperf.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

LOGITS = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 9, 5, -100, 4, 7])
HIDDEN, HEAD = LOGITS[:, :4].contiguous(), LOGITS.T.contiguous()[:, :4].contiguous()


def half(rank, whole, dim):
    return whole.chunk(2, dim)[rank].clone().requires_grad_()


def counted(call):
    """The collectives in a call, by what the profiler records of the process group."""
    with profiler.profile() as recorded:
        result = call()
    return [event.name for event in recorded.function_events if event.name.startswith("gloo:")], result


def collectives(rank):
    logits = half(rank, LOGITS, 1)
    vocab_parallel_cross_entropy(logits, TARGET)
    forward, loss = counted(lambda: vocab_parallel_cross_entropy(logits, TARGET))
    backward, _ = counted(loss.backward)
    hidden, head = HIDDEN.clone().requires_grad_(), half(rank, HEAD, 0)
    linear_forward, loss = counted(lambda: vocab_parallel_linear_cross_entropy(hidden, head, TARGET))
    linear_backward, _ = counted(loss.backward)
    return forward, backward, linear_forward, linear_backward


def test_one_collective_forward_and_none_backward(world):
    for forward, backward, linear_forward, linear_backward in world.run(2, collectives):
        assert forward == linear_forward == ["gloo:all_gather"]
        assert backward == []
        assert linear_backward == ["gloo:all_reduce"]


def compiled(rank, backend):
    torch._dynamo.reset()
    logits = half(rank, LOGITS, 1)
    hidden, head = HIDDEN.clone().requires_grad_(), half(rank, HEAD, 0)

    def losses(logits, hidden, head, target):
        return (
            vocab_parallel_cross_entropy(logits * 2, target, label_smoothing=0.1),
            vocab_parallel_linear_cross_entropy(hidden * 2, head, target),
        )

    leaves = (logits, hidden, head)
    eager = losses(*leaves, TARGET)
    graph = torch.compile(losses, fullgraph=True, backend=backend)(*leaves, TARGET)
    return eager, torch.autograd.grad(sum(eager), leaves), graph, torch.autograd.grad(sum(graph), leaves)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor compiles, and there is no compiler"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiles_in_one_graph(world, backend):
    for eager, eager_grads, graph, graph_grads in world.run(2, compiled, backend):
        torch.testing.assert_close(graph, eager, rtol=0, atol=0)
        torch.testing.assert_close(graph_grads, eager_grads, rtol=1e-6, atol=1e-8)


def as_dtensor(rank, placements, shape, settings, loss_is_parallel):
    mesh = init_device_mesh("cpu", shape)
    logits = distribute_tensor(LOGITS, mesh, placements).requires_grad_()
    positions = [Shard(0) if p == Shard(0) else Replicate() for p in placements]
    target = distribute_tensor(TARGET, mesh, positions) if Shard(0) in positions else TARGET
    if loss_is_parallel:
        with loss_parallel():
            loss = mbperf.cross_entropy(logits, target, **settings)
            loss.sum().backward()
    else:
        loss = mbperf.cross_entropy(logits, target, **settings)
        loss.sum().backward()
    return [str(p) for p in loss.placements], loss.full_tensor().detach(), logits.grad.full_tensor()


WEIGHT = torch.linspace(0.5, 2, 10)


@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": WEIGHT}, {"softcap": 2.0}],
)
@pytest.mark.parametrize(
    ("placements", "shape", "loss_is_parallel"),
    [
        ((Shard(1),), (2,), True),
        ((Shard(1),), (3,), False),
        ((Shard(0),), (4,), False),
        ((Replicate(),), (2,), False),
        ((Shard(0), Shard(1)), (2, 2), False),
    ],
)
def test_of_a_dtensor(world, placements, shape, loss_is_parallel, settings):
    leaf = LOGITS.clone().requires_grad_()
    cap = settings.get("softcap")
    capped = cap * torch.tanh(leaf / cap) if cap else leaf
    expected = F.cross_entropy(capped, TARGET, **{k: v for k, v in settings.items() if k != "softcap"})
    expected.sum().backward()
    size = torch.Size(shape).numel()
    for placed, loss, grad in world.run(size, as_dtensor, placements, shape, settings, loss_is_parallel):
        none = settings.get("reduction") == "none"
        assert placed == [str(Shard(0) if none and p == Shard(0) else Replicate()) for p in placements]
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, leaf.grad)


def unsupported(rank):
    mesh = init_device_mesh("cpu", (2, 1))
    logits = distribute_tensor(LOGITS, mesh, [Shard(1), Replicate()])
    twice = distribute_tensor(LOGITS, mesh, [Shard(1), Shard(1)])
    partial = DTensor.from_local(LOGITS, mesh, [Partial(), Replicate()])
    rows = distribute_tensor(LOGITS, mesh, [Shard(0), Replicate()])
    said = []
    for call in (
        lambda: mbperf.cross_entropy(twice, TARGET),
        lambda: mbperf.cross_entropy(partial, TARGET),
        lambda: mbperf.cross_entropy(logits, LOGITS.softmax(1)),
        lambda: mbperf.cross_entropy(logits, TARGET, WEIGHT, label_smoothing=0.1),
        lambda: mbperf.cross_entropy(logits, TARGET, WEIGHT, z_loss=0.1),
        lambda: mbperf.cross_entropy(rows, TARGET),
        lambda: mbperf.cross_entropy(logits, TARGET, softcap=0.0),
        lambda: mbperf.cross_entropy_with_stats(logits, TARGET),
    ):
        try:
            call()
            said.append("nothing")
        except (NotImplementedError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_a_dtensor_cannot_have_says_so(world):
    for said in world.run(2, unsupported):
        parts = [
            *("2 mesh dimensions", "Partial", "probabilities", "label_smoothing", "z_loss", "target must be"),
            *("softcap must be", "input must not be a DTensor"),
        ]
        assert len(said) == len(parts)
        assert all(part in line for part, line in zip(parts, said, strict=True)), said[-1]


def bad_arguments(rank):
    logits = half(rank, LOGITS, 1)
    said = []
    for arguments, settings in (
        ((logits, TARGET), {"reduction": "avg"}),
        ((logits, TARGET), {"label_smoothing": 1.5}),
        ((logits, TARGET), {"z_loss": -1}),
        ((logits, TARGET[:3]), {}),
        ((logits, TARGET.float()), {}),
        ((logits.long(), TARGET), {}),
    ):
        try:
            vocab_parallel_cross_entropy(*arguments, **settings)
        except (ValueError, RuntimeError, TypeError) as error:
            said.append(str(error))
    loss = vocab_parallel_cross_entropy(logits, TARGET)
    try:
        torch.autograd.grad(torch.autograd.grad(loss, logits, create_graph=True)[0].sum(), logits)
    except RuntimeError as error:
        said.append(str(error))
    return said


def test_bad_arguments_are_named(world):
    parts = ["avg", "label_smoothing", "z_loss", "batch_size (3)", "float32", "int64", "create_graph"]
    for said in world.run(2, bad_arguments):
        assert len(said) == len(parts)
        assert all(part in line for part, line in zip(parts, said, strict=True)), said[-1]


def test_without_a_process_group_it_says_what_to_call():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        vocab_parallel_cross_entropy(LOGITS, TARGET)
