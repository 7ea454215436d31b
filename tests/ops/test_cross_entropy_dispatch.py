"""cross_entropy under the compiler, autocast, hooks, fake tensors; what opcheck says of its operators."""

import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cross_entropy_calls import (
    REDUCTIONS,
    assert_same_outcome,
    hard,
    indices,
    logits,
    outcome,
    probabilities,
    weights,
)
from devices import here
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.optests import opcheck

import mbperf.ops.cross_entropy_stats  # noqa: F401 -- the fake kernel of its pass
from mbperf import CrossEntropyLoss, cross_entropy
from mbperf.testing import test_near

pytestmark = pytest.mark.usefixtures("device")

OPS = torch.ops.mbperf

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor compiles, and there is no compiler"
)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(dynamic, reduction):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: cross_entropy(x * 1, y, reduction=reduction, label_smoothing=0.1).sum(),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for rows in (4, 7, 9):
        x, y = logits(rows, 5), hard(rows, 5)
        for upstream in (torch.tensor(value, device=here()) for value in (1.0, 0.5)):
            expected = F.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1).sum()
            loss = compiled(x, y)
            test_near(loss, expected)
            test_near(torch.autograd.grad(loss, x, upstream), torch.autograd.grad(expected, x, upstream))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_compile_with_every_size_dynamic(soft):
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(f, x, y, w):
        return f(x * 2, y, w, reduction="mean", ignore_index=-1 if soft else 2)

    compiled = torch.compile(
        lambda *tensors: step(cross_entropy, *tensors), fullgraph=True, dynamic=True, backend=backend
    )
    graphs = 0
    for shape in ((4, 5), (7, 9), (300, 70), (3, 5000)):
        x, w = logits(*shape), weights(*shape, dtype=torch.float32)
        y = probabilities(*shape) if soft else hard(*shape).clamp(min=0)
        ours, theirs = compiled(x, y, w), step(F.cross_entropy, x, y, w)
        test_near(ours, theirs)
        test_near(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))
        graphs = graphs or backend.frame_count
    assert backend.frame_count == graphs  # none but for the first shape


def test_compile_of_rows_chosen_by_a_mask():
    # How many rows there are is known when the graph runs, not when it is made.
    torch._dynamo.reset()

    def loss(x, y):
        live = y >= 0
        return cross_entropy(x[live], y[live])

    x, y = logits(6, 40), hard(6, 40)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for some in (y, y.clamp(min=0), y.flip(0)):
            ours, theirs = compiled(x, some), F.cross_entropy(x, some)
            test_near(ours, theirs)
            test_near(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_compile_under_autocast_and_of_the_module():
    torch._dynamo.reset()
    criterion = CrossEntropyLoss(label_smoothing=0.1)

    def loss(x, y):
        with torch.autocast(here(), dtype=torch.bfloat16):
            return criterion(x @ x.mT, y)

    x, y = logits(6, 40), indices(6, 6)
    ours, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), loss(x, y)
    assert ours.dtype == eager.dtype == torch.float32
    test_near(ours, eager)
    test_near(torch.autograd.grad(ours, x), torch.autograd.grad(eager, x), rtol=1e-2, atol=1e-2)


def test_compile_raises_on_a_target_out_of_bounds():
    if here() == "cuda":
        pytest.skip("a wrong target ends the process's use of the GPU; test_cuda_device.py has it in another")
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(logits(4, 5), hard(4, 5))
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        compiled(logits(4, 5), torch.full((4,), 5))


