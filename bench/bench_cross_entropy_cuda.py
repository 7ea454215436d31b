"""Cross entropy on a GPU: fused against torch's, torch.compile, Liger and quack, against the memory limit.

Kernel time by captured graphs that rotate over inputs larger than the cache; "eager" rows are end to end.
Calls of the others as in liger-kernel 0.8.5 and quack-kernels 0.6.5.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FORWARD_BACKWARD, NO_GRAD, SHORT
from torch import Tensor

import mbperf
from mbperf.measure.gpu_group import Overwrites, measure_on_gpu
from mbperf.measure.group import Group
from mbperf.measure.traffic import cross_entropy_traffic

Loss = Callable[[Tensor, Tensor], Tensor]

NO_GPU = "no CUDA device"
SHAPES = [(8_192, classes) for classes in (256, 1_000, 4_096, 32_000, 50_257, 128_256, 262_144)] + [
    (65_536, 10)
]
EAGER = "eager"
# Rows of the float64 reference at a time: 0.5 GB of logits.
REFERENCE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Case:
    """Logits (N, C), a dtype, a pass, and how it is timed."""

    rows: int
    classes: int
    dtype: torch.dtype
    step: str
    eager: bool = False

    def __str__(self) -> str:
        words = [f"cuda {self.rows}x{self.classes}", SHORT[self.dtype], self.step, EAGER * self.eager]
        return " ".join(filter(None, words))


CASES = [
    Case(rows, classes, dtype, step)
    for dtype in (torch.bfloat16, torch.float32)
    for rows, classes in SHAPES
    for step in (NO_GRAD, FORWARD_BACKWARD)
]
CASES += [
    Case(rows, classes, dtype, step, eager=True)
    for dtype, step in (
        (torch.bfloat16, FORWARD_BACKWARD),
        (torch.bfloat16, NO_GRAD),
        (torch.float32, FORWARD_BACKWARD),
    )
    for rows, classes in SHAPES
]


# The others' kernels. Each is imported once; what cannot be imported is a visible row. Both compute what ours
# does by default: the mean over the targets that are not -100, and a gradient in the dtype of the logits.


def liger() -> Loss:
    """Liger's choice of its kernels; it takes the gradient in the forward pass, over the logits."""
    return import_module("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss(
        ignore_index=-100, reduction="mean"
    )


def quack() -> Loss:
    """Loss and lse forward, the gradient backward, into memory of its own."""
    function = import_module("quack.cross_entropy").cross_entropy
    return partial(function, ignore_index=-100, reduction="mean", inplace_backward=False)


PEERS: dict[str, tuple[str, Callable[[], Loss]]] = {
    "liger": ("liger-kernel", liger),
    "quack": ("quack-kernels", quack),
}
WRITES_GRADIENT_OVER_LOGITS = {"liger"}
NOT_IN_GRAPHS = {
    "liger": "waits for the device (Tensor.item of the targets that count), which no graph can hold; "
    "raced in the eager rows"
}


def imported() -> tuple[dict[str, Loss], dict[str, str], dict[str, str]]:
    """The peers that are installed, which releases they are, and why the others are not there."""
    there, releases, absent = {}, {}, {}
    for name, (package, load) in PEERS.items():
        try:
            there[name], releases[name] = load(), version(package)
        except Exception as error:
            absent[name] = f"not installed: {type(error).__name__}: {error}"
    return there, releases, absent


HAS_GPU = torch.cuda.is_available()
INSTALLED, RELEASES, ABSENT = imported() if HAS_GPU else ({}, {}, dict.fromkeys(PEERS, NO_GPU))


@pytest.mark.parametrize("peer", PEERS)
def test_peer(peer):
    """One line for each of the others: is it in the race, and if not, why."""
    if peer in ABSENT:
        pytest.skip(f"{peer}: {ABSENT[peer]}")
    print(f"{peer} {RELEASES[peer]}; in graphs: {NOT_IN_GRAPHS.get(peer, 'too')}")


