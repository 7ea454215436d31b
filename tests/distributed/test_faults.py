"""What goes wrong in one rank ends every other one, with its number, within the group's timeout."""

import os
import signal
import time

import pytest
import torch
from ranks import RankFailed, world_of

from mbperf.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

TIMEOUT_S = 2.0
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 4, 5])


def raised(call):
    try:
        call()
    except (IndexError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def outcome(rank, target=TARGET, **settings):
    logits = settings.pop("logits", LOGITS)
    return raised(lambda: vocab_parallel_cross_entropy(logits, target, **settings))


def unowned(rank):
    first = outcome(rank, torch.tensor([0, 1, 2, 3, 4, 12]))
    return first, outcome(rank, TARGET - 1), outcome(rank)


def test_a_target_that_no_rank_owns_raises_on_every_rank(world):
    for above, below, right in world.run(3, unowned):
        assert above == ("IndexError", "Target 12 is out of bounds.")
        assert below == ("IndexError", "Target -1 is out of bounds.")
        assert right == ("nothing", "")


def changed_target(rank):
    leaf, target = LOGITS.clone().requires_grad_(), TARGET.clone()
    loss = vocab_parallel_cross_entropy(leaf, target)
    target.data[0] = 99
    return raised(loss.backward)


def test_a_target_changed_before_backward_raises(world):
    assert world.run(2, changed_target) == [("IndexError", "Target 99 is out of bounds.")] * 2


def disagreements(rank):
    """What two thirds of the ranks say, and rank 1 else; after each a call that works: nobody still waits."""
    said = []
    for number, (change, settings) in enumerate(DISAGREEMENTS):
        # New sizes on all ranks first, for what changes the size of a message; then sizes that are known.
        rows = number + 2 if change else 1
        logits, target = LOGITS.repeat(rows, 1), TARGET.repeat(rows)
        if rank == 1:
            logits, target = (change or (lambda *both: both))(logits, target)
        said.append(outcome(rank, target, logits=logits, **(settings if rank == 1 else {})))
        assert outcome(rank) == ("nothing", "")
    return said


DISAGREEMENTS = [
    (lambda logits, target: (logits[:5], target[:5]), {}),
    (lambda logits, target: (logits.double(), target), {}),
    (lambda logits, target: (logits, target), {"label_smoothing": 0.1}),
    (None, {"reduction": "sum"}),
    (None, {"ignore_index": 5}),
    (None, {"z_loss": 0.5}),
    (None, {"out_dtype": torch.float64}),
    (lambda logits, target: (logits, target.flip(0)), {}),
]


def test_ranks_that_disagree_get_an_error_each(world):
    names = "N", "dtype", "label_smoothing", "reduction", "ignore_index", "z_loss", "out_dtype", "different"
    for said in world.run(3, disagreements):
        for name, (kind, text) in zip(names, said, strict=True):
            assert kind == "RuntimeError"
            assert name in text
            assert name == "different" or "on rank 0" in text


def late_disagreement(rank):
    """Rank 1 alone changes the size of its message: the others are in their collective by then."""
    assert outcome(rank) == ("nothing", "")
    began = time.monotonic()
    few = {"logits": LOGITS[:5], "target": TARGET[:5]}
    return outcome(rank, **(few if rank == 1 else {})), time.monotonic() - began


def killed_in_forward(rank, victim):
    assert outcome(rank) == ("nothing", "")
    began = time.monotonic()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(rank), time.monotonic() - began


def killed_in_backward(rank, victim):
    leaf = LOGITS.clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(leaf, torch.ones(3, 4, requires_grad=True), TARGET)
    began = time.monotonic()
    if rank == victim:
        loss.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
    return raised(loss.backward), time.monotonic() - began


def never_comes(rank, victim):
    assert outcome(rank) == ("nothing", "")
    began = time.monotonic()
    if rank == victim:
        time.sleep(3 * TIMEOUT_S)
        return None
    return outcome(rank), time.monotonic() - began


@pytest.fixture
def frail_world(tmp_path):
    with world_of(3, tmp_path, TIMEOUT_S) as ranks:
        yield ranks
    assert not any(process.is_alive() for process in ranks.processes)


@pytest.mark.parametrize("fate", [killed_in_forward, killed_in_backward, never_comes])
def test_a_rank_that_is_gone_is_named_by_every_other(frail_world, fate):
    victim = 2
    for rank, result in enumerate(frail_world.outcomes(3, fate, victim)):
        if rank == victim:
            assert result is None or isinstance(result, EOFError)
            continue
        assert not isinstance(result, RankFailed), result
        (kind, text), seconds = result
        assert kind == "RuntimeError"
        assert f"rank {victim} does not answer" in text
        assert seconds < 2 * TIMEOUT_S + 2


def test_a_rank_that_changes_alone_is_told_and_tells(frail_world):
    for result in frail_world.outcomes(3, late_disagreement):
        assert not isinstance(result, RankFailed), result
        (kind, text), seconds = result
        assert kind == "RuntimeError"
        assert "disagree in N: 6 on rank 0, 5 on rank 1, 6 on rank 2" in text
        assert seconds < 2 * TIMEOUT_S + 2
