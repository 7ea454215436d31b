"""What a sharded loss adds to a rank's memory beside the gradient of its logits."""

import torch

import mbperf
from mbperf.distributed import vocab_parallel_cross_entropy
from mbperf.measure.memory import added_at_peak

ROWS, CLASSES = 1 << 17, 64
MOST_BYTES_A_ROW = 128


def forward_backward(rows):
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, CLASSES, generator=source, requires_grad=True)
    target = torch.randint(0, 2 * CLASSES, (rows,), generator=source)
    return lambda: torch.autograd.grad(vocab_parallel_cross_entropy(logits, target), logits)


def bytes_a_row(rank):
    forward_backward(8)()  # loads code
    call = forward_backward(ROWS)
    mbperf.memory.empty_cache()
    return added_at_peak(call) / ROWS - 4 * CLASSES


def test_beside_the_gradient_it_takes_some_numbers_a_row(world, say):
    for rank, beside in enumerate(world.run(2, bytes_a_row)):
        say(f"rank {rank}: {beside:.0f} bytes a row beside the gradient, forward and backward")
        assert beside < MOST_BYTES_A_ROW