class Losses(torch.nn.Module):
    """A loss without a weight and one with, as a program to be exported."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("weight", weights(6, 40, dtype=torch.float32))

    def forward(self, x, y):
        return self.function(x, y, label_smoothing=0.1), self.function(x, y, self.weight)


def exported():
    """The program of both losses for any number of rows."""
    rows = {0: torch.export.Dim("rows", min=2)}
    args = logits(6, 40).detach(), hard(6, 40)
    return torch.export.export(Losses(cross_entropy), args, dynamic_shapes=(rows, rows))


def test_export():
    program = exported()
    assert sum("mbperf.cross_entropy" in str(node.target) for node in program.graph.nodes) == 2
    args = logits(9, 40).detach(), hard(9, 40)
    test_near(program.module()(*args), Losses(F.cross_entropy)(*args))
    test_near(program.run_decompositions().module()(*args), Losses(F.cross_entropy)(*args))


@needs_compiler
def test_ahead_of_time_compilation(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what an older build compiled
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=f"{tmp_path}/losses.pt2")
    args = logits(9, 40).detach(), hard(9, 40)
    test_near(tuple(torch._inductor.aoti_load_package(package)(*args)), Losses(F.cross_entropy)(*args))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fake_tensors_that_propagate_real_ones(reduction, dtype, weighted):
    x, w = logits(6, 40, dtype=dtype), weights(6, 40, dtype=dtype) if weighted else None
    with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake_x, fake_w = mode.from_tensor(x), None if w is None else mode.from_tensor(w)
        for target in (hard(6, 40), probabilities(6, 40, dtype=dtype)):
            fake_target = mode.from_tensor(target)
            with mode:
                fake = cross_entropy(fake_x, fake_target, fake_w, reduction=reduction)
                (fake_grad,) = torch.autograd.grad(fake.sum(), fake_x)
            loss = cross_entropy(x, target, w, reduction=reduction)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            test_near(fake.real_tensor, loss)
            test_near(fake_grad.real_tensor, grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_meta_and_fake_tensors(shape, reduction):
    def grads(function, x, y):
        loss = function(x, y, reduction=reduction, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss.sum(), x)

    def described(tensors):
        return [(t.shape, t.dtype, t.device, t.stride(), t.requires_grad) for t in tensors]

    x, y = logits(*shape).detach(), hard(*shape)
    meta = x.to("meta").requires_grad_(), y.to("meta")
    assert described(grads(cross_entropy, *meta)) == described(grads(F.cross_entropy, *meta))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x).requires_grad_(), mode.from_tensor(y)
        assert described(grads(cross_entropy, *fake)) == described(grads(F.cross_entropy, *fake))
        lse = cross_entropy(*fake, reduction=reduction, return_lse=True)[1]
    assert described([lse]) == described([cross_entropy(x.requires_grad_(), y, return_lse=True)[1]])


def test_a_trace_by_make_fx_runs_again():
    x, y = logits(6, 40).detach(), hard(6, 40)

    def gradient(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(x, y), x)[0]

    test_near(make_fx(gradient)(x, y)(2 * x, y), gradient(2 * x, y))


def test_a_tensor_whose_minus_sign_is_pending():
    z = torch.complex(logits(6, 40).detach(), logits(6, 40, seed=5).detach())
    x = z.conj().imag
    assert x.is_neg()
    y = hard(6, 40)
    for reduction in REDUCTIONS:
        ours, theirs = (outcome(f, x.detach().requires_grad_(), y, reduction=reduction)
                        for f in (cross_entropy, F.cross_entropy))  # fmt: skip
        assert_same_outcome(ours, theirs)


@needs_compiler
def test_compile_with_inductor_and_extras(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what an older build traced
    torch._dynamo.reset()

    def step(x, y):
        loss, lse = cross_entropy(x * 1, y, z_loss=0.01, out_dtype=torch.float32, return_lse=True)
        return loss + cross_entropy(x * 2, y, inplace=True) + lse.sum()

    x, y = logits(6, 9), hard(6, 9)
    ours, eager = torch.compile(step, fullgraph=True)(x, y), step(x, y)
    test_near(ours, eager)
    test_near(torch.autograd.grad(ours, x), torch.autograd.grad(eager, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast(dtype):
    for target in (hard(6, 40), probabilities(6, 40)):
        for weight in (None, weights(6, 40, dtype=dtype if dtype == torch.float64 else torch.float32)):
            x = logits(6, 40, dtype=dtype)
            # On CUDA torch casts the parts of its cross entropy alone, and no log_softmax that is told its
            # dtype: here that of the logits, so that its log-probabilities have 8 or 11 bits.
            narrow = here() == "cuda" and dtype.itemsize == 2
            with torch.autocast(here(), dtype=torch.bfloat16):
                ours = cross_entropy(x, target, weight)
                theirs = F.cross_entropy(x.float() if narrow else x, target, weight)
                with_lse = cross_entropy(x, target, weight, return_lse=True)[0]
            test_near(ours, theirs)
            test_near(with_lse, theirs)
            test_near(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), atol=1e-6)


def test_inference_mode():
    with torch.inference_mode():
        x, y = logits(6, 40), hard(6, 40)
        test_near(cross_entropy(x, y), F.cross_entropy(x, y))


def test_saved_tensor_hooks_are_honoured():
    x, y = logits(6, 40), hard(6, 40)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, y, reduction="none").sum(), x)
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(x, y, reduction="none").sum()
    test_near(torch.autograd.grad(loss, x)[0], expected)


SETTINGS = {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.1, "out_dtype": None, "z_loss": 0.01}
POINT = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck_of_the_public_operators(reduction):
    for target in (hard(6, 40), probabilities(6, 40)):
        args = (logits(6, 40), target, None, reduction)
        opcheck(OPS.cross_entropy.default, args, {"z_loss": 0.01}, **POINT)
        opcheck(
            OPS.cross_entropy.default, (*args[:2], weights(6, 40, dtype=torch.float32), reduction), **POINT
        )
        opcheck(OPS.cross_entropy_with_lse.default, args, {"label_smoothing": 0.1}, **POINT)
        opcheck(OPS.cross_entropy_with_stats.default, args, {"label_smoothing": 0.1}, **POINT)
        for op in (OPS.cross_entropy, OPS.cross_entropy_with_lse, OPS.cross_entropy_with_stats):
            opcheck(op.default, args, {"softcap": 2.0}, **POINT)
        hidden = args[0].detach().clone()
        opcheck(OPS.cross_entropy_.default, (hidden, *args[1:]), {"label_smoothing": 0.1}, **POINT)


def test_opcheck_sees_every_operator_of_cross_entropy():
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mbperf::cross_entropy")
    }
    source = Path(__file__).read_text()
    assert {
        name for name in names if f"opcheck(OPS.{name.removeprefix('mbperf::')}.default" not in source
    } == set()
    assert len(names) == 14


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5,), (6, 40), (2, 5, 3)], ids=str)
def test_opcheck_of_the_passes(reduction, shape, weighted):
    x, y = logits(*shape).detach(), hard(*shape)
    w = {"weight": weights(*shape, dtype=x.dtype)} if weighted else {}
    settings = tuple({**SETTINGS, "reduction": reduction}.values())
    opcheck(OPS.cross_entropy_forward.default, (x, y, *settings), w, **POINT)
    opcheck(OPS.cross_entropy_forward_softmax.default, (x, y, *settings), w, **POINT)
    for wants_gradient in (False, True)[: 1 + (reduction > 0)]:
        capped = (x, y, *settings, 2.0, wants_gradient)
        opcheck(OPS.cross_entropy_forward_stats.default, (x, y, *settings, 0.0, wants_gradient), w, **POINT)
        opcheck(OPS.cross_entropy_forward_stats.default, capped, w, **POINT)
        opcheck(OPS.cross_entropy_forward_softcap.default, capped, w, **POINT)
    loss, row_max, row_sum = OPS.cross_entropy_forward_softmax(x, y, *settings, **w)
    saved = (torch.ones_like(loss), x, y, row_max, row_sum, reduction, -100, 0.1, 0.01)
    opcheck(OPS.cross_entropy_backward.default, saved, w, **POINT)
    opcheck(OPS.cross_entropy_backward_softcap.default, (*saved, 2.0), w, **POINT)
    if reduction:
        opcheck(OPS.cross_entropy_forward_gradient.default, (x, y, *settings), w, **POINT)
        opcheck(OPS.cross_entropy_forward_gradient_.default, (x.clone(), y, *settings), w, **POINT)
        opcheck(OPS.cross_entropy_scale_gradient_.default, (x.clone(), x.new_tensor(2.0), y, -100), **POINT)
        again = (x.clone(), x.new_tensor(2.0), x, y, reduction, -100, 0.1, 0.01)
        opcheck(OPS.cross_entropy_rescale_gradient_.default, again, w, **POINT)
