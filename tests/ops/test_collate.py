"""Collate in the main process: promises, deliberate differences from default_collate, errors."""

import collections
import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from batches import Colour, Point, assert_same, there
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate_str_fn, default_collate_fn_map

from mbperf import Collate, collate


@dataclasses.dataclass(frozen=True)
class Box:
    corner: torch.Tensor
    label: int
    name: str = "box"


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x",)
    x: float


class Money:
    def __init__(self, cents):
        self.cents = cents


def test_a_dataclass_is_rebuilt_field_by_field(device):
    batch = [Box(torch.zeros(2, device=device), 1), Box(torch.ones(2, device=device), 2, "b")]
    result = collate(batch)
    assert type(result) is Box
    assert_same(result.corner, torch.tensor([[0.0, 0], [1, 1]], device=device))
    assert_same(result.label, torch.tensor([1, 2]))
    assert result.name == ["box", "b"]
    assert batch[0].label == 1
    assert_same(collate([Slotted(1.0), Slotted(2.0)]).x, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_counter_keeps_its_class_and_its_values_are_tensors():
    result = collate([collections.Counter(a=1, b=2), collections.Counter(a=3)])
    assert type(result) is collections.Counter
    assert_same(dict(result), {"a": torch.tensor([1, 3]), "b": torch.tensor([2, 0])})


def test_a_defaultdict_gives_its_default_and_stays_as_it_was():
    batch = [collections.defaultdict(int, a=1, b=2), collections.defaultdict(int, a=3)]
    result = collate(batch)
    assert_same(result["b"], torch.tensor([2, 0]))
    assert type(result) is collections.defaultdict
    assert dict(batch[1]) == {"a": 3}
    default_collate(batch)
    assert dict(batch[1]) == {"a": 3, "b": 0}, "torch does not mutate any more: drop this difference"


def test_nested_unsupported_types_are_looked_at_once():
    looked = []

    class Watched(collections.abc.Mapping):
        def __init__(self, value):
            self.value = value

        def __getitem__(self, key):
            looked.append(key)
            return self.value

        def __iter__(self):
            return iter(["k"])

        def __len__(self):
            return 1

    sample = None
    for _ in range(10):
        sample = Watched(sample)
    with pytest.raises(TypeError, match="NoneType"):
        collate([sample])
    assert len(looked) == 10
    looked.clear()
    with pytest.raises(TypeError):
        default_collate([sample])
    assert len(looked) > 1_000, "torch looks once too: drop this difference"


def test_every_sample_is_checked_not_only_the_first():
    with pytest.raises(RuntimeError, match=r"batch\[1\] has length 3, batch\[0\] has length 2"):
        collate([Point(1, 2), (1, 2, 3)])
    assert_same(default_collate([Point(1, 2), (1, 2, 3)]), Point(*default_collate([(1, 2), (1, 2)])))


@pytest.mark.usefixtures("device")
def test_samples_are_left_as_they_were():
    batch = [{"a": [1, there(torch.zeros(2))], "b": np.ones(3), "c": Point(1.0, "x")} for _ in range(3)]
    before = copy.deepcopy(batch)
    result = collate(batch)
    result["a"][1].add_(1)
    result["b"].add_(1)
    for sample, kept in zip(batch, before, strict=True):
        assert_same(sample["a"][1], kept["a"][1])
        assert (sample["b"] == kept["b"]).all()
        assert sample["c"] == kept["c"]


def test_a_users_entry_of_the_map_is_honoured_while_it_is_there():
    batch = [(Money(100), 1), (Money(250), 2)]
    with pytest.raises(TypeError, match=r"batch\[0\]\[0\] is of type .*Money"):
        collate(batch)
    seen = []

    def collate_money(samples, *, collate_fn_map=None):
        seen.append((type(samples), collate_fn_map is default_collate_fn_map))
        return torch.tensor([money.cents for money in samples])

    default_collate_fn_map[Money] = collate_money
    try:
        assert_same(collate(batch), [torch.tensor([100, 250]), torch.tensor([1, 2])])
        collate([{"m": Money(1)}])
        assert seen == [(tuple, True), (list, True)]
    finally:
        del default_collate_fn_map[Money]
    with pytest.raises(TypeError):
        collate(batch)


@pytest.mark.parametrize("key", [int, torch.Tensor, str, np.ndarray, dict])
def test_a_replaced_entry_of_the_map_is_honoured(key):
    samples = {int: 3, torch.Tensor: torch.zeros(2), str: "a", np.ndarray: np.zeros(2), dict: {"a": 1}}
    batch = [(samples[key],)] * 2
    was = default_collate_fn_map.get(key)
    default_collate_fn_map[key] = lambda batch, *, collate_fn_map=None: ("mine", len(batch))
    try:
        assert collate(batch) == [("mine", 2)]
        assert collate([samples[key]] * 3) == ("mine", 3)
    finally:
        if was is None:
            del default_collate_fn_map[key]
        else:
            default_collate_fn_map[key] = was
    assert_same(collate(batch), default_collate(batch))


def test_arrays_become_tensors_before_the_map_is_asked():
    was = default_collate_fn_map[torch.Tensor]
    default_collate_fn_map[torch.Tensor] = lambda batch, *, collate_fn_map=None: [type(t) for t in batch]
    try:
        assert collate([np.zeros(2)] * 2) == [torch.Tensor, torch.Tensor]
    finally:
        default_collate_fn_map[torch.Tensor] = was


def test_torchs_own_function_may_serve_another_class():
    default_collate_fn_map[Money] = collate_str_fn
    try:
        batch = [Money(1), Money(2)]
        assert collate(batch) is batch
    finally:
        del default_collate_fn_map[Money]


def test_an_abstract_class_in_the_map_is_asked_every_time():
    class Cheap(type):
        def __instancecheck__(cls, instance):
            return isinstance(instance, int) and instance < 10

    key = Cheap("Small", (), {})
    entries = dict(default_collate_fn_map)
    default_collate_fn_map.clear()
    default_collate_fn_map.update({key: lambda batch, *, collate_fn_map=None: "small", **entries})
    # An exact class wins over isinstance, so int itself has to go.
    del default_collate_fn_map[int]
    try:
        assert collate([5, 500]) == "small"
        with pytest.raises(TypeError):
            collate([500, 5])
    finally:
        default_collate_fn_map.clear()
        default_collate_fn_map.update(entries)


ERRORS = [
    ([], IndexError, "the batch is empty"),
    ([None], TypeError, r"batch\[0\] is of type NoneType"),
    ([{"a": object()}], TypeError, r'batch\[0\]\["a"\] is of type object'),
    (
        [{"image": torch.zeros(3, 224)}] * 17 + [{"image": torch.zeros(3, 220)}],
        RuntimeError,
        r'collate: batch\[17\]\["image"\] has shape \(3, 220\), batch\[0\]\["image"\] has shape \(3, 224\)',
    ),
    ([np.zeros(2), np.zeros(3)], RuntimeError, r"batch\[1\] has shape \(3,\)"),
    ([{"a": 1}, {"b": 1}], KeyError, r"batch\[1\] has no key 'a'"),
    ([{"a": {0: 1}}, {"a": {1: 1}}], KeyError, r'batch\[1\]\["a"\] has no key 0'),
    ([[1, 2], [1]], RuntimeError, r"batch\[1\] has length 1, batch\[0\] has length 2"),
    (
        [(1, 2), (1, None)],
        RuntimeError,
        r"batch\[1\]\[1\] is of type NoneType, batch\[0\]\[1\] is of type int",
    ),
    ([1.0, "a"], TypeError, r"batch\[1\] is of type str, batch\[0\] is of type float"),
    ([Point(1, torch.zeros(1)), Point(1, 2.0)], TypeError, r"batch\[1\]\.y is of type float"),
    ([{"a": 1}, [1]], TypeError, r"batch\[1\] is of type list, batch\[0\] is of type dict"),
    ([[1], 2], TypeError, r"batch\[1\] is of type int, batch\[0\] is of type list"),
    ([np.array(["a"])], TypeError, r"batch\[0\] is of type numpy.ndarray, shape \(1,\)"),
    ([[np.array([None])]], TypeError, r"batch\[0\]\[0\] is of type numpy.ndarray"),
    (
        [torch.zeros(2).to_sparse()] * 2,
        RuntimeError,
        r"batch\[:\].*sparse tensors are not currently supported",
    ),
    ([2**70], ValueError, r"batch\[:\] .*Overflow"),
    (
        [torch.zeros(1, dtype=torch.uint16), torch.zeros(1).long()],
        RuntimeError,
        r"batch\[1\] has dtype torch.int64",
    ),
    (7, TypeError, "batch must be a list of samples, got of type int"),
    ({0: 1}, TypeError, "batch must be a list of samples, got of type dict"),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("batch", "error", "words"), ERRORS)
def test_an_error_names_the_place(batch, error, words):
    with pytest.raises(error, match=words):
        collate(there(batch))


def test_a_users_error_comes_through():
    class Broken(dict):
        def __getitem__(self, key):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        collate([Broken(a=1)])
    default_collate_fn_map[Money] = lambda batch, *, collate_fn_map=None: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            collate([Money(1)])
    finally:
        del default_collate_fn_map[Money]


def test_a_sample_that_contains_itself_ends_in_recursion_error():
    loop: list = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        collate([loop])


GRAD, COLOUR = torch.zeros(2, requires_grad=True), torch.zeros(2).as_subclass(Colour)
STRICT = [
    ([torch.zeros(2), torch.zeros(2).double()], TypeError, r"batch\[1\] has dtype torch.float64"),
    ([GRAD, torch.zeros(2).double()], TypeError, r"batch\[1\] has dtype torch.float64"),
    (
        [COLOUR, torch.zeros(2).double().as_subclass(Colour)],
        TypeError,
        r"batch\[1\] has dtype torch.float64",
    ),
    (
        [{"a": 1}, {"a": 1, "b": 2}],
        KeyError,
        r"batch\[1\] has keys \['a', 'b'\], batch\[0\] has keys \['a'\]",
    ),
    ([1, 2.5], TypeError, r"batch\[1\] is of type float"),
    ([1, True], TypeError, r"batch\[1\] is of type bool"),
    ([(1, 2), [1, 2]], TypeError, r"batch\[1\] is of type list"),
    ([np.float32(1), np.float64(1)], TypeError, r"batch\[1\] is of type numpy.float64"),
    (["a", b"a"], TypeError, r"batch\[1\] is of type bytes"),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("batch", "error", "words"), STRICT)
def test_strict_refuses_what_collate_settles(batch, error, words):
    batch = there(batch)
    assert_same(collate(batch), default_collate(batch))
    with pytest.raises(error, match=words):
        Collate(strict=True)(batch)


def test_strict_arrays():
    batch = [np.zeros(2, "f4"), np.zeros(2, "f8")]
    assert collate(batch).dtype == torch.float64
    with pytest.raises(TypeError, match=r"batch\[1\] has dtype torch.float64"):
        Collate(strict=True)(batch)


def test_modes_see_their_functions():
    with torch.device("meta"):
        assert collate([1, 2]).device.type == "meta"
        assert collate([torch.zeros(2, device="cpu")] * 2).device.type == "cpu"
    calls = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    batch = [torch.zeros(2)] * 2
    with Spy():
        collate(batch)
    assert torch.stack in calls


def test_gradients_flow_and_no_grad_is_obeyed(device):
    leaves = [torch.randn(3, requires_grad=True, device=device) for _ in range(2)]
    collate(leaves).sum().backward()
    assert_same(leaves[1].grad, torch.ones(3, device=device))
    with torch.no_grad():
        assert not collate(leaves).requires_grad
    with torch.inference_mode():
        assert collate([torch.zeros(2, device=device)]).is_inference()


def test_a_subclass_keeps_its_class(device):
    result = collate([{"c": torch.zeros(2, device=device).as_subclass(Colour)}] * 2)["c"]
    assert type(result) is Colour
    assert result.shape == (2, 2)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 3, 4, 5), (2, 3, 4, 5), (1, 2, 1, 1), (2, 1, 3, 1)])
