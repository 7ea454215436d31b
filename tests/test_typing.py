"""A user's program of the public names, which mypy checks as strictly as it can: see pyproject.toml."""

import torch
from torch.utils.data import DataLoader
from typing_extensions import assert_type  # typing's own begins with Python 3.11

from mbperf import (
    Collate,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LossAndStats,
    TensorDataset,
    collate,
    cross_entropy,
    cross_entropy_with_stats,
    gather,
    kl_div_from_logits,
    linear_cross_entropy,
    linear_token_log_probs,
    memory,
    token_log_probs,
)


def test_the_public_names_have_the_types_that_a_user_expects() -> None:
    x, y = torch.randn(8, 4), torch.randint(4, (8,))
    assert assert_type(cross_entropy(x, y), torch.Tensor).shape == ()
    with_lse = assert_type(cross_entropy(x, y, return_lse=True), tuple[torch.Tensor, torch.Tensor])
    assert with_lse[1].shape == (8,)
    loss: torch.Tensor = CrossEntropyLoss(x.new_ones(4), label_smoothing=0.1)(x, y)
    assert loss.shape == ()

    stats = assert_type(cross_entropy_with_stats(x, y, softcap=30.0), LossAndStats)
    assert assert_type(stats.predicted, torch.Tensor).shape == stats.entropy.shape == (8,)

    head = torch.randn(3, 4)
    chunked = assert_type(linear_cross_entropy(x, head, y % 3, softcap=30.0), torch.Tensor)
    assert chunked.shape == ()
    _, lse = assert_type(
        linear_cross_entropy(x, head, y % 3, return_lse=True), tuple[torch.Tensor, torch.Tensor]
    )
    assert lse.shape == (8,)
    last_layer: torch.Tensor = LinearCrossEntropyLoss(4, 3, memory_budget=1 << 20)(x, y % 3)
    assert last_layer.shape == ()

    log_probs = assert_type(token_log_probs(x, y, temperature=0.7), torch.Tensor)
    assert log_probs.shape == (8,)
    _, entropy = assert_type(token_log_probs(x, y, return_entropy=True), tuple[torch.Tensor, torch.Tensor])
    assert entropy.shape == (8,)

    from_hidden = assert_type(linear_token_log_probs(x, head, y % 3), torch.Tensor)
    assert from_hidden.shape == (8,)
    pair = assert_type(
        linear_token_log_probs(x, head, y % 3, return_entropy=True), tuple[torch.Tensor, torch.Tensor]
    )
    assert pair[1].shape == (8,)

    divergence = assert_type(kl_div_from_logits(x, x, temperature=2, reduction="none"), torch.Tensor)
    assert divergence.shape == (8,)

    rows = assert_type(gather(x, y, dtype=torch.float16), torch.Tensor)
    assert rows.shape == (8, 4)
    assert len(assert_type(gather((x, y), y), tuple[torch.Tensor, ...])) == 2
    dataset = TensorDataset(x, y, mean=0.5, std=[1.0])
    sample = assert_type(dataset[0], tuple[torch.Tensor, ...])
    loader = DataLoader(dataset, batch_size=4, collate_fn=Collate(pad=0, mask=False))
    [xb, yb] = collate([sample])
    assert [tuple(joined.shape) for joined in map(torch.cat, zip(*loader, strict=True))] == [(8, 4), (8,)]
    assert (xb.shape, yb.shape) == ((1, 4), (1,))

    memory.empty_cache()
    assert assert_type(memory.stats().kept_bytes, int) == 0
