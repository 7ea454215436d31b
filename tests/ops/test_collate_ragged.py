"""Padded and packed batches against torch's pad_sequence and cat."""

import numpy as np
import pytest
import torch
from batches import assert_same, values
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from mbperf import Collate
from mbperf.ops.collate_rules import Packed, Padded

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex128,
]


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_fuzz_padding_equals_pad_sequence(lengths, rest, dtype, strided):
    rng = np.random.default_rng(0)
    batch = [values(rng, (n, *rest), dtype) for n in lengths]
    if strided:
        batch = [torch.stack([t, t], -1)[..., 0] for t in batch]
    pad = 1
    padded = Collate(pad=pad, lengths=True, mask=True)(batch)
    assert type(padded) is Padded
    assert_same(padded.values, pad_sequence(batch, batch_first=True, padding_value=pad))
    assert_same(padded.lengths, torch.tensor(lengths))
    assert_same(padded.mask, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    assert_same(Collate(pad=pad)(batch), padded.values)
    packed = Collate(pad="packed")(batch)
    assert type(packed) is Packed
    assert_same(packed.values, torch.cat(batch))
    assert_same(packed.cu_seqlens, torch.tensor([0, *lengths]).cumsum(0).int())
    assert packed.max_seqlen == max(lengths)


def test_only_named_fields_are_padded(device):
    batch = [
        {"tokens": torch.arange(k), "image": torch.zeros(3, 4), "n": k, "t": [np.arange(k)]} for k in (2, 3)
    ]
    result = Collate(pad={"tokens": -100, ("t", 0): "packed"}, mask=True, device=device)(batch)
    assert_same(result["tokens"].values.cpu(), torch.tensor([[0, 1, -100], [0, 1, 2]]))
    assert_same(result["tokens"].mask.cpu(), torch.tensor([[True, True, False], [True, True, True]]))
    assert result["tokens"].lengths is None
    assert_same(result["t"][0].cu_seqlens.cpu(), torch.tensor([0, 2, 5], dtype=torch.int32))
    assert_same(result["image"].cpu(), torch.zeros(2, 3, 4))
    assert_same(result["n"].cpu(), torch.tensor([2, 3]))


def test_scalars_are_stacked_beside_padded_fields():
    batch = [(torch.arange(k), torch.tensor(k)) for k in (1, 2)]
    assert_same(Collate(pad=0)(batch), [torch.tensor([[0, 0], [0, 1]]), torch.tensor([1, 2])])


def test_dtypes_promote_as_in_collate():
    batch = [torch.arange(2), torch.tensor([0.5])]
    assert_same(Collate(pad=-1)(batch), torch.tensor([[0.0, 1], [0.5, -1]]))
    with pytest.raises(TypeError, match="dtype"):
        Collate(pad=-1, strict=True)(batch)


@pytest.mark.parametrize("pad", [0.5, "packed"])
def test_gradients_flow(pad, device):
    leaves = [torch.randn(k, 2, requires_grad=True) for k in (1, 3)]
    result = Collate(pad=pad, device=device)(leaves)
    (result.values if pad == "packed" else result).sum().backward()
    assert_same(leaves[1].grad, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("pad", "batch", "error", "words"),
    [
        (
            0,
            [torch.zeros(2, 3), torch.zeros(2, 4)],
            RuntimeError,
            r"batch\[1\] has shape \(2, 4\).*only the first",
        ),
        (0, [torch.zeros(2), torch.zeros(2, 4)], RuntimeError, r"batch\[1\] has shape \(2, 4\)"),
        (0.5, [torch.arange(2), torch.arange(3)], ValueError, "does not fit into torch.int64"),
        (-1, [torch.zeros(2, dtype=torch.uint8)], ValueError, "does not fit into torch.uint8"),
        (
            0,
            [torch.zeros(2), torch.zeros(2, device="meta")],
            TypeError,
            r"batch\[1\].*only strided CPU tensors",
        ),
        (0, [torch.zeros(2), 1.0], TypeError, r"batch\[1\] is of type float"),
    ],
)
def test_an_error_names_the_place(pad, batch, error, words):
    with pytest.raises(error, match=words):
        Collate(pad=pad)(batch)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pad": "zero"}, "expects a number"),
        ({"lengths": True}, "lengths"),
        ({"pad": "packed", "mask": True}, "mask"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Collate(**settings)


def test_without_pad_nothing_changes():
    batch = [(torch.zeros(2), 1)] * 2
    assert_same(Collate()(batch), default_collate(batch))
