"""A whole training step of a small language model: what a faster loss is worth in it.

The model is torch.nn's own; the contenders differ in the loss alone. One call takes a tenth of a second and
more, so it is not part of the default run: `pytest bench/step_transformer.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SHORT
from torch import Tensor, nn

import mbperf
from mbperf.measure.group import Group
from mbperf.testing import cross_entropy_float64

BATCH, LENGTH, WIDTH, HEADS = 4, 128, 128, 4
VOCABULARIES = (32_000, 50_257)
Loss = Callable[[Tensor, Tensor], Tensor]


class LanguageModel(nn.Module):
    """Embedding, one causal transformer layer, and a projection to logits (B * L, V)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.logits = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=self.logits.weight.dtype)
        return self.logits(self.layer(self.embedding(tokens), mask, is_causal=True)).flatten(0, 1)


def make_inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Any, ...]:
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH + 1))
    return (*LanguageModel(vocabulary).to(dtype).parameters(), tokens)


def step(model: nn.Module, loss: Loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the loss, and its gradients by the weights that its own gradient reaches first and last."""
    *parameters, tokens = inputs
    named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
    logits = torch.func.functional_call(model, named, (tokens[:, :-1],))
    value = loss(logits, tokens[:, 1:].flatten())
    gradients = dict(zip(named, torch.autograd.grad(value, parameters), strict=True))
    return value, gradients["logits.bias"], gradients["embedding.weight"]


def exact(input: Tensor, target: Tensor) -> Tensor:
    return cross_entropy_float64(input.double(), target)


def expected(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The same model with the loss in float64; what its layers round is not the loss's error."""
    *parameters, tokens = inputs
    return step(model, exact, *(parameter.requires_grad_() for parameter in parameters), tokens)


def group(vocabulary: int, dtype: torch.dtype) -> Group:
    with torch.device("meta"):
        model = LanguageModel(vocabulary)
    return Group(
        op="training_step",
        case=f"{BATCH}x{LENGTH} tokens, V {vocabulary} {SHORT[dtype]}",
        make_inputs=partial(make_inputs, vocabulary, dtype),
        contenders={
            "fused": partial(step, model, mbperf.cross_entropy),
            "torch": partial(step, model, F.cross_entropy),
        },
        expected=partial(expected, model),
        floors={"torch": 1},
        facts={"N": BATCH * LENGTH, "C": vocabulary, "dtype": SHORT[dtype]},
        min_rounds=9,
        input_sets=2,
    )


@pytest.mark.race([group(v, dtype) for dtype in (torch.float32, torch.bfloat16) for v in VOCABULARIES])
def test_training_step(race):
    race()
