"""torch's own samples and errors of cross entropy, each given to ours and to torch's."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import DTYPES, assert_same_outcome, outcome
from devices import here
from torch import nn
from torchs_samples import common_modules, invocations

from mbperf import CrossEntropyLoss, cross_entropy

pytestmark = pytest.mark.usefixtures("device")


def samples_of(sample_inputs, dtype):
    torch.manual_seed(0)
    op = next(op for op in invocations.op_db if op.name == "nn.functional.cross_entropy")
    return list(sample_inputs(op, here(), dtype, requires_grad=True))


def assert_same_on(samples, dtype):
    for s in samples:
        ours = outcome(cross_entropy, s.input, *s.args, **s.kwargs)
        theirs = outcome(F.cross_entropy, s.input, *s.args, **s.kwargs)
        if dtype in (torch.bfloat16, torch.float16) and not isinstance(theirs[0], type):
            # torch rounds every step in half precision; its dtypes count, its values in float32.
            wide = outcome(
                F.cross_entropy,
                *widened([s.input, *s.args]),
                **dict(zip(s.kwargs, widened(s.kwargs.values()), strict=True)),
            )
            theirs = (
                wide[0].to(theirs[0].dtype),
                [w.to(t.dtype) for w, t in zip(wide[1], theirs[1], strict=True)],
            )
            assert_same_outcome(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        else:
            assert_same_outcome(ours, theirs)


def widened(values):
    return [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sample_inputs_cross_entropy", "sample_inputs_nll_loss"])
def test_torchs_samples(name, dtype, say):
    samples = samples_of(getattr(invocations, name), dtype)
    assert_same_on(samples, dtype)
    say(f"{name}, {dtype}: {len(samples)} samples agree")
    assert len(samples) >= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_samples_of_the_module(dtype, say):
    torch.manual_seed(0)
    info = next(m for m in common_modules.module_db if m.module_cls is nn.CrossEntropyLoss)
    inputs = common_modules.module_inputs_torch_nn_CrossEntropyLoss(
        info, device=here(), dtype=dtype, requires_grad=True, training=True
    )
    for i in inputs:
        make, call = i.constructor_input, i.forward_input
        ours = outcome(CrossEntropyLoss(*make.args, **make.kwargs), *call.args, **call.kwargs)
        theirs = outcome(nn.CrossEntropyLoss(*make.args, **make.kwargs), *call.args, **call.kwargs)
        # Sums of terms of both signs (the generator's weights are negative too) cancel in float32.
        assert_same_outcome(ours, theirs, **({"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}))
    say(f"module_inputs_torch_nn_CrossEntropyLoss, {dtype}: {len(inputs)} samples agree")
    assert len(inputs) >= 100


def test_torchs_error_samples_of_the_module(say):
    error_inputs = getattr(common_modules, "module_error_inputs_torch_nn_CrossEntropyLoss", None)
    if error_inputs is None:
        pytest.skip(f"torch {torch.__version__} has no error samples of the module")
    info = next(m for m in common_modules.module_db if m.module_cls is nn.CrossEntropyLoss)
    inputs = error_inputs(info, device=here(), dtype=torch.float32, requires_grad=False, training=False)
    for i in inputs:
        make, call = i.module_error_input.constructor_input, i.module_error_input.forward_input
        with pytest.raises(i.error_type, match=i.error_regex):
            CrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)
    say(f"module_error_inputs_torch_nn_CrossEntropyLoss: {len(inputs)} samples agree")
    assert inputs
