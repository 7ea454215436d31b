"""Correctness before speed, on the very buffers that will be timed.

Contenders run before the reference exists, so that no freed copy of the right answer lies in memory for them.
What they returned is then overwritten with NaN, and the inputs are changed behind autograd's version counter:
who hands out an old buffer in the next call, or skips work for inputs already seen, disagrees.
"""

import math
import numbers
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbperf.testing import test_near

# Share of the reference's largest value, and relative to each value: an absolute bound would let zeros pass
# for the gradient of a mean over many rows. Half precision is torch's own log_softmax rounded per element.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 3e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}

# Elements compared at a time: in float32 their copies stay in cache and below the size (128 KiB) from which
# malloc maps pages for each. Of 1 << 18 elements a comparison with float64 took four times as long.
CHUNK = 1 << 14


@dataclass
class Judge:
    """Holds the inputs of a group's contenders and says who disagrees with the reference.

    Args:
        inputs: per contender, its input sets. Contenders may share them; their values are equal.
        expected: the reference's outputs for an input set; compared across dtypes.
        chunk: elements compared at a time.

    >>> x = torch.ones(3)
    >>> Judge({"a": [(x,)]}, lambda x: x.double() * 2).disagreements({"a": [lambda: x * 2]})
    {}
    """

    inputs: Mapping[str, Sequence[tuple[Any, ...]]]
    expected: Callable[..., Sequence[Any]]
    chunk: int = CHUNK
    _references: dict[tuple[int, bool], Any] = field(default_factory=dict)

    def disagreements(
        self, calls: Mapping[str, Sequence[Callable[[], Any]]], changes: Sequence[bool] = (False, True)
    ) -> dict[str, str]:
        """Return what is wrong with each contender that is wrong.

        Args:
            calls: per contender, one call for each of its input sets.
            changes: whether to compare on the inputs as they are (False), changed in place (True), or both.

        Returns:
            Contender -> message; empty when all agree.
        """
        wrong: dict[str, str] = {}
        with _one_thread() as many:
            for index in range(len(next(iter(calls.values()), ()))):
                for changed in changes:
                    self._check(index, changed, calls, wrong, many)
        return wrong

    def held_bytes(self) -> int:
        """Return the memory of the reference's outputs so far."""
        return sum(tensor.nbytes for tensor in tensors(list(self._references.values())))

    def _check(
        self,
        index: int,
        changed: bool,
        calls: Mapping[str, Sequence[Callable[[], Any]]],
        wrong: dict[str, str],
        many: Callable[[Callable[[], Any]], Any],
    ) -> None:
        sets = {name: self.inputs[name][index] for name in calls}
        if changed:
            _turn(sets.values())
        distinct = {id(one): one for one in sets.values()}
        before = {key: _copies(one) for key, one in distinct.items()}
        results = {}
        for name, one in sets.items():
            with _failures_of(name, wrong):
                results[name] = _run(many, calls[name][index], one)
        changed_by_calls = {
            key
            for key, one in distinct.items()
            if not all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(before[key]), strict=True))
        }
        for name, one in sets.items():
            if name not in results:
                continue
            reference = self._reference(index, changed, before[id(one)])
            if message := _difference(results[name], reference, self.chunk):
                wrong.setdefault(name, message + (", after its inputs were changed in place" * changed))
            if id(one) in changed_by_calls:
                wrong.setdefault(name, "the inputs were changed by this call or by one that shares them")
        if changed:
            _turn(sets.values())

    def _reference(self, index: int, changed: bool, inputs: Any) -> Any:
        if (index, changed) not in self._references:
            self._references[index, changed] = _in_torch(self.expected(*_copies(inputs)))
        return self._references[index, changed]


