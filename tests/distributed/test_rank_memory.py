"""What a sharded loss adds to a rank's memory beside the gradient of its logits."""

import pytest
import torch
from ranks import world_of

import mbperf
from mbperf.distributed import vocab_parallel_cross_entropy
from mbperf.measure import heap
from mbperf.measure.memory import added_at_peak

RANKS, ROWS, CLASSES = 2, 1 << 18, 64
# Of a row, from forward to backward its max and sum; in backward its target among the classes of the rank.
BYTES_A_ROW = 2 * 4 + 8
# Forward, where there is no gradient: the message, what is gathered, what gloo copies it from, and 6 of ours.
FORWARD_BYTES_A_ROW = 12 * (1 + RANKS + RANKS) + 6
ANYWAY = 1 << 20  # numbers of 8,192 rows at a time, pages of code


def problem(rows):
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, CLASSES, generator=source, requires_grad=True)
    return logits, torch.randint(0, RANKS * CLASSES, (rows,), generator=source)


def bytes_beside_the_gradient(rank):
    def forward_backward(logits, target):
        return torch.autograd.grad(vocab_parallel_cross_entropy(logits, target), logits)

    # By default glibc keeps some freed blocks, more or fewer of them from one process to the next.
    heap.set_state(heap.FRESH)
    forward_backward(*problem(8))  # loads code
    logits, target = problem(ROWS)
    mbperf.memory.empty_cache()
    both = added_at_peak(lambda: forward_backward(logits, target)) - logits.nbytes
    mbperf.memory.empty_cache()
    return both, added_at_peak(lambda: vocab_parallel_cross_entropy(logits, target))


@pytest.mark.skipif(not heap.has_states(), reason="glibc alone can be told to keep no freed block")
def test_beside_the_gradient_it_takes_16_bytes_a_row(tmp_path, say):
    with world_of(RANKS, tmp_path) as world:
        for rank, (both, forward) in enumerate(world.run(RANKS, bytes_beside_the_gradient)):
            say(
                f"rank {rank}, bytes a row: forward and backward {both / ROWS:.1f} beside the gradient, "
                f"forward alone {forward / ROWS:.1f}"
            )
            assert both <= BYTES_A_ROW * ROWS + ANYWAY
            assert forward <= FORWARD_BYTES_A_ROW * ROWS + ANYWAY
