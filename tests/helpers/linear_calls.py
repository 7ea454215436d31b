"""Arguments for tests of linear_cross_entropy, and the unfused way it is compared with."""

import torch
import torch.nn.functional as F
from devices import generator, here


def unfused(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    ignore_index=None,
    softcap=None,
    options=None,
    **settings,
):
    """cross_entropy(linear(...)), whatever version of torch there is."""
    flat = linear_weight.flatten(0, -2)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, flat, bias).reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, ignore_index=ignored, **settings)


def hidden(*shape, dtype=torch.float64, seed=0):
    return (
        torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(here(), dtype).requires_grad_()
    )


def head(*shape, dtype=torch.float64, seed=1):
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).mul_(0.5)
    return values.to(here(), dtype).requires_grad_()


def classes(count, *shape, ignored=0.0, seed=2):
    target = torch.randint(0, count, shape, generator=generator(seed))
    target[torch.rand(shape, generator=generator(seed + 1)) < ignored] = -100
    if ignored < 1 and target.numel():
        target.view(-1)[0] = 0  # something to take the mean of
    return target.to(here())


def gradients(function, *leaves, upstream=None, **settings):
    """The value and the gradients of the leaves that require grad."""
    value = function(*leaves, **settings)
    wanted = [t for t in (*leaves, *settings.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, wanted, upstream, allow_unused=True)