@dataclass
class Agreement:
    """Says who disagrees with the first contender: what is left to ask where a `Judge` has judged the group.

    One comparison for each contender, no copies but of the first one's result, no changed inputs: every
    process that is timed asks this of its own buffers.

    Args:
        inputs: per contender, its input set; their values are equal.
        chunk: elements compared at a time.

    >>> Agreement({"a": (1,), "b": (1,)}).disagreements({"a": lambda: "x", "b": lambda: "y"})
    {'b': "returned 'y', expected 'x'"}
    """

    inputs: Mapping[str, tuple[Any, ...]]
    chunk: int = CHUNK

    def disagreements(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
        """Return what is wrong with each contender that is wrong.

        Args:
            calls: per contender, its call.

        Returns:
            Contender -> message; empty when all agree.
        """
        wrong: dict[str, str] = {}
        with _one_thread() as many:
            reference = None
            for name, call in calls.items():
                with _failures_of(name, wrong):
                    if reference is None:
                        reference = _run(many, call, self.inputs[name])
                        continue
                    result = _in_torch(many(call))
                    # Two of the same dtype are each off by as much as one from the truth.
                    if message := _difference(result, reference, self.chunk, slack=2):
                        wrong[name] = message
                    poison(result, self.inputs[name])
            poison(reference, ())
            return self._changed_inputs(calls) | wrong

    def _changed_inputs(self, names: Collection[str]) -> dict[str, str]:
        """Inputs that are no longer equal; if the first contender changed its own, all differ."""
        first, *others = names or [""]
        return {
            name: f"its inputs and those of {first} are no longer equal after the calls"
            for name in others
            if not all(
                torch.equal(a, b)
                for a, b in zip(tensors(self.inputs[name]), tensors(self.inputs[first]), strict=True)
            )
        }


@contextmanager
def _failures_of(name: str, wrong: dict[str, str]) -> Iterator[None]:
    """Note what a contender raises: that is its failure, not the group's."""
    try:
        yield
    except Exception as error:
        wrong.setdefault(name, f"raised {traceback.format_exception_only(error)[-1].strip()}")


@contextmanager
def _one_thread() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Judge on one thread; yield what makes a contender's call on all that it will be timed with.

    The judge's many small steps would wait for the slowest thread each: beside other work on the cores it
    took 69 s to judge 39 MB on two threads, and 3 s on one.
    """
    threads = torch.get_num_threads()

    def many(call: Callable[[], Any]) -> Any:
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(1)

    torch.set_num_threads(1)
    try:
        yield many
    finally:
        torch.set_num_threads(threads)


def _run(many: Callable[[Callable[[], Any]], Any], call: Callable[[], Any], inputs: tuple[Any, ...]) -> Any:
    """Run, keep a copy of the result, and leave NaN where the result was."""
    result = _in_torch(many(call))
    kept = _copies(result)
    poison(result, inputs)
    return kept


def _difference(result: Any, reference: Any, chunk: int, slack: float = 1.0) -> str:
    """What is wrong with a result, or an empty string."""
    got, right = list(_leaves(result)), list(_leaves(reference))
    if len(got) != len(right):
        return f"returned {len(got)} values, expected {len(right)}"
    for one, other in zip(got, right, strict=True):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            if type(one) is not type(other) or one != other:
                return f"returned {one!r:.60}, expected {other!r:.60}"
            continue
        rtol = slack * TOLERANCE.get(one.dtype, 0.0)
        largest = _largest_magnitude(other)
        atol = rtol * largest if math.isfinite(largest) else 0.0
        if not _near(one, other, rtol, atol, chunk):
            try:
                test_near(one, other, rtol=rtol, atol=atol, check_dtype=False)
            except AssertionError as error:
                return str(error)
    return ""


def _near(got: Tensor, right: Tensor, rtol: float, atol: float, chunk: int) -> bool:
    """Quick form of `test_near`; what it doubts, `test_near` decides and words."""
    if got.shape != right.shape:
        return False
    narrow = all(t.dtype.is_floating_point and t.dtype != torch.float64 for t in (got, right))
    wide = torch.float32 if narrow else torch.float64
    chunks = zip(got.flatten().split(chunk), right.flatten().split(chunk), strict=True)
    return all(_all_close(a.to(wide), b.to(wide), rtol, atol) for a, b in chunks)


def _largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one, 0 of nothing."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))


def _all_close(got: Tensor, right: Tensor, rtol: float, atol: float) -> bool:
    """False in doubt: of infinities and NaN the difference is NaN, which no bound admits."""
    excess = (got - right).abs_().sub_(right.abs(), alpha=rtol)
    return excess.numel() == 0 or excess.max().item() <= atol


def poison(result: Any, inputs: tuple[Any, ...]) -> None:
    """Fill what a call returned with NaN (integers: the largest value), unless it is a view of an input."""
    kept = {t.untyped_storage().data_ptr() for t in tensors(inputs)}
    for tensor in tensors(result):
        if tensor.untyped_storage().data_ptr() not in kept:
            bad = float("nan") if tensor.dtype.is_floating_point else _largest(tensor.dtype)
            tensor.detach().fill_(bad)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _turn(sets: Iterable[tuple[Any, ...]]) -> None:
    """Change each tensor of the inputs in place, unseen by version counters; twice is the identity."""
    distinct = {id(tensor): tensor for one in sets for tensor in tensors(one)}
    for tensor in distinct.values():
        data = tensor.data  # has a version counter of its own
        if data.dtype.is_floating_point:
            data.neg_()
        elif data.dim() > 0:
            data.copy_(data.flip(0))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in order.

    >>> len(list(tensors({"a": [torch.ones(1), 2], "b": (torch.ones(2),)})))
    2
    """
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is neither a dict nor a list nor a tuple, in order."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield value


def _in_torch(result: Any) -> Any:
    """Results of other libraries as tensors in the same memory, through DLPack; numbers as tensors."""
    if isinstance(result, numbers.Real):
        return torch.tensor(result)
    if isinstance(result, Tensor) or not hasattr(result, "__dlpack__"):
        return type(result)(map(_in_torch, result)) if type(result) in (tuple, list) else result
    return torch.from_dlpack(result)


def _copies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copies(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copies(item) for item in value]
    return value
