"""Bytes an operation has to move at least, whoever implements it: what GB/s and % roof are made of.

Counted once per byte of input and output in memory; scratch, repeated passes and cache refills are the
implementation's own loss and count for nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes read from the inputs and bytes written to the outputs."""

    read_bytes: int
    written_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.read_bytes + self.written_bytes


def cross_entropy_traffic(
    rows: int,
    classes: int,
    itemsize: int,
    *,
    backward: bool,
    reduction: str = "mean",
    target_bytes: int | None = None,
    weighted: bool = False,
) -> Traffic:
    """Count what cross entropy moves: logits and targets in, the loss and (backward) the gradient out.

    Args:
        rows: N, or N times the positions of K-dimensional logits.
        classes: C.
        itemsize: bytes of one logit.
        backward: forward and backward together, whose gradient is (rows, classes).
        reduction: "none" writes a loss per row.
        target_bytes: of all targets; one int64 per row by default.
        weighted: a factor per class is read too.

    Returns:
        Traffic, bytes.

    >>> cross_entropy_traffic(512, 32000, 4, backward=True).written_bytes
    65536004
    """
    logits = rows * classes * itemsize
    read = logits + (8 * rows if target_bytes is None else target_bytes) + (classes * itemsize * weighted)
    loss = itemsize * (rows if reduction == "none" else 1)
    return Traffic(read, loss + (logits if backward else 0))


def cross_entropy_stats_traffic(rows: int, classes: int, itemsize: int, *, backward: bool) -> Traffic:
    """Count what cross_entropy_with_stats moves: as cross_entropy, and two float32 and an int64 a row out.

    >>> cross_entropy_stats_traffic(64, 10, 4, backward=False)
    Traffic(read_bytes=3072, written_bytes=1028)
    """
    loss = cross_entropy_traffic(rows, classes, itemsize, backward=backward)
    return Traffic(loss.read_bytes, loss.written_bytes + 16 * rows)


def kl_div_traffic(rows: int, classes: int, itemsize: int) -> Traffic:
    """Count what a KL divergence moves, forward and backward: two sets of logits in, loss and gradient out.

    >>> kl_div_traffic(256, 1000, 4).read_bytes
    2048000
    """
    logits = rows * classes * itemsize
    return Traffic(2 * logits, itemsize + logits)


def token_log_probs_traffic(
    rows: int, classes: int, itemsize: int, *, backward: bool, entropy: bool
) -> Traffic:
    """Count what token_log_probs moves: logits and targets in, one or two float32 a row and the gradient out.

    >>> token_log_probs_traffic(64, 10, 2, backward=False, entropy=True)
    Traffic(read_bytes=1792, written_bytes=512)
    """
    logits = rows * classes * itemsize
    return Traffic(logits + 8 * rows, rows * 4 * (1 + entropy) + (logits if backward else 0))


def copy_traffic(payload_bytes: int) -> Traffic:
    """Count what collate and gather move: every byte of the batch is read once and written once.

    >>> copy_traffic(784 * 4 * 64).total_bytes
    401408
    """
    return Traffic(payload_bytes, payload_bytes)
