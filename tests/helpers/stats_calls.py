"""Entropy, predicted class and its probability as people write them, for tests of the fused ones."""

import torch


def usual_stats(input, target, ignore_index=-100, dtype=torch.float64):
    """The three of each position in torch's own operators; 0, -1 and 0 where the target is ignored."""
    dim = 0 if input.dim() == 1 else 1
    logits = input.detach().to(dtype)
    soft = target.shape == input.shape
    ignored = torch.zeros((), dtype=torch.bool) if soft else (target == ignore_index)
    predicted = input.detach().argmax(dim)
    ignored = ignored.reshape(() if soft else predicted.shape)
    log_p = logits.log_softmax(dim)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim)
    rows = entropy, predicted, log_p.exp().amax(dim)
    return [row.masked_fill(ignored, value) for row, value in zip(rows, (0, -1, 0), strict=True)]
