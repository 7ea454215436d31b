"""Losses over several processes, on torch.distributed, which brings launcher, transport and protocol."""

from mbperf.distributed.log_probs import (
    vocab_parallel_linear_token_log_probs,
    vocab_parallel_token_log_probs,
)
from mbperf.distributed.losses import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_token_log_probs",
    "vocab_parallel_token_log_probs",
]
