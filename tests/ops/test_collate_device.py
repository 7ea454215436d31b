"""Collate(device=...): one packed copy for the whole batch, equal to collate; and what it refuses."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from batches import assert_same, batches
from devices import DEVICES
from hypothesis import given
from torch.utils.data import DataLoader, default_collate

from mbperf import Collate, TensorDataset, collate
from mbperf.extension import _C
from mbperf.ops.staging import LEAST_BYTES, Staging

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Scene:
    image: torch.Tensor
    boxes: list


def packed(batch, staging, **settings):
    """The batch by way of a staging buffer, whatever the device it goes to."""
    pad, lengths = settings.get("pad"), settings.get("lengths", False)
    return _C.collate(batch, settings.get("strict", False), False, pad, lengths, False, staging)


def samples(n=5):
    torch.manual_seed(0)
    for k in range(n):
        yield {
            "pixels": torch.randn(3, 4),
            "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            "transposed": torch.randn(4, 3).t(),
            "mixed": torch.tensor([k], dtype=torch.uint8 if k % 2 else torch.float64),
            "label": k,
            "flag": k > 2,
            "weight": k / 3,
            "name": f"sample {k}",
            "array": np.full((3,), k, dtype="f4"),
            "scalar": np.int16(k),
            "nothing": torch.zeros(0, 2),
            "leaf": torch.randn(2, requires_grad=True),
            "point": Point(torch.tensor(float(k)), (k, [k])),
            "scene": Scene(torch.randint(0, 256, (2, 2), dtype=torch.uint8), [torch.ones(1)]),
        }


@pytest.fixture(params=DEVICES)
def staging(request):
    """The way to the CPU, of which all but the copy and the event is the way to a GPU; and to a GPU."""
    return Staging(torch.device(request.param))


def assert_same_there(ours, theirs, staging):
    """Only storage and device may differ from what collate gives in ordinary memory."""
    assert_same(ours, theirs, device=staging.device.type)


def test_a_packed_batch_equals_an_ordinary_one(staging):
    batch = list(samples())
    ours, theirs = packed(batch, staging), collate(batch)
    scene, expected = ours.pop("scene"), theirs.pop("scene")
    assert_same_there(ours, theirs, staging)
    assert_same_there([scene.image, scene.boxes], [expected.image, expected.boxes], staging)


@given(batches())
def test_fuzz_packed_batches(staging, batch):
    try:
        theirs = default_collate(copy.copy(batch))
    except Exception as refused:
        with pytest.raises(type(refused)):
            packed(batch, staging)
    else:
        assert_same_there(packed(batch, staging), theirs, staging)


def test_all_fields_lie_in_one_piece(staging):
    got = packed(list(samples()), staging)
    fields = [got[name] for name in ("pixels", "channels_last", "transposed", "label", "array")]
    assert len({field.untyped_storage().data_ptr() for field in fields}) == 1
    starts = sorted((field.data_ptr(), field.nbytes) for field in fields)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))
    assert all(field.data_ptr() % 64 == got["pixels"].data_ptr() % 64 for field in fields)


# Samples of several dtypes: packed as they are, converted where they are going.

U8, I16, F32, F64, BF16 = torch.uint8, torch.int16, torch.float32, torch.float64, torch.bfloat16
MIXTURES = {
    "one by one": [F32, F64] * 4,
    "one odd one out": [U8, U8, U8, F64, U8],
    "several, and back": [U8, F32, I16, BF16, U8, F64, F32],
    "neither holds the other": [BF16, torch.float16],
    "complex": [F64, torch.complex64],
    "seldom seen": [torch.uint16, torch.float32, torch.uint16],
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3, 4, 4)], ids=str)
def test_mixed_dtypes_are_converted_as_torch_does(mixture, shape, staging):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 200, (len(MIXTURES[mixture]), *shape), generator=generator)
    batch = [row.to(dtype) for row, dtype in zip(rows, MIXTURES[mixture], strict=True)]
    assert_same_there(packed(batch, staging), torch.stack(batch), staging)
    if len(shape) == 4:
        last = [sample.transpose(0, 1).contiguous(memory_format=torch.channels_last) for sample in batch]
        assert_same_there(packed(last, staging), default_collate(last), staging)
        some = [one if k % 3 else other for k, (one, other) in enumerate(zip(last, last[::-1], strict=True))]
        some[0] = some[0].contiguous()
        assert_same_there(packed(some, staging), default_collate(some), staging)


def test_mixed_arrays_beside_other_fields(staging):
    batch = [{"a": np.full((5,), k, dtype=["f4", "i8", "f8"][k % 3]), "b": k} for k in range(7)]
    assert_same_there(packed(batch, staging), default_collate(batch), staging)


def test_mixed_dtypes_travel_as_they_are(monkeypatch):
    """1,000 rows of bytes and one of doubles: 107 KB on the way, not the 801 KB that they become."""
    travelled, send = [], Staging.send

    def weighed(staging, storage, nbytes):
        travelled.append(nbytes)
        return send(staging, storage, nbytes)

    monkeypatch.setattr(Staging, "send", weighed)
    batch = [torch.full((100,), k % 256, dtype=U8) for k in range(1000)] + [torch.full((100,), 0.5).double()]
    assert_same(packed(batch, Staging(torch.device("cpu"))), torch.stack(batch))
    order = 1001 * 8
    assert travelled == [sum(-(-size // 64) * 64 for size in (100_000, 800, order))]


def test_mixed_dtypes_that_do_not_fit_are_refused_in_place():
    staging = Staging(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"batch\[2\] has shape \(3,\), batch\[0\] has shape \(2,\)"):
        packed([torch.zeros(2), torch.zeros(2).double(), torch.zeros(3)], staging)
    with pytest.raises(RuntimeError, match=r"batch\[1\] has dtype torch.int64, .* no dtype for both"):
        packed([torch.zeros(1, dtype=torch.uint16), torch.zeros(1).long()], staging)
    with pytest.raises(TypeError, match=r"batch\[1\] has dtype torch.float64"):
        packed([torch.zeros(2), torch.zeros(2).double()], staging, strict=True)


def test_a_field_keeps_its_graph(staging):
    batch = list(samples())
    got = packed(batch, staging)
    got["leaf"].sum().backward()
    assert all(torch.equal(sample["leaf"].grad, torch.ones(2)) for sample in batch)


@pytest.mark.parametrize("settings", [{"pad": 0}, {"pad": -1.5, "lengths": True}, {"pad": "packed"}])
def test_ragged_samples(settings, staging):
    for dtypes in ([F32] * 3, [F32, I16, F64]):
        batch = [torch.arange(n).to(dtype) for n, dtype in zip((3, 1, 4), dtypes, strict=True)]
        assert_same_there(packed(batch, staging, **settings), Collate(**settings)(batch), staging)


def test_a_gathered_batch_is_packed_too(staging):
    batch = TensorDataset(torch.randn(9, 4), torch.arange(9)).__getitems__([3, 0, 8])
    got = packed(batch, staging)
    assert_same_there(got, batch.collated(), staging)
    assert got[0].untyped_storage().data_ptr() == got[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("batch", [[torch.zeros(0)], [{"a": torch.zeros(2, 0), "b": "x"}], [{}], ["a", "b"]])
def test_batches_without_a_byte(batch, staging):
    assert_same_there(packed(batch, staging), collate(batch), staging)


def test_fields_lie_on_the_device():
    got = packed(list(samples()), Staging(torch.device("meta")))
    there = [got[name] for name in ("pixels", "label", "mixed", "nothing", "leaf")] + [got["scene"].image]
    assert {field.device.type for field in there} == {"meta"}
    assert got["channels_last"].stride() == collate(list(samples()))["channels_last"].stride()
    assert got["name"] == [f"sample {k}" for k in range(5)]


# The buffer is used again, and only when the last copy out of it is done.


class Events:
    """Stands in for CUDA events: says when it was recorded and waited for."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr(Staging, "_event", lambda staging: self.record())

    def record(self):
        number = sum(entry[0] == "record" for entry in self.log)
        self.log.append(("record", number))
        waited = self.log

        class Event:
            def synchronize(self):
                waited.append(("wait", number))

        return Event()


