"""Log-probabilities and entropies as people write them, and what tests of the fused ones have in common."""

import math

import torch


def usual(logits, target, temperature=1.0, ignore_index=-100):
    """Log-probabilities and entropies by log_softmax, gather and a sum, in float32 or float64."""
    dim = 0 if logits.dim() == 1 else 1
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = target.long() == ignore_index
    log_p = (wide.masked_fill(ignored.unsqueeze(dim), 0) / temperature).log_softmax(dim)
    at_target = log_p.gather(dim, target.long().masked_fill(ignored, 0).unsqueeze(dim)).squeeze(dim)
    terms = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)
    return at_target.masked_fill(ignored, 0), -terms.sum(dim).masked_fill(ignored, 0)


def values_and_gradient(function, logits, target, upstream, dtype=None, **kwargs):
    """Log-probabilities, entropies, and the gradient for upstream gradients of both."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    outputs = function(leaf, target, **kwargs)
    grads = [g.to(output.dtype) for g, output in zip(upstream, outputs, strict=True)]
    return *(output.detach() for output in outputs), torch.autograd.grad(outputs, leaf, grads)[0]


def upstream_of(target, seed=5):
    """An upstream gradient for each of both outputs."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(2, *target.shape, generator=source, dtype=torch.float64)
    return list(values.to(target.device))


def set_special_values(x, y):
    """Let the first five rows have: one class left, none, a NaN, an infinity, a target of probability 0."""
    classes = x.shape[1]
    x[0, :-1] = -math.inf  # one class is left
    x[1] = -math.inf
    x[2, 0] = math.nan
    x[3, classes // 2] = math.inf
    x[4, 0], y[4] = -math.inf, 0
    y[0] = classes - 1


def on_other_backends(op):
    """The operator as a backend without kernels of its own has it, for tensors of the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return lambda *args, **kwargs: op.default.redispatch(keys, *args, **kwargs)
