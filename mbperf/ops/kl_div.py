"""KL divergence between two tensors of logits: the public function and the shapes of its operators."""

from numbers import Real

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mbperf.extension import _C

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}
_functorch_active = torch._C._are_functorch_transforms_active


def kl_div_from_logits(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL divergence of a student's distribution from a teacher's, from the logits of both: distillation.

    Equivalent to `F.kl_div(F.log_softmax(student / temperature, -1),
    F.log_softmax(teacher / temperature, -1), log_target=True, reduction=reduction)`: the sum over classes of
    p (log p - log q), with p of the teacher and q of the student. Except that

    - both are read once in the forward pass, which also writes the gradient of the student; with "none", and
      for float16, backward reads both again instead. No other tensor of their size is made;
    - "none" is the divergence of each position, summed over the classes;
    - a class whose probability under the teacher is 0 (a logit of -inf) adds nothing, even where the student
      has -inf as well; `F.kl_div` returns NaN. A student that excludes what the teacher allows costs inf;
    - the divergence is accumulated in float32 (float64 for float64) whatever the dtype, and is never below 0;
    - the default is "batchmean", which `F.kl_div` recommends; its own is "mean".

    The gradient is not multiplied by `temperature` squared, as it is not by `F.kl_div`: where a term of hard
    targets stands beside it, do that yourself (Hinton et al., section 2).

    A teacher that requires grad gets its true gradient, by torch's own operators and at their memory: detach
    it, or compute it under `torch.no_grad()`. They also serve double backward, forward mode and functorch
    transforms. Where classes are not adjacent in memory, or no single stride leads from position to position,
    a contiguous copy is made. Logits of two dtypes are converted to the wider one.

    Args:
        student: logits, shape (C), (N, C) or (N, ..., C), classes last; float32, float64, bfloat16 or
            float16.
        teacher: logits, shape and device of `student`; any of these dtypes.
        temperature: divides both logits; a number > 0.
        reduction: "none"; "sum" over positions and classes; "batchmean", that sum divided by N, or by 1 for
            shape (C); or "mean", that sum divided by the number of elements, as `F.kl_div` has it today. For
            the mean over all positions of (N, ..., C) flatten both: `student.flatten(0, -2)`.
        out_dtype: dtype of the result; the dtype of the (wider) logits by default, float32 under autocast.

    Returns:
        A scalar in nats, or with "none" one for each position, of the shape of `student` without its last
        dimension.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is none of these; `temperature` is not a number.
        ValueError: shapes or devices differ, or `reduction` or `temperature` is none of those above.

    Source:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
        >>> kl_div_from_logits(student, teacher)
        tensor(0.6931)
    """
    if has_torch_function_variadic(student, teacher):
        return handle_torch_function(
            kl_div_from_logits, (student, teacher), student, teacher, temperature=temperature,
            reduction=reduction, out_dtype=out_dtype,
        )  # fmt: skip
    _check_types(student, teacher, temperature)
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(
            f"kl_div_from_logits: reduction must be 'none', 'mean', 'sum' or 'batchmean', got {reduction!r}"
        )
    if out_dtype is None and not torch.compiler.is_compiling() and not _functorch_active():
        return _C.kl_div_from_logits(student, teacher, temperature, code)
    return torch.ops.mbperf.kl_div_from_logits(
        student, teacher, temperature=temperature, reduction=code, out_dtype=out_dtype
    )


def _check_types(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"kl_div_from_logits: {name} must be a tensor, got {type(value).__name__}")
    # A tensor would be taken for its value, and its gradient lost.
    if not isinstance(temperature, float | int) and not isinstance(temperature, Real):
        raise TypeError(f"kl_div_from_logits: temperature must be a number, got {type(temperature).__name__}")


def _loss_like(student: Tensor, reduction: int, out_dtype: torch.dtype | None) -> Tensor:
    return student.new_empty(student.shape[:-1] if reduction == 0 else (), dtype=out_dtype or student.dtype)


@torch.library.register_fake("mbperf::kl_div_forward")
def _(student, teacher, temperature, reduction, out_dtype):
    return _loss_like(student, reduction, out_dtype)


@torch.library.register_fake("mbperf::kl_div_forward_gradient")
def _(student, teacher, temperature, reduction, out_dtype):
    return _loss_like(student, reduction, out_dtype), student.new_empty(student.shape)


@torch.library.register_fake("mbperf::kl_div_backward")
def _(grad_loss, student, teacher, temperature, reduction):
    return student.new_empty(student.shape)
