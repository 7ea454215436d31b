"""Properties that only a GPU can show: order, streams, graphs, asserts, pinned memory, sizes beyond 2^31."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from batches import assert_same
from devices import DEVICES, generator
from token_calls import upstream_of, usual, values_and_gradient

import mbperf
from mbperf import (
    Collate,
    TensorDataset,
    collate,
    cross_entropy,
    gather,
    kl_div_from_logits,
    token_log_probs,
)
from mbperf.testing import cross_entropy_float64, test_near

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# One size for each kernel: parts of a warp, a block, a block that loops, a cluster; and odd ones.
CLASSES = [2, 10, 32, 100, 256, 1000, 4096, 32_000, 50_257, 128_256, 262_144]


def batch(rows, classes, dtype=torch.float32, seed=0):
    x = torch.randn(rows, classes, generator=generator(seed)).mul_(3).to("cuda", dtype).requires_grad_()
    return x, torch.randint(0, classes, (rows,), generator=generator(seed + 1)).cuda()


def loss_and_gradient(function, x, y, **settings):
    loss = function(x, y, **settings)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def close(got, right, dtype):
    right = right.to(got.device)  # the reference in float64 computes on the CPU
    scale = right.abs().max().clamp(min=1e-30)
    assert bool(got.isfinite().all())
    assert float((got.double() - right).abs().max() / scale) <= RTOL[dtype]


@pytest.fixture
def no_sync():
    """A synchronisation of host and device is an error while this is on."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(mode)


def test_the_kernels_are_built_and_registered():
    passes = (
        "forward",
        "forward_gradient",
        "forward_gradient_",
        "forward_softmax",
        "backward",
        "scale_gradient_",
    )
    operators = [*(f"cross_entropy_{name}" for name in passes), "gather_rows.out", "stack", "roof"]
    operators += [f"kl_div_{name}" for name in ("forward", "forward_gradient", "backward")]
    operators += [f"token_log_probs_{name}" for name in ("forward", "backward", "backward_")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in operators if not has(f"mbperf::{name}", "CUDA")] == []


# KL divergence.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_divergence_against_float64(dtype, classes, reduction):
    rows = 7 if classes > 4096 else 130
    student, teacher = (batch(rows, classes, dtype, seed)[0] for seed in (0, 5))
    q, p = ((t.detach().double() / 2).softmax(1) for t in (student, teacher))
    divergence = (p * (p.log() - q.log())).sum(1)
    scale = 1 if reduction == "none" else rows
    exact = divergence if reduction == "none" else divergence.mean(), (q - p) / (2 * scale)
    got = loss_and_gradient(
        kl_div_from_logits, student, teacher.detach(), temperature=2.0, reduction=reduction
    )
    for one, right in zip(got, exact, strict=True):
        close(one, right, dtype)


# Log-probabilities and entropies.


def tokens(x, y, g, temperature=0.7):
    """Log-probabilities, entropies and the gradient of logits for upstream gradients of both."""
    outputs = token_log_probs(x, y, temperature=temperature, return_entropy=True)
    grads = [each.to(output.dtype) for each, output in zip(g, outputs, strict=True)]
    return *(output.detach() for output in outputs), torch.autograd.grad(outputs, x, grads)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_rows_against_float64(dtype, classes, temperature):
    x, y = batch(7 if classes > 4096 else 130, classes, dtype)
    y[1] = -100
    x.data[2, 0], y[2] = -torch.inf, 1
    g = upstream_of(y)
    exact = values_and_gradient(usual, x, y, g, torch.float64, temperature=temperature)
    for got, right in zip(tokens(x, y, g, temperature), exact, strict=True):
        close(got, right, dtype)
    alone = token_log_probs(x, y, temperature=temperature)
    close(alone.detach(), exact[0], dtype)
    (grad,) = torch.autograd.grad(alone, x, g[0].to(alone.dtype))
    upstream = [g[0], torch.zeros_like(g[1])]
    right = values_and_gradient(usual, x, y, upstream, torch.float64, temperature=temperature)[2]
    close(grad, right, dtype)


