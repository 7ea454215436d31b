"""Losses over several processes, on torch.distributed: it brings the transport, and nothing of it is rebuilt."""

from mbperf.distributed.losses import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]
