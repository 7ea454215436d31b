"""Collate in DataLoader workers: one storage a batch, under every start method and sharing strategy."""

import collections
import contextlib
import os
import resource
import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing
from batches import Point, assert_same
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from mbperf import Collate, collate


class Fields(Dataset):
    """Samples of every native kind; `grown` adds those that default_collate refuses or corrupts there."""

    def __init__(self, n=12, grown=False):
        self.n, self.grown = n, grown

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        sample = {
            "image": torch.full((2, 3, 4, 4), float(i)).contiguous(memory_format=torch.channels_last),
            "array": np.full((3, 2), i, "i4"),
            "label": i,
            "weight": i / 2,
            "flag": i % 2 == 0,
            "half": np.float16(i),
            "name": str(i),
            "pair": Point(torch.tensor(i), [torch.arange(3), b"x"]),
            "empty": torch.empty(0, 2),
        }
        if self.grown:
            sample["promoted"] = torch.tensor(
                [1e300 if i % 2 else 1.0], dtype=[torch.float32, torch.float64][i % 2]
            )
            sample["wide"] = torch.tensor([300 if i % 2 else 7], dtype=[torch.uint8, torch.int64][i % 2])
            sample["real"] = torch.tensor([i], dtype=[torch.int64, torch.float32][i % 2])
            sample["grad"] = torch.full((2,), float(i), requires_grad=True)
            sample["strided"] = torch.arange(6.0).view(2, 3).t()
        return sample


def loaded(dataset, collate_fn=collate, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pin_memory without an accelerator says so
        return list(DataLoader(dataset, batch_size=4, collate_fn=collate_fn, **options))


def storages(batch):
    """The distinct storages of the tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        return {batch.untyped_storage().data_ptr()} if batch.numel() else set()
    if isinstance(batch, dict):
        batch = list(batch.values())
    return set().union(*map(storages, batch)) if isinstance(batch, (list, tuple)) else set()


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_start_methods(start):
    dataset = Fields(grown=True)
    expected = loaded(dataset, default_collate)
    batches = loaded(dataset, num_workers=2, multiprocessing_context=start, timeout=60)
    for batch, theirs in zip(batches, expected, strict=True):
        theirs["grad"] = theirs["grad"].detach().requires_grad_()
        assert_same(batch, theirs)
        assert len(storages(batch)) == 1
        assert batch["image"].is_shared()


@pytest.mark.parametrize("strategy", sorted(torch.multiprocessing.get_all_sharing_strategies()))
def test_sharing_strategies(strategy):
    was = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        batches = loaded(Fields(), num_workers=2)
        empty = loaded([torch.empty(0, 3)] * 8, num_workers=1)
    finally:
        torch.multiprocessing.set_sharing_strategy(was)
    for batch, theirs in zip(batches, loaded(Fields(), default_collate), strict=True):
        assert_same(batch, theirs)
        assert len(storages(batch)) == 1
    assert_same(empty, loaded([torch.empty(0, 3)] * 8, default_collate))


def test_default_collate_still_spoils_what_we_keep():
    theirs = loaded(_Columns("promoted"), default_collate, num_workers=1)[0]
    assert theirs["promoted"].dtype == torch.float32, "torch promotes in workers too: drop this difference"
    assert theirs["promoted"].isinf().any()
    with pytest.raises(RuntimeError):
        loaded(_Columns("grad"), default_collate, num_workers=1)
    with pytest.raises(TypeError):
        loaded(_Columns("real"), default_collate, num_workers=1)


class _Columns(Fields):
    """One column of Fields."""

    def __init__(self, name):
        super().__init__(grown=True)
        self.name = name

    def __getitem__(self, i):
        return {self.name: super().__getitem__(i)[self.name]}


@pytest.mark.parametrize("options", [{"pin_memory": True}, {"persistent_workers": True}])
def test_loader_options(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Fields(), batch_size=4, collate_fn=collate, num_workers=2, **options)
        for _ in range(2):
            for batch, theirs in zip(loader, loaded(Fields(), default_collate), strict=True):
                assert_same(batch, theirs)


def test_settings_in_a_worker():
    ragged = [{"t": torch.arange(k), "n": k} for k in (1, 3, 2, 5)]
    for settings in (Collate(pad=-1, lengths=True, mask=True), Collate(pad={"t": "packed"}, pin_memory=True)):
        here = Collate(pad=settings.pad, lengths=settings.lengths, mask=settings.mask)(ragged)
        for start in ("fork", "spawn"):
            batch = loaded(ragged, settings, num_workers=1, multiprocessing_context=start)[0]
            assert_same(batch, here)
            assert len(storages(batch)) == 1


def test_an_error_reaches_the_main_process_with_its_place():
    with pytest.raises(
        RuntimeError, match=r"batch\[2\]\[\"x\"\] has shape \(4,\), batch\[0\]\[\"x\"\] has shape"
    ):
        loaded([{"x": torch.zeros(3 + (k == 2))} for k in range(4)], num_workers=1)


def shared_pieces():
    """Names of torch's pieces of shared memory that this process has a descriptor of."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return collections.Counter(link for link in links if "/torch_" in link)


class Many(Dataset):
    def __len__(self):
        return 2_000

    def __getitem__(self, i):
        return torch.zeros(4), i, {"a": 1.0, "b": np.zeros(3), "c": True}


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8_000 if hard == resource.RLIM_INFINITY else min(hard, 8_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted) if soft >= 0 else soft, hard))
    if 0 <= wanted < 6_500:
        pytest.skip(f"this system allows {wanted} open files, torch's batches need 5,000")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_batches_cost_a_descriptor_each(record_property):
    counts = {}
    for name, function in {"mbperf": collate, "torch": default_collate}.items():
        loader = DataLoader(Many(), batch_size=2, num_workers=2, collate_fn=function)
        before = shared_pieces()
        held = list(loader)
        # Names, not numbers: pieces and pipes that earlier tests left may be closed meanwhile.
        counts[name] = (shared_pieces() - before).total()
        assert len(held) == 1_000
        del held
    for name, count in counts.items():
        record_property(f"descriptors_{name}", count)
        print(f"1,000 batches of 5 fields held alive, {name}: {count} descriptors")
    assert counts["mbperf"] == 1_000
    assert counts["torch"] == 5_000, "torch needs another number now: say so in the documentation"


def test_this_process_is_no_worker():
    assert get_worker_info() is None
    assert not collate([torch.zeros(2)]).is_shared()