def raced(case: Case) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers that race in a case, and why the others do not."""
    waiting = {} if case.eager else {name: why for name, why in NOT_IN_GRAPHS.items() if name in INSTALLED}
    return {name: loss for name, loss in INSTALLED.items() if name not in waiting}, ABSENT | waiting


def step(case: Case, loss: Loss) -> Callable[..., Any]:
    """The function that is timed."""

    def no_grad(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(input, target),)

    def forward_backward(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(input, target)
        return value, *torch.autograd.grad(value, input)

    return no_grad if case.step == NO_GRAD else forward_backward


def audible(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A peer's function that returns nothing, and says why, where it does not take the case."""

    def call(input: Tensor, target: Tensor) -> Any:
        try:
            return function(input, target)
        except Exception as error:
            print(f"{name} {tuple(input.shape)} {input.dtype}: {error!r}", file=sys.stderr)
            return ()

    return call


@cache
def compiled(rows: int, classes: int, dtype: torch.dtype) -> Loss:
    """torch.compile's, compiled for each size and pass."""
    config = torch._dynamo.config
    # All sizes share the code of F.cross_entropy, which beyond 8 would quietly run uncompiled.
    config.recompile_limit, config.fail_on_recompile_limit_hit = 4 * len(SHAPES), True
    return torch.compile(F.cross_entropy, dynamic=False)


def contenders(case: Case) -> dict[str, Callable[..., Any]]:
    losses: dict[str, Loss] = {"fused": mbperf.cross_entropy, "torch": F.cross_entropy}
    if case.dtype == torch.bfloat16:  # compiling takes seconds for each size and pass
        losses["compiled"] = compiled(case.rows, case.classes, case.dtype)
    functions: dict[str, Callable[..., Any]] = {name: step(case, loss) for name, loss in losses.items()}
    for name, loss in raced(case)[0].items():
        function = audible(name, step(case, loss))
        functions[name] = Overwrites(function) if name in WRITES_GRADIENT_OVER_LOGITS else function
    return functions


def make_inputs(case: Case) -> tuple[Tensor, Tensor]:
    logits = torch.randn(case.rows, case.classes, device="cuda", dtype=case.dtype)
    target = torch.randint(0, case.classes, (case.rows,), device="cuda")
    return logits.requires_grad_(case.step != NO_GRAD), target


def expected(case: Case, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient in float64, some rows at a time; the gradient kept in float32."""
    grad = torch.empty(input.shape, device=input.device) if case.step == FORWARD_BACKWARD else None
    total = torch.zeros((), dtype=torch.float64, device=input.device)
    rows = max(1, REFERENCE_ELEMENTS // case.classes)
    for begin in range(0, case.rows, rows):
        part = slice(begin, begin + rows)
        x, y = input[part].double(), target[part, None]
        lse = x.logsumexp(1, keepdim=True)
        total += (lse - x.gather(1, y)).sum()
        if grad is not None:
            p = (x - lse).exp_()
            grad[part] = p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype)).div_(case.rows)
    loss = total / case.rows
    return (loss,) if grad is None else (loss, grad)


def group(case: Case) -> Group:
    forward_backward = case.step == FORWARD_BACKWARD
    return Group(
        op="cross_entropy",
        case=str(case),
        make_inputs=partial(make_inputs, case),
        contenders=contenders(case),
        expected=partial(expected, case),
        traffic=cross_entropy_traffic(
            case.rows, case.classes, case.dtype.itemsize, backward=forward_backward
        ),
        facts={
            "N": case.rows,
            "C": case.classes,
            "dtype": SHORT[case.dtype],
            "pass": case.step,
            "options": EAGER * case.eager,
            "device": "cuda",
            "timing": "host clock, eager" if case.eager else "events around graphs",
            "releases": RELEASES,
            "absent": raced(case)[1],
        },
        measured_by=partial(measure_on_gpu, eager=case.eager),
    )


if HAS_GPU:

    @pytest.mark.race([group(case) for case in CASES])
    def test_cross_entropy_cuda(race):
        race()

else:

    @pytest.mark.skip(reason=NO_GPU)
    def test_cross_entropy_cuda():
        """Visible where there is nothing to race on."""
