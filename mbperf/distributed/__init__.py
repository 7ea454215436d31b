"""Losses over several processes, on torch.distributed, which brings launcher, transport and protocol."""

from mbperf.distributed.losses import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]
