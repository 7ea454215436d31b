"""Arguments for tests of cross entropy, in every layout, and the comparison with F.cross_entropy."""

import torch
from devices import generator, here

from mbperf.testing import test_near

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


def outcome(function, *args, **kwargs):
    """The value and the gradients of a call, or the type and first line of what it raised."""
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    try:
        value = function(*args, **kwargs)
        grads = torch.autograd.grad(value.sum(), leaves) if leaves else ()
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return value, grads


def assert_same_outcome(ours, theirs, **tolerances):
    assert isinstance(ours[0], type) == isinstance(theirs[0], type), (ours, theirs)
    if isinstance(theirs[0], type):
        assert ours == theirs
        return
    test_near(ours[0], theirs[0], equal_nan=True, **tolerances)
    for mine, reference in zip(ours[1], theirs[1], strict=True):
        test_near(mine, reference, equal_nan=True, **tolerances)


def logits(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).mul_(3)
    return values.to(here(), dtype).requires_grad_()


def indices(classes, *shape, seed=1):
    return torch.randint(0, classes, shape, generator=generator(seed)).to(here())


def probabilities(*shape, dtype=torch.float32, seed=2):
    dim = 0 if len(shape) == 1 else 1
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).softmax(dim)
    return values.to(here(), dtype)


def hard(*shape):
    """Targets for logits of this shape, the second of them ignored."""
    dim = 0 if len(shape) == 1 else 1
    y = indices(shape[dim], *shape[:dim], *shape[dim + 1 :])
    if y.numel() > 2:
        y.view(-1)[1] = -100
    return y


def weights(*shape, dtype=torch.float64):
    """A factor per class of logits of this shape."""
    classes = shape[0 if len(shape) == 1 else 1]
    return torch.rand(classes, generator=generator(3), dtype=torch.float64).to(here(), dtype)


def moved(function):
    """The function, with the tensors of its calls on the device of this test."""

    def place(value):
        return value.to(here()) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    def call(*args, **kwargs):
        return function(*map(place, args), **{name: place(value) for name, value in kwargs.items()})

    return call


def on_the_cpu(function):
    """The function, of tensors that are moved to the CPU, with gradients of the tensors that are moved.

    For what torch 2.11 on CUDA does not do: its nll_loss2d keeps ignore_index in 32 bits, so that larger ones
    trip an assertion, which ends the process's use of the GPU; and the mean over 1-D logits whose only target
    is ignored is 0 there, NaN on the CPU.
    """

    def place(value):
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def call(*args, **kwargs):
        return function(*map(place, args), **{name: place(value) for name, value in kwargs.items()})

    return call


def layouts():
    """The same logits (4, 6, 5, 7) or (12, 6) in every memory layout a user may bring."""
    yield "contiguous", logits(4, 6, 5, 7).detach()
    yield "channels_last", logits(4, 6, 5, 7).detach().contiguous(memory_format=torch.channels_last)
    yield "transposed pixels", logits(4, 6, 7, 5).detach().transpose(2, 3)
    yield "batch last", logits(6, 5, 7, 4).detach().permute(3, 0, 1, 2)
    yield "sliced pixels", logits(4, 6, 5, 14).detach()[..., ::2]
    yield "expanded pixels", logits(4, 6, 1, 7).detach().expand(4, 6, 5, 7)
    yield "one pixel", logits(4, 6, 1, 1).detach()
    yield "rows", logits(12, 6).detach()
    yield "transposed", logits(6, 12).detach().t()
    yield "sliced rows", logits(24, 6).detach()[::2]
    yield "sliced classes", logits(12, 12).detach()[:, ::2]
    yield "narrowed classes", logits(12, 9).detach()[:, 1:7]
    yield "expanded rows", logits(1, 6).detach().expand(12, 6)
    yield "expanded classes", logits(12, 1).detach().expand(12, 6)
    yield "wide, transposed", logits(130, 70).detach().t()
    yield "wide, channels_last", logits(2, 130, 3, 5).detach().contiguous(memory_format=torch.channels_last)
    yield "wide, pixels", logits(2, 130, 3, 5).detach()
    yield "wide, sliced classes", logits(7, 300).detach()[:, ::2]


def placed(x):
    """The tensor, strides and all, on the device of this test."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(here())
    return memory.as_strided(x.size(), x.stride(), x.storage_offset())