def test_a_buffer_is_used_again_behind_its_event(monkeypatch):
    events, staging = Events(monkeypatch), Staging(torch.device("cpu"))
    pointers = []
    for _ in range(3):
        storage = staging.take(100)
        pointers.append(storage.data_ptr())
        staging.send(storage, 100)
    assert len(set(pointers)) == 1
    assert events.log == [("record", 0), ("wait", 0), ("record", 1), ("wait", 1), ("record", 2)]


def test_later_batches_do_not_change_earlier_ones(staging):
    first = packed([torch.full((4,), 1.0)], staging)
    packed([torch.full((4,), 2.0)], staging)
    assert first.tolist() == [[1.0] * 4]


def test_a_buffer_grows_and_one_that_is_out_is_not_shared(staging):
    first, second = staging.take(10), staging.take(10)
    assert first.data_ptr() != second.data_ptr()
    staging.send(first, 10)
    grown = staging.take(2 * LEAST_BYTES)
    assert grown.nbytes() >= 2 * LEAST_BYTES


def test_a_failure_leaves_no_buffer_behind_that_is_half_written(staging):
    with pytest.raises(RuntimeError, match=r"batch\[1\] has shape"):
        packed([torch.zeros(2), torch.zeros(3)], staging)
    assert_same_there(packed([torch.zeros(2)], staging), torch.zeros(1, 2), staging)


