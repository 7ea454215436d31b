"""The comparisons of every check in mbperf: `test_near`, and cross entropy in float64.

`test_near` is the lesson's check, strict where the lesson's was forgiving: same structure, shape and dtype,
tolerances per dtype, errors formed in float64. The reference is elementary operations only, so that it shares
no code with `F.cross_entropy` or with the fused operator.
"""
# ruff: noqa: PT028 -- test_near is a check, not a test, so its parameters may have defaults.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "cross_entropy_float64", "test_near"]

# (rtol, atol), the defaults of torch.testing.assert_close: about 10 ulp at float32, 2 ulp at bfloat16.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.complex128: (1e-7, 1e-7),
    torch.complex64: (1.3e-6, 1e-5),
}


def test_near(
    a: Any,
    b: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    equal_nan: bool = False,
    check_dtype: bool = True,
) -> None:
    """Check that `a` is near the reference `b`: |a - b| <= atol + rtol * |b| everywhere.

    Like `torch.testing.assert_close`, with the lesson's name and errors formed in float64.

    Args:
        a: what was computed: tensor, number or numpy array, any device, or a dict, list or tuple of these.
        b: what it should be; same structure, shapes and dtypes. A number takes the dtype of the tensor
            on the other side.
        rtol: relative tolerance; default by the coarser dtype of the two, see `TOLERANCES`.
        atol: absolute tolerance; likewise. Dtypes not in `TOLERANCES` (integers, bool) must be equal.
        equal_nan: count NaN opposite NaN as near. Without it NaN is never near anything.
            Infinities are near when both are the same infinity, and only then.
        check_dtype: with False, compare across dtypes, for instance bfloat16 with a float64 reference.

    Raises:
        AssertionError: not near; says how many values differ, the largest absolute and relative error, where.

    Source: fast.ai part 2 (2019), lesson 8, `test_near`.

    >>> test_near(torch.tensor(1.0), torch.tensor(1.0 + 1e-6))
    >>> test_near(torch.tensor([1, 2]), [1, 2])
    """
    _compare(a, b, "", _Rule(rtol, atol, equal_nan, check_dtype))


# Keeps pytest from collecting it wherever it is imported.
test_near.__test__ = False  # type: ignore[attr-defined]


class _Rule:
    """The differences that the caller of `test_near` allows."""

    def __init__(self, rtol: float | None, atol: float | None, equal_nan: bool, check_dtype: bool) -> None:
        self.rtol, self.atol, self.equal_nan, self.check_dtype = rtol, atol, equal_nan, check_dtype

    def tolerances(self, first: torch.dtype, second: torch.dtype) -> tuple[float, float]:
        rtol, atol = max(TOLERANCES.get(dtype, (0.0, 0.0)) for dtype in (first, second))
        return rtol if self.rtol is None else self.rtol, atol if self.atol is None else self.atol


def _compare(a: Any, b: Any, path: str, rule: _Rule) -> None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        _require(a.keys() == b.keys(), path, f"keys are {list(a)}, expected {list(b)}")
        for key in b:
            _compare(a[key], b[key], f"{path}[{key!r}]", rule)
    elif isinstance(a, str | bytes | None) or isinstance(b, str | bytes | None):
        _require(type(a) is type(b) and a == b, path, f"is {a!r}, expected {b!r}")
    elif _is_nested(a) and _is_nested(b):
        _require(len(a) == len(b), path, f"has {len(a)} entries, expected {len(b)}")
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            _compare(one, other, f"{path}[{i}]", rule)
    else:
        _compare_tensors(*_as_tensors(a, b, path), path, rule)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_tensors(a: Any, b: Any, path: str) -> tuple[Tensor, Tensor]:
    """Both sides as plain tensors on the CPU."""
    for value in (a, b):
        _require(not isinstance(value, Mapping), path, f"is {type(a).__name__}, expected {type(b).__name__}")
    try:
        return _as_tensor(a, b), _as_tensor(b, a)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = f"{type(a).__name__} with {type(b).__name__}"
        raise AssertionError(f"test_near: {_name(path)} cannot be compared, {kinds}: {error}") from error


