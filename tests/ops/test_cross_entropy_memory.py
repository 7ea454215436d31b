"""Allocations of cross_entropy: no copy of logits that a stride describes, one gradient, 64-bit offsets."""

import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import REDUCTIONS, indices, layouts, logits, probabilities
from torch.profiler import ProfilerActivity, profile

from mbperf import cross_entropy
from mbperf.measure.memory import peak_memory
from mbperf.testing import test_near

# AddressSanitizer keeps one byte of its own for every eight.
SHADOW = 1 / 8 if os.environ.get("MBPERF_SANITIZE") else 0

# A second stride for the positions would serve these two as well; torch copies them too.
COPIED = {"transposed pixels", "expanded pixels"}


def copies(call):
    """The sizes of what a call copies from tensor to tensor, by torch's own record of its operators."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    return [e.input_shapes[0] for e in seen.events() if e.name in ("aten::copy_", "aten::clone")]


@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_no_layout_of_the_logits_is_copied(name, x, reduction, soft):
    y = x.detach().softmax(1) if soft else indices(x.shape[1], x.shape[0], *x.shape[2:])
    leaf = x.requires_grad_()
    upstream = torch.ones(x.shape[:1] + x.shape[2:]) if reduction == "none" else None

    def call():
        loss = cross_entropy(leaf, y, reduction=reduction)
        torch.autograd.grad(loss, leaf, upstream)

    copied = [size for size in copies(call) if torch.Size(size).numel() >= x.numel()]
    assert bool(copied) == (name in COPIED)


def test_a_copy_would_be_seen():
    x, y = logits(6, 12).t(), indices(6, 12)
    assert copies(lambda: cross_entropy(x.contiguous(), y)) == [[12, 6]] * 2


@pytest.mark.parametrize("loss", ["mbperf:cross_entropy", "torch.nn.functional:cross_entropy"])
def test_peak_of_forward_and_backward(loss):
    rows, classes = 512, 8_000
    gradients = peak_memory(loss, rows, classes) / (4 * rows * classes)
    if loss.startswith("mbperf"):
        assert 1 <= gradients < 1.3 + SHADOW  # the gradient, and nothing of its size besides
    else:
        assert gradients > 1.9  # the figure moves with what is allocated


@pytest.fixture
def beyond_32_bits():
    """A tensor of 2**31 + 2**20 float32 that takes no memory but where it is written."""
    elements = 2**31 + 2**20
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python from 3.13 on; Linux's value
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | no_reserve)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)  # which unmaps it when it goes


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 40), (2**30, 1)),
        ((3, 5000), (2**30, 1)),
        ((40, 9), (55_064_000, 1)),
        ((70, 5), (1, 2**29)),
        ((5, 300), (1, 7_183_000)),
        ((3, 7, 5), (2**30, 5, 1)),
        ((2, 5, 3), (9, 2**29, 3)),
    ],
    ids=str,
)
def test_offsets_of_more_than_32_bits(beyond_32_bits, shape, strides):
    far = beyond_32_bits.as_strided(shape, strides)
    assert sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= 2**31
    near = logits(*shape).detach()
    far.copy_(near)
    for y in (indices(shape[1], shape[0], *shape[2:]), probabilities(*shape)):
        ours, theirs = far.detach().requires_grad_(), near.clone().requires_grad_()
        for reduction in ("mean", "none"):
            loss, expected = (
                f(x, y, reduction=reduction) for f, x in ((cross_entropy, ours), (F.cross_entropy, theirs))
            )
            test_near(loss, expected)
            test_near(torch.autograd.grad(loss.sum(), ours), torch.autograd.grad(expected.sum(), theirs))