def test_channels_last_strides(shape, n):
    batch = [torch.rand(shape).contiguous(memory_format=torch.channels_last) for _ in range(n)]
    assert_same(collate(batch), default_collate(batch))
    batch = [t[:, :, None].contiguous(memory_format=torch.channels_last_3d) for t in batch]
    assert_same(collate(batch), default_collate(batch))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3, 3)])
def test_zero_size(shape, device):
    batch = [torch.empty(shape, device=device)] * 3
    assert_same(collate(batch), default_collate(batch))


@pytest.mark.usefixtures("device")
def test_large_batches_go_through_several_threads():
    batch = there([(torch.randn(100, 784), torch.tensor(i), np.full((3, 5), i)) for i in range(40)])
    assert_same(collate(batch), default_collate(batch))


def test_settings_travel():
    settings = Collate(strict=True, pad={"x": 0, ("a", "b"): "packed"}, lengths=True)
    again = pickle.loads(pickle.dumps(settings))
    assert (
        repr(again)
        == repr(settings)
        == "Collate(strict=True, pad={'x': 0, ('a', 'b'): 'packed'}, lengths=True)"
    )
    batch = [{"x": torch.arange(k), "a": {"b": torch.arange(k)}} for k in (1, 2)]
    assert_same(again(batch), settings(batch))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works here")
def test_pinning_without_an_accelerator_is_refused():
    with pytest.raises(RuntimeError, match="pin_memory=True needs an accelerator"):
        Collate(pin_memory=True)([torch.zeros(2)])


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_pinning():
    batch = [
        (torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last), 1, np.float32(2)) for _ in range(3)
    ]
    result = Collate(pin_memory=True)(batch)
    assert all(tensor.is_pinned() for tensor in result)
    assert_same(result, default_collate(batch))