# Settings.


def test_the_cpu_is_ordinary():
    assert_same(Collate(device="cpu")([1, 2]), torch.tensor([1, 2]))
    assert repr(Collate(device="cpu")) == "Collate()"


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        ("gpu", ValueError, "Collate: device expects a torch device, got 'gpu'"),
        (None, ValueError, "Collate: device expects a torch device, got None"),
        ("meta", ValueError, "Collate: device expects a CPU or CUDA device, got 'meta'"),
        ("cuda:99", RuntimeError, "Collate: device='cuda:99', but torch"),
    ],
)
def test_a_device_that_cannot_be(device, error, words):
    with pytest.raises(error, match=words):
        Collate(device=device)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")], ids=str)
def test_torch_without_cuda(device):
    with pytest.raises(RuntimeError, match=r"^Collate: device='cuda.*', but torch .* is built without CUDA$"):
        Collate(device=device)


def with_fake_gpu(monkeypatch):
    """A Collate for a GPU that is not there; good for anything but a batch."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return Collate(device="cuda:1")


def test_it_is_pickled_without_its_buffers(monkeypatch):
    ours = with_fake_gpu(monkeypatch)
    ours._staging._free.append((torch.UntypedStorage(8), None))
    again = pickle.loads(pickle.dumps(ours))
    assert (again.device, again._staging.device, again._staging._free) == (
        "cuda:1",
        torch.device("cuda:1"),
        [],
    )
    assert repr(again) == "Collate(device='cuda:1')"


def test_more_gpus_than_there_are(monkeypatch):
    with_fake_gpu(monkeypatch)
    with pytest.raises(RuntimeError, match="Collate: device='cuda:2', but torch sees 2 GPUs"):
        Collate(device="cuda:2")


def test_pinned_memory_and_a_gpu_exclude_each_other(monkeypatch):
    with_fake_gpu(monkeypatch)
    with pytest.raises(
        ValueError, match="pin_memory=True keeps the batch on the CPU, device='cuda' does not"
    ):
        Collate(device="cuda", pin_memory=True)


def test_a_worker_does_not_touch_the_gpu(monkeypatch):
    loader = DataLoader([1, 2], batch_size=2, num_workers=1, collate_fn=with_fake_gpu(monkeypatch))
    with pytest.raises(RuntimeError, match="device='cuda:1' works in the main process only"):
        list(loader)


def test_it_equals_collate_moved_there(device):
    ours, batch = Collate(device=device), list(samples())
    for _ in range(3):  # the buffer is used again
        got, expected = ours(batch), collate(batch)
        del got["scene"], expected["scene"]
        assert_same(got, expected, device=device)
