"""Cross entropy: fused against the lesson's, against torch's, against the memory limit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import in_jax
import pytest
import torch
import torch.nn.functional as F
from cases import CROSS_ENTROPY, FORWARD_BACKWARD, LARGE, NO_GRAD, SHORT, CrossEntropyCase
from torch import Tensor

import mbperf
from mbperf.lesson.losses import log_softmax_difference, log_softmax_ratio, log_softmax_stable, nll
from mbperf.measure.group import Group
from mbperf.measure.memory import peak_memory
from mbperf.measure.traffic import cross_entropy_traffic
from mbperf.testing import cross_entropy_float64

Loss = Callable[[Tensor, Tensor], Tensor]


def naive(log_softmax: Callable[[Tensor], Tensor], input: Tensor, target: Tensor) -> Tensor:
    return nll(log_softmax(input), target)


def two_steps(input: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(input, -1), target)


def losses(case: CrossEntropyCase) -> dict[str, Loss]:
    """The contenders: the lesson's where its formula fits, all of its ways at its own size."""
    options = call_options(case)
    contenders: dict[str, Loss] = {"fused": partial(mbperf.cross_entropy, **options)}
    if len(case.shape) == 2 and case.dtype == torch.float32 and not case.options and case.classes <= 50_000:
        contenders["naive"] = partial(naive, log_softmax_stable)
    contenders["torch"] = partial(F.cross_entropy, **options)
    if case.shape == (64, 10) and case.dtype == torch.float32:
        contenders["naive_ratio"] = partial(naive, log_softmax_ratio)
        contenders["naive_difference"] = partial(naive, log_softmax_difference)
        contenders["nll_loss"] = two_steps
        contenders["module"] = torch.nn.CrossEntropyLoss()
    return contenders


def call_options(case: CrossEntropyCase) -> dict[str, Any]:
    options: dict[str, Any] = {"reduction": case.reduction, "label_smoothing": case.label_smoothing}
    if case.weighted:
        options["weight"] = torch.linspace(0.5, 1.5, case.classes, dtype=case.dtype)
    return {k: v for k, v in options.items() if k == "weight" or v not in ("mean", 0.0)}


def compiled(case: CrossEntropyCase) -> Loss:
    return torch.compile(partial(F.cross_entropy, **call_options(case)), dynamic=False)


def optional(case: CrossEntropyCase) -> dict[str, Callable[[], Callable[..., Any]]]:
    """The contenders that run when asked for; JAX's is written for the plain call alone."""
    contenders: dict[str, Callable[[], Callable[..., Any]]] = {"compiled": lambda: step(case, compiled(case))}
    if case.dtype == torch.float32 and not case.options:
        contenders["jax"] = lambda: in_jax.step(case.step == FORWARD_BACKWARD)
    return contenders


def step(case: CrossEntropyCase, loss: Loss) -> Callable[..., Any]:
    """The function that is timed."""

    def no_grad(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(input, target),)

    def forward(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (loss(input, target),)

    def forward_backward(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(input, target)
        return value, *torch.autograd.grad(value, input)

    def forward_backward_of_rows(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(input, target)
        return value, *torch.autograd.grad(value, input, ones_like_rows)

    def varied(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        values = []
        for rows in case.varied:
            value, gradient = forward_backward(input[:rows], target[:rows])
            values.append(value)
        return *values, gradient

    if case.varied:
        return varied
    if case.step == FORWARD_BACKWARD and case.reduction == "none":
        ones_like_rows = torch.ones(case.shape[:1] + case.shape[2:], dtype=case.dtype)
        return forward_backward_of_rows
    if case.step == FORWARD_BACKWARD:
        return forward_backward
    return no_grad if case.step == NO_GRAD else forward


def make_inputs(case: CrossEntropyCase) -> tuple[Tensor, Tensor]:
    logits = torch.randn(case.shape).to(case.dtype).requires_grad_(case.step != NO_GRAD)
    if case.soft:
        return logits, torch.randn(case.shape).softmax(1).to(case.dtype)
    return logits, torch.randint(0, case.classes, case.shape[:1] + case.shape[2:])


def expected(case: CrossEntropyCase, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaf = input.double().requires_grad_()
    if case.varied:
        values = [cross_entropy_float64(leaf[:rows], target[:rows]) for rows in case.varied]
        return *values, torch.autograd.grad(values[-1], leaf)[0][: case.varied[-1]]
    loss = cross_entropy_float64(leaf, target, **call_options(case))
    if case.step != FORWARD_BACKWARD:
        return (loss,)
    return loss, *torch.autograd.grad(loss.sum(), leaf)


def peak(loss: str) -> Callable[[], dict[str, int]]:
    return lambda: {"peak_memory_bytes": peak_memory(loss, *LARGE)}


def group(case: CrossEntropyCase) -> Group:
    itemsize = case.dtype.itemsize
    soft_bytes = case.rows * case.classes * itemsize if case.soft else None
    return Group(
        op="cross_entropy",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders={name: step(case, loss) for name, loss in losses(case).items()},
        optional=optional(case),
        expected=partial(expected, case),
        traffic=cross_entropy_traffic(
            case.rows,
            case.classes,
            itemsize,
            backward=case.step == FORWARD_BACKWARD,
            reduction=case.reduction,
            target_bytes=soft_bytes,
            weighted=case.weighted,
        ),
        floors={"torch": case.floor} if case.floor else {},
        facts={
            "N": case.rows,
            "C": case.classes,
            "dtype": SHORT[case.dtype],
            "pass": case.step,
            "options": case.options,
            "why": case.why,
        },
        extra_metrics={
            "fused": peak("mbperf:cross_entropy"),
            "torch": peak("torch.nn.functional:cross_entropy"),
        }
        if case.shape == LARGE and case.step == FORWARD_BACKWARD and case.dtype == torch.float32
        else {},
        cold=case.cold,
        # One call is five steps.
        min_rounds=9 if case.varied else None,
        also_fresh=not case.varied,
        input_sets=2 if case.varied else None,
    )


@pytest.mark.race([group(case) for case in CROSS_ENTROPY])
def test_cross_entropy(race):
    race()
