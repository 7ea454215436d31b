"""Random nested samples for the tests of collate, and what it means that two batches are the same."""

import collections
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from devices import here
from hypothesis import strategies as st

TENSOR_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
TENSOR_DTYPES += [torch.uint8, torch.int8, torch.bool, torch.complex64, torch.uint16]
ARRAY_DTYPES = ["f4", "f8", "f2", "i8", "i4", "u1", "?", "c8", "u2", "u8"]

Make = Callable[[np.random.Generator, int], Any]  # of sample k


class Point(NamedTuple):
    x: Any
    y: Any


class Tagged(list):
    """A list that carries an attribute, which copy.copy keeps."""

    tag = "as made"


class Colour(torch.Tensor):
    pass


class Pairs(collections.abc.Mapping):
    """An immutable mapping that can be made from a dict."""

    def __init__(self, items):
        self.items_ = dict(items)

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    lowest = 0 if dtype in (torch.uint8, torch.uint16) else -50
    return torch.from_numpy(np.asarray(rng.integers(lowest, 100, shape))).to(dtype).to(here())


def there(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie on the device of the test at hand."""
    if isinstance(value, torch.Tensor):
        return value.to(here())
    if isinstance(value, dict):
        return {key: there(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(there, value))
    return type(value)(map(there, value)) if type(value) in (list, tuple) else value


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "offset":
        return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[-tensor.numel() or 1 :].view(
            tensor.shape
        )
    return tensor


SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
LAYOUTS = st.sampled_from(["plain", "plain", "channels_last", "transposed", "strided", "offset"])


@st.composite
def tensors(draw: Any) -> Make:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(TENSOR_DTYPES))
    layouts = draw(st.lists(LAYOUTS, min_size=1, max_size=2))
    return lambda rng, k: laid_out(values(rng, shape, dtype), layouts[k % len(layouts)])


@st.composite
def mixed_tensors(draw: Any) -> Make:
    shape = draw(SHAPES)
    dtypes = draw(st.lists(st.sampled_from(TENSOR_DTYPES), min_size=2, max_size=3))
    return lambda rng, k: values(rng, shape, dtypes[k % len(dtypes)])


@st.composite
def special_tensors(draw: Any) -> Make:
    shape = draw(SHAPES)
    make = draw(
        st.sampled_from(
            [
                lambda t: t.float().requires_grad_(),
                lambda t: torch.nn.Parameter(t.double()),
                lambda t: t.float().as_subclass(Colour),
                lambda t: torch.complex(t.float(), t.float()).conj(),
            ]
        )
    )
    return lambda rng, k: make(values(rng, shape, torch.int64))


@st.composite
def arrays(draw: Any) -> Make:
    shape, dtype, step = draw(SHAPES), draw(st.sampled_from(ARRAY_DTYPES)), draw(st.sampled_from([1, 1, 2]))

    def make(rng, k):
        array = rng.integers(0, 100, (*shape, step)).astype(dtype)[..., 0]
        array = np.asarray(array)
        return np.asfortranarray(array) if step == 1 and k % 2 else array

    return make


@st.composite
def mixed_arrays(draw: Any) -> Make:
    shape, dtypes = draw(SHAPES), draw(st.lists(st.sampled_from(ARRAY_DTYPES), min_size=2, max_size=3))
    return lambda rng, k: np.asarray(rng.integers(0, 100, shape)).astype(dtypes[k % len(dtypes)])


@st.composite
def array_scalars(draw: Any) -> Make:
    dtypes = draw(st.lists(st.sampled_from(ARRAY_DTYPES), min_size=1, max_size=2))
    return lambda rng, k: np.dtype(dtypes[k % len(dtypes)]).type(rng.integers(0, 100))


@st.composite
def numbers(draw: Any) -> Make:
    kinds = st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(width=64), st.integers(-5, 5), st.just(0.1)
    )
    given = draw(st.lists(kinds, min_size=1, max_size=3))
    return lambda rng, k: given[k % len(given)]


TEXTS = st.sampled_from(["", "abc", b"", b"xy"]).map(lambda text: lambda rng, k: text)
LEAVES = st.one_of(
    tensors(),
    tensors(),
    mixed_tensors(),
    special_tensors(),
    arrays(),
    mixed_arrays(),
    array_scalars(),
    numbers(),
    numbers(),
    TEXTS,
)

# How a container is made from a list of values.
SEQUENCES: list[Callable[[list], Any]] = [
    tuple,
    list,
    collections.UserList,
    collections.deque,
    Tagged,
]
MAPPINGS: list[Callable[[dict], Any]] = [
    dict,
    collections.OrderedDict,
    collections.UserDict,
    types.MappingProxyType,
    Pairs,
    lambda items: collections.defaultdict(list, items),
]
KEYS = st.lists(st.sampled_from(["a", "b", "image", 0, 1, (2, 3), None, 1.5]), unique=True, max_size=4)


def sequences(children: st.SearchStrategy[Make]) -> st.SearchStrategy[Make]:
    def make(container, makers):
        return lambda rng, k: container([maker(rng, k) for maker in makers])

    return st.builds(make, st.sampled_from(SEQUENCES), st.lists(children, max_size=4))


def mappings(children: st.SearchStrategy[Make]) -> st.SearchStrategy[Make]:
    def make(container, keys, makers):
        pairs = list(zip(keys, makers, strict=False))
        return lambda rng, k: container({key: maker(rng, k) for key, maker in pairs})

    return st.builds(make, st.sampled_from(MAPPINGS), KEYS, st.lists(children, max_size=4))


def named_tuples(children: st.SearchStrategy[Make]) -> st.SearchStrategy[Make]:
    return st.builds(lambda x, y: lambda rng, k: Point(x(rng, k), y(rng, k)), children, children)


SAMPLES = st.recursive(
    LEAVES,
    lambda children: st.one_of(sequences(children), mappings(children), named_tuples(children)),
    max_leaves=8,
)


@st.composite
def batches(draw: Any, samples: st.SearchStrategy[Make] = SAMPLES) -> list[Any]:
    """A list of 1 to 5 samples of one structure."""
    make, n, seed = draw(samples), draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    return [make(rng, k) for k in range(n)]


def assert_same(ours: Any, theirs: Any, where: str = "batch", device: str = "") -> None:
    """Same classes, keys, dtypes, shapes, strides, gradients and values, all the way down.

    And on the same devices; or, given one, all of ours there.
    """
    assert type(ours) is type(theirs), f"{where}: {type(ours)} is not {type(theirs)}"
    if isinstance(ours, torch.Tensor):
        assert ours.device.type == (device or theirs.device.type), f"{where} lies on {ours.device}"
        assert_same_tensor(ours, theirs.to(ours.device), where)
    elif isinstance(ours, collections.abc.Mapping):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]", device)
        assert getattr(ours, "default_factory", None) == getattr(theirs, "default_factory", None), where
    elif isinstance(ours, collections.abc.Sequence) and not isinstance(ours, (str, bytes)):
        assert len(ours) == len(theirs), where
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{where}[{i}]", device)
    else:
        assert ours == theirs, where


def assert_same_tensor(ours: torch.Tensor, theirs: torch.Tensor, where: str) -> None:
    assert ours.dtype == theirs.dtype, f"{where}: {ours.dtype} is not {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{where}: {ours.shape} is not {theirs.shape}"
    assert ours.stride() == theirs.stride(), f"{where}: {ours.stride()} is not {theirs.stride()}"
    assert ours.requires_grad == theirs.requires_grad, where
    equal = torch.equal(torch.nan_to_num(ours.detach()), torch.nan_to_num(theirs.detach()))
    nans = torch.equal(ours.detach().isnan(), theirs.detach().isnan())
    assert equal, f"{where}: {ours} is not {theirs}"
    assert nans, f"{where}: {ours} is not {theirs}"