@pytest.mark.parametrize("classes", CLASSES)
def test_token_gradients_of_part_of_the_classes_and_in_place(classes):
    """From statistics of more classes than are here, as ranks have them; over the logits the same bits."""
    x, y = batch(7, classes)
    whole, g = torch.cat([x, x + 1], 1).detach(), upstream_of(y)
    forward, backward = torch.ops.mbperf.token_log_probs_forward, torch.ops.mbperf.token_log_probs_backward
    known = forward(whole, y, 0.7, -100, None, True)[2]
    given = {"grad_log_probs": g[0], "grad_entropy": g[1]}
    grad = backward(x.detach(), y, known, 0.7, -100, **given)
    right = values_and_gradient(usual, whole, y, g, torch.float64, temperature=0.7)[2]
    close(grad, right[:, :classes], torch.float32)
    over = x.detach().clone()
    torch.ops.mbperf.token_log_probs_backward_(over, y, known, 0.7, -100, **given)
    assert torch.equal(over, grad)


@pytest.mark.parametrize("classes", CLASSES)
def test_a_captured_graph_of_token_rows_replays_on_new_values(no_sync, classes):
    torch.cuda.set_sync_debug_mode("default")
    x, y = batch(16, classes, torch.bfloat16)
    other, target = batch(16, classes, torch.bfloat16, seed=7)
    g = [each.float() for each in upstream_of(y)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        tokens(x, y, g)
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tokens(x, y, g)
    with torch.no_grad():
        x.copy_(other)
        y.copy_(target)
    graph.replay()
    for _ in range(20):
        for one, eager in zip(captured, tokens(other, target, g), strict=True):
            assert torch.equal(one, eager)


# Cross entropy.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_float64(dtype, classes, reduction):
    rows = 7 if classes > 4096 else 130
    x, y = batch(rows, classes, dtype)
    y[1] = -100
    wide = x.detach().double().requires_grad_()
    exact = loss_and_gradient(cross_entropy_float64, wide, y, reduction=reduction)
    for got, right in zip(loss_and_gradient(cross_entropy, x, y, reduction=reduction), exact, strict=True):
        close(got, right, dtype)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_twenty_runs_give_the_same_bits(classes, reduction):
    x, y = batch(64, classes, torch.bfloat16)
    first = loss_and_gradient(cross_entropy, x, y, reduction=reduction)
    for _ in range(19):
        for one, other in zip(
            loss_and_gradient(cross_entropy, x, y, reduction=reduction), first, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("classes", [10, 32_000, 262_144])
def test_more_elements_than_32_bits_count(classes):
    rows = 2**31 // classes + 3
    needed = 3 * rows * classes * 2
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"{needed / 1e9:.0f} GB of GPU memory are not free")
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 5.0
    y = torch.zeros(rows, dtype=torch.int64, device="cuda")
    y[-1] = classes - 1
    x.requires_grad_()
    losses = cross_entropy(x, y, reduction="none", out_dtype=torch.float32)
    tail = x[-2:].detach().double()
    test_near(losses[-2:].double(), F.cross_entropy(tail, y[-2:], reduction="none"), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(cross_entropy(x, y, reduction="sum"), x)
    expected = torch.autograd.grad(F.cross_entropy(tail.requires_grad_(), y[-2:], reduction="sum"), tail)[0]
    test_near(grad[-2:].double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [10, 1000, 128_256])
def test_nothing_waits_for_the_device(no_sync, classes, reduction):
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("default")
        x, y = batch(32, classes)
        weight = torch.rand(classes, device="cuda")
        upstream = torch.tensor(0.5, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        for settings in ({}, {"weight": weight}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
            loss = cross_entropy(x, y, reduction=reduction, **settings).sum()
            torch.autograd.grad(loss, x, upstream)


@pytest.mark.parametrize("classes", [10, 1000, 50_257, 262_144])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_graph_replays_on_new_values(classes, reduction):
    x, y = batch(16, classes)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradient(cross_entropy, x, y, reduction=reduction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(cross_entropy, x, y, reduction=reduction)
    other, target = batch(16, classes, seed=7)
    with torch.no_grad():
        x.copy_(other)
        y.copy_(target)
    graph.replay()
    for one, eager in zip(
        captured, loss_and_gradient(cross_entropy, other, target, reduction=reduction), strict=True
    ):
        assert torch.equal(one, eager)


def test_the_current_stream_is_where_it_runs():
    """Behind 50 ms of waiting on a stream of its own, where the values are only then written."""
    x, y = batch(64, 1000)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    expected = F.cross_entropy(x, y)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x.detach())
        loss = cross_entropy(late, y)
        rows = gather(late, y[:8] % 64)
        stacked = collate([late[0], late[1]])
    stream.synchronize()
    test_near(loss, expected.detach())
    assert torch.equal(rows, x.detach()[y[:8] % 64])
    assert torch.equal(stacked, x.detach()[:2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_inductor(reduction, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    x, y = batch(64, 1000, torch.bfloat16)

    def step(x, y):
        return cross_entropy(x * 2, y, reduction=reduction, label_smoothing=0.1).sum()

    compiled = torch.compile(step, fullgraph=True)
    ours, eager = loss_and_gradient(compiled, x, y), loss_and_gradient(step, x, y)
    for one, other in zip(ours, eager, strict=True):
        close(one, other.double(), torch.bfloat16)


# A failed assertion ends a process's use of the GPU: each has a process of its own.

WRONG = {
    "forward": "cross_entropy(x, bad)",
    "no gradient": "cross_entropy(x.detach(), bad, reduction='none')",
    "weighted": "cross_entropy(x, bad, weight=torch.rand(x.shape[1], device='cuda'))",
    "smoothed": "cross_entropy(x, bad, label_smoothing=0.1)",
    "compiled": "torch.compile(cross_entropy, fullgraph=True, backend='aot_eager')(x, bad)",
    "backward": "loss = cross_entropy(x, y); y.data.copy_(bad); loss.backward()",
    "backward of none": "loss = cross_entropy(x, y, reduction='none').sum(); "
    "y.data[3] = bad[3]; loss.backward()",
    "log-probabilities": "token_log_probs(x.detach(), bad)",
    "entropies": "token_log_probs(x.detach(), bad, temperature=0.7, return_entropy=True)",
    "backward of entropies": "p, h = token_log_probs(x, y, return_entropy=True); y.data[3] = bad[3]; "
    "(p + h).sum().backward()",
    "gather": "gather(x.detach(), bad)",
    "gather, converted": "gather(x.detach(), bad, dtype=torch.float16)",
    "gather, pinned": "gather(torch.zeros(4, 8).pin_memory(), bad, device='cuda')",
}


@pytest.mark.parametrize("wrong", [-1, 2**40])
@pytest.mark.parametrize("name", WRONG)
def test_an_index_out_of_range_asserts(name, wrong):
    code = f"""
import torch
from mbperf import cross_entropy, gather, token_log_probs
x = torch.randn(4, 1000, device="cuda", requires_grad=True)
y = torch.zeros(4, dtype=torch.int64, device="cuda")
bad = y.clone(); bad[3] = {wrong}
torch.cuda.synchronize()
try:
    {WRONG[name]}
    torch.cuda.synchronize()
except Exception as error:
    print("RAISED", error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "RAISED" in run.stdout, run.stderr
    assert "device-side assert" in run.stdout, run.stdout
    assert "illegal memory access" not in run.stdout + run.stderr


# Gather.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("row", [(), (1,), (3,), (5, 7), (784,), (3, 32, 32), (4099,)], ids=str)
@pytest.mark.parametrize("pinned", [False, True], ids=["on the device", "pinned"])
def test_gathered_rows(dtype, row, pinned):
    rows = torch.randint(0, 2, (50, *row), generator=generator(0)).to(dtype)
    index = torch.randint(0, 50, (33,), generator=generator(1))
    source = rows.pin_memory() if pinned else rows.cuda()
    got = gather(source, index.cuda(), device="cuda")
    assert got.is_cuda
    assert_same(got.cpu(), rows[index])
    assert_same(gather(source, index.tolist(), device="cuda").cpu(), rows[index])


def test_pinned_rows_are_converted_on_the_way():
    pixels = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    index = torch.randperm(500, generator=generator(1))[:64]
    how = {"dtype": torch.bfloat16, "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
    expected = gather(pixels, index, **how)
    assert_same(gather(pixels.pin_memory(), index.cuda(), device="cuda", **how).cpu(), expected)
    assert_same(gather(pixels.cuda(), index.cuda(), **how).cpu(), expected)
    assert_same(gather(pixels, index, device="cuda", **how).cpu(), expected)  # ordinary memory
    last = pixels.permute(0, 2, 3, 1).contiguous()
    assert_same(gather(last.cuda(), index.cuda(), **how).cpu(), gather(last, index, **how))


def test_rows_that_are_not_dense():
    rows = torch.arange(60.0).view(6, 2, 5).transpose(1, 2)
    index = torch.tensor([5, 0])
    for source in (rows.cuda(), rows.pin_memory()):
        assert torch.equal(gather(source, index.cuda(), device="cuda").cpu(), rows[index])


def test_an_index_on_the_cpu_is_checked_there():
    for source in (torch.zeros(5, 3, device="cuda"), torch.zeros(5, 3).pin_memory()):
        with pytest.raises(IndexError, match=r"index\[1\] is -1, expected 0 <= index < 5"):
            gather(source, [0, -1], device="cuda")


def test_gather_beyond_32_bits():
    rows = torch.zeros(3, 2**30 + 16, dtype=torch.uint8, device="cuda")
    rows[2, -1] = 7
    picked = gather(rows, torch.tensor([0, 2, 2], device="cuda"))
    assert picked.numel() > 2**31
    assert (picked[1, -1].item(), picked[2, -1].item(), picked[0, -1].item()) == (7, 7, 0)


def test_gather_neither_waits_nor_breaks_a_capture(no_sync):
    torch.cuda.set_sync_debug_mode("default")
    rows, pinned = torch.randn(50, 784, device="cuda"), torch.randn(50, 784).pin_memory()
    index, out = torch.arange(8, device="cuda"), torch.empty(8, 784, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    gather(rows, index)
    gather(rows, [1, 2, 3])
    gather(rows, index, mean=0.5, std=2.0, dtype=torch.float16)
    gather(pinned, index, device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather(rows, index, out=out, std=2.0)
    index.add_(3)
    graph.replay()
    assert torch.equal(out, rows[3:11] * 0.5)


def test_a_dataset_on_the_gpu():
    x, y = torch.randn(100, 784, device="cuda"), torch.arange(100, device="cuda")
    batch = TensorDataset(x, y).__getitems__([5, 3, 99])
    xb, yb = mbperf.collate(batch)
    assert torch.equal(xb, x[[5, 3, 99]])
    assert yb.tolist() == [5, 3, 99]


# Collate.


@pytest.mark.parametrize("count", [1, 64, 448, 449, 4000, 4001, 9000])
@pytest.mark.parametrize("shape", [(), (3,), (784,), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_samples_on_the_gpu_are_stacked_there(count, shape, dtype):
    rows = torch.randint(0, 100, (count, *shape), generator=generator(0)).to("cuda", dtype)
    samples = [row.clone() if k % 2 else row for k, row in enumerate(rows)]
    assert_same(collate(samples), torch.stack(samples))


def test_unusual_samples_on_the_gpu_are_torchs():
    x = torch.randn(4, 3, 5, 5, device="cuda")
    for samples in (
        list(x.to(memory_format=torch.channels_last)[:, None]),
        list(x.transpose(1, 3)),
        [x[0], x[1].double()],
        [x[0, :0], x[1, :0]],
    ):
        assert_same(collate(samples), torch.stack(samples))
    leaf = x[0].clone().requires_grad_()
    collate([leaf, leaf]).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    with pytest.raises(
        RuntimeError, match=r"batch\[1\] has shape \(1, 5, 5\), batch\[0\] has shape \(3, 5, 5\)"
    ):
        collate([x[0], x[1, :1]])
    with pytest.raises(RuntimeError, match=r"batch\[:\].*same device"):
        collate([x[0], x[1].cpu()])


def test_one_copy_for_a_batch_and_none_waits(no_sync):
    torch.cuda.set_sync_debug_mode("default")
    mixed = [torch.uint8, torch.float32, torch.float64]
    samples = [
        {"x": torch.randn(784), "y": k, "z": {"w": torch.ones(3)}, "mixed": torch.ones(5).to(mixed[k % 3])}
        for k in range(64)
    ]
    ours, expected = Collate(device="cuda"), collate(samples)
    ours(samples)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        torch.cuda.set_sync_debug_mode("error")
        got = ours(samples)
        torch.cuda.set_sync_debug_mode("default")
    copies = [event.name for event in seen.events() if event.name.startswith("Memcpy")]
    assert len([name for name in copies if "HtoD" in name]) == 1, copies
    assert not [name for name in copies if "DtoH" in name], copies
    assert_same(got, expected, device="cuda")


def test_a_batch_on_its_way_is_not_overwritten():
    """The device is kept busy, so that the copies of many batches wait in line behind one buffer."""
    ours = Collate(device="cuda")
    torch.cuda._sleep(20_000_000)
    batches = [ours([torch.full((1 << 18,), float(k))]) for k in range(20)]
    for k, got in enumerate(batches):
        assert bool((got == k).all())