def _as_tensor(value: Any, opposite: Any) -> Tensor:
    """`value` as a tensor; Python numbers take the opposite tensor's dtype where that loses no kind."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, bool | int | float | complex | list | tuple):
        return torch.as_tensor(value)
    # Python numbers alone are doubles; torch's default dtype would round them to float32.
    own = torch.as_tensor(value)
    dtype = torch.promote_types(own.dtype, torch.float64)
    if isinstance(opposite, Tensor):
        fits = torch.can_cast(own.dtype, opposite.dtype)
        dtype = opposite.dtype if fits else own.dtype
    return torch.as_tensor(value, dtype=dtype)


def _compare_tensors(a: Tensor, b: Tensor, path: str, rule: _Rule) -> None:
    _require(a.shape == b.shape, path, f"has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    if rule.check_dtype:
        _require(a.dtype == b.dtype, path, f"has dtype {a.dtype}, expected {b.dtype}")
    rtol, atol = rule.tolerances(a.dtype, b.dtype)
    near = _near(a, b, rtol, atol, rule.equal_nan)
    if not near.all():
        raise AssertionError(_describe(a, b, path, rtol, atol, ~near))


def _near(a: Tensor, b: Tensor, rtol: float, atol: float, equal_nan: bool) -> Tensor:
    """Mask of the values that are near."""
    near = a == b
    if rtol or atol:
        wide_a, wide_b = _widen(a), _widen(b)
        error = (wide_a - wide_b).abs()
        near |= error.isfinite() & (error <= atol + rtol * wide_b.abs())
    if equal_nan:
        near |= a.isnan() & b.isnan()
    return near


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _describe(a: Tensor, b: Tensor, path: str, rtol: float, atol: float, far: Tensor) -> str:
    """The message of a failure: how many, how far, and where the worst ones are."""
    error = (_widen(a) - _widen(b)).abs()
    # A NaN or infinite error is worse than any finite one; near values are out of the running.
    error = error.nan_to_num(nan=float("inf")).where(far, torch.tensor(-1.0, dtype=torch.float64))
    relative = error / _widen(b).abs()
    # 0/0 does not occur (far values have error > 0); a NaN or infinite reference has no relative error.
    relative = relative.nan_to_num(nan=float("inf")).where(far, torch.tensor(-1.0, dtype=torch.float64))
    dtypes = str(a.dtype) if a.dtype == b.dtype else f"{a.dtype} with {b.dtype}"
    return (
        f"test_near: {_name(path)} differs in {int(far.sum())} of {a.numel()} values "
        f"({dtypes}, rtol={rtol:g}, atol={atol:g}); "
        f"max abs error {_worst(error, a, b)}; max rel error {_worst(relative, a, b)}"
    )


def _worst(error: Tensor, a: Tensor, b: Tensor) -> str:
    flat = int(error.flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)] if error.dim() else []
    got, expected = a.flatten()[flat].item(), b.flatten()[flat].item()
    return f"{error.flatten()[flat].item():.3g} at {where} (got {got!r}, expected {expected!r})"


def _name(path: str) -> str:
    return f"a{path}"


def _require(holds: bool, path: str, message: str) -> None:
    if not holds:
        raise AssertionError(f"test_near: {_name(path)} {message}")


def cross_entropy_float64(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy in float64 on the CPU, from elementary operations: the reference of every other one.

    The torch equivalent is `F.cross_entropy(input.double(), ...)`, but for one thing: an ignored row is never
    read, so NaN in it reaches neither the loss nor the gradient. Gradients flow to `input`, to `weight`
    and to a soft `target`; pass float64 leaves to have them in float64.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), any floating dtype, any device.
        target: class indices () or (1,), (N,) or (N, d1, ...), int64 or uint8; or class probabilities of
            the shape of `input`, floating.
        weight: one factor per class (C,), or None.
        ignore_index: class index whose positions count for nothing; hard targets only.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target spread evenly over the classes, 0 to 1.

    Returns:
        0-D float64 tensor in nats; with "none" the shape of a hard target, 0-D for 1-D `input`.

    Raises:
        ValueError: unknown reduction.
        IndexError: a target that is neither a class nor `ignore_index`.

    Source: the formulas of torch.nn.CrossEntropyLoss's documentation.

    >>> round(cross_entropy_float64(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 6)
    1.386294
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy_float64: reduction must be mean, sum or none, got {reduction!r}")
    logits = input.to("cpu", torch.float64)
    divisor: Tensor | int
    goal = target.to("cpu", torch.float64 if target.is_floating_point() else torch.int64)
    rescale = None if weight is None else weight.to("cpu", torch.float64)
    one_row = logits.dim() == 1
    if one_row:
        logits = logits.unsqueeze(0)
        goal = goal.unsqueeze(0) if goal.is_floating_point() else goal.reshape(1)
    if goal.is_floating_point():
        loss, divisor = _soft_losses(logits, goal, rescale, label_smoothing)
    else:
        loss, divisor = _hard_losses(logits, goal, rescale, ignore_index, label_smoothing)
    if reduction == "none":
        return loss.squeeze(0) if one_row else loss
    return loss.sum() / divisor if reduction == "mean" else loss.sum()


def _hard_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss per position and the divisor of the mean: the weights of the targets that count."""
    n_classes = logits.shape[1]
    ignored = target == ignore_index
    wrong = target[~ignored & ((target < 0) | (target >= n_classes))]
    if wrong.numel():
        raise IndexError(f"cross_entropy_float64: Target {wrong[0].item()} is out of bounds.")
    index = target.masked_fill(ignored, 0)
    # Constants in place of ignored rows: what stood there is not read, and its gradient is exactly 0.
    lp = _log_softmax(logits.masked_fill(ignored.unsqueeze(1), 0.0))
    by_class = torch.ones(n_classes, dtype=torch.float64) if weight is None else weight
    target_weight = by_class[index].masked_fill(ignored, 0.0)
    loss = -by_class[index] * lp.gather(1, index.unsqueeze(1)).squeeze(1)
    if label_smoothing > 0:
        spread = -(lp * _along_classes(by_class, lp)).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing / n_classes * spread
    return loss.masked_fill(ignored, 0.0), target_weight.sum()


def _soft_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor, int]:
    """Loss per position and the divisor of the mean: the number of positions."""
    n_classes = logits.shape[1]
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / n_classes
    terms = _log_softmax(logits) * target
    if weight is not None:
        terms = terms * _along_classes(weight, terms)
    loss = -terms.sum(1)
    return loss, loss.numel()


def _log_softmax(logits: Tensor) -> Tensor:
    """log softmax over dimension 1, as (x - max) - log(sum): exact also where max + log(sum) would round."""
    shifted = logits - logits.detach().amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def _along_classes(weight: Tensor, like: Tensor) -> Tensor:
    return weight.view(1, -1, *[1] * (like.dim() - 2))
