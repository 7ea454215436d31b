"""The lesson's way to cross entropy: log softmax three times over, nll, logsumexp; and accuracy.

Logits are (n, classes), targets (n,) int64. These are the naive versions that everything is measured
against: each line is the formula, each operation a pass over memory.
"""

import torch
from torch import Tensor


def log_softmax_ratio(x: Tensor) -> Tensor:
    """Log softmax, first step: the definition, log of exp(x) / sum exp(x). Overflows where exp(x) does.

    The torch equivalent is `F.log_softmax(x, -1)`.

    Args:
        x: logits (..., C), floating.

    Returns:
        Log probabilities, shaped like `x`, in nats.

    Source: fast.ai part 2 (2019), lesson 9, "Cross entropy loss".

    >>> log_softmax_ratio(torch.zeros(1, 2))
    tensor([[-0.6931, -0.6931]])
    """
    return (x.exp() / (x.exp().sum(-1, keepdim=True))).log()


def log_softmax_difference(x: Tensor) -> Tensor:
    """Log softmax, second step: log(a / b) = log a - log b, so x - log sum exp(x). Still overflows.

    The torch equivalent is `F.log_softmax(x, -1)`.

    Args:
        x: logits (..., C), floating.

    Returns:
        Log probabilities, shaped like `x`, in nats.

    Source: fast.ai part 2 (2019), lesson 9, "Cross entropy loss".

    >>> log_softmax_difference(torch.zeros(1, 2))
    tensor([[-0.6931, -0.6931]])
    """
    return x - x.exp().sum(-1, keepdim=True).log()


def log_softmax_stable(x: Tensor) -> Tensor:
    """Log softmax, third step: x - logsumexp(x), which does not overflow. The lesson's final `log_softmax`.

    The torch equivalent is `F.log_softmax(x, -1)`.

    Args:
        x: logits (..., C), floating.

    Returns:
        Log probabilities, shaped like `x`, in nats.

    Source: fast.ai part 2 (2019), lesson 9, "the LogSumExp trick".

    >>> log_softmax_stable(torch.full((1, 2), 1000.0)).round(decimals=2)
    tensor([[-0.6900, -0.6900]])
    """
    return x - x.logsumexp(-1, keepdim=True)


log_softmax = log_softmax_stable


def logsumexp(x: Tensor) -> Tensor:
    """Log of the sum of exponentials, with the largest logit taken out first so that nothing overflows.

    The torch equivalent is `x.logsumexp(-1)`.

    Args:
        x: logits (..., C), floating.

    Returns:
        (...), in nats.

    Source: fast.ai part 2 (2019), lesson 9, "the LogSumExp trick".

    >>> logsumexp(torch.full((1, 2), 1000.0)).round(decimals=2)
    tensor([1000.6900])
    """
    m = x.max(-1)[0]
    return m + (x - m.unsqueeze(-1)).exp().sum(-1).log()


def nll(input: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood: minus the mean of what the log probabilities give to the targets.

    The torch equivalent is `F.nll_loss(input, target)`.

    Args:
        input: log probabilities (n, C), floating.
        target: class indices (n,) int64.

    Returns:
        0-D tensor, in nats.

    Source: fast.ai part 2 (2019), lesson 9, "Cross entropy loss".

    >>> nll(torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log(), torch.tensor([1, 0]))
    tensor(0.4581)
    """
    return -input[range(target.shape[0]), target].mean()


def accuracy(out: Tensor, yb: Tensor) -> Tensor:
    """Share of the rows whose largest output is the target's.

    torch has no equivalent of its own.

    Args:
        out: logits or probabilities (n, C).
        yb: class indices (n,) int64.

    Returns:
        0-D float32 tensor, 0 to 1.

    Source: fast.ai part 2 (2019), lesson 9, `accuracy`.

    >>> accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return (torch.argmax(out, dim=1) == yb).float().mean()
