"""Collate(device=...): one packed copy for the whole batch, equal to collate; and what it refuses."""

import pickle
from collections import namedtuple
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from batches import assert_same
from devices import DEVICES
from torch.utils.data import DataLoader

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


# Only storage and device may differ from what collate gives in ordinary memory.


def test_a_packed_batch_equals_an_ordinary_one():
    batch = list(samples())
    assert_equal_batches(packed(batch, Staging(torch.device("cpu"))), collate(batch))


def assert_equal_batches(ours, theirs):
    for field in theirs:
        if field == "scene":
            assert_same([ours[field].image, ours[field].boxes], [theirs[field].image, theirs[field].boxes])
        else:
            assert_same(ours[field], theirs[field])


def test_all_fields_lie_in_one_piece():
    got = packed(list(samples()), Staging(torch.device("cpu")))
    fields = [
        got["pixels"],
        got["channels_last"],
        got["transposed"],
        got["mixed"],
        got["label"],
        got["array"],
    ]
    assert len({field.untyped_storage().data_ptr() for field in fields}) == 1
    starts = sorted((field.data_ptr(), field.nbytes) for field in fields)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))
    assert all(field.data_ptr() % 64 == got["pixels"].data_ptr() % 64 for field in fields)


def test_a_field_keeps_its_graph():
    batch = list(samples())
    got = packed(batch, Staging(torch.device("cpu")))
    got["leaf"].sum().backward()
    assert all(torch.equal(sample["leaf"].grad, torch.ones(2)) for sample in batch)


@pytest.mark.parametrize("settings", [{"pad": 0}, {"pad": -1.5, "lengths": True}, {"pad": "packed"}])
def test_ragged_samples(settings):
    batch = [torch.arange(float(n)) for n in (3, 1, 4)]
    assert_same(packed(batch, Staging(torch.device("cpu")), **settings), Collate(**settings)(batch))


def test_a_gathered_batch_is_packed_too():
    batch = TensorDataset(torch.randn(9, 4), torch.arange(9)).__getitems__([3, 0, 8])
    got = packed(batch, Staging(torch.device("cpu")))
    assert_same(got, batch.collated())
    assert got[0].untyped_storage().data_ptr() == got[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("batch", [[torch.zeros(0)], [{"a": torch.zeros(2, 0), "b": "x"}], [{}], ["a", "b"]])
def test_batches_without_a_byte(batch):
    assert_same(packed(batch, Staging(torch.device("cpu"))), collate(batch))


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


def test_later_batches_do_not_change_earlier_ones():
    staging = Staging(torch.device("cpu"))
    first = packed([torch.full((4,), 1.0)], staging)
    packed([torch.full((4,), 2.0)], staging)
    assert first.tolist() == [[1.0] * 4]


def test_a_buffer_grows_and_one_that_is_out_is_not_shared():
    staging = Staging(torch.device("cpu"))
    first, second = staging.take(10), staging.take(10)
    assert first.data_ptr() != second.data_ptr()
    staging.send(first, 10)
    grown = staging.take(2 * LEAST_BYTES)
    assert grown.nbytes() >= 2 * LEAST_BYTES


def test_a_failure_leaves_no_buffer_behind_that_is_half_written():
    staging = Staging(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"batch\[1\] has shape"):
        packed([torch.zeros(2), torch.zeros(3)], staging)
    assert_same(packed([torch.zeros(2)], staging), torch.zeros(1, 2))


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


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")
def test_on_a_gpu_it_equals_collate_moved_there():
    batch = list(samples())
    collated = collate(batch)
    ours = Collate(device="cuda")
    for _ in range(3):  # the buffer is used again
        got = ours(batch)
        for name in ("pixels", "channels_last", "transposed", "mixed", "label", "array", "scalar", "nothing"):
            assert got[name].is_cuda
            assert_same(got[name], collated[name].cuda())
