"""Datasets of known cost and known faults for the profiler's tests; importable by path in any process."""

import os
import signal
import time
import zlib

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info


class Base(Dataset):
    """`samples` small samples; what an access costs or breaks is up to the subclass."""

    def __init__(self, samples=2000):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.access(index)
        return torch.full((8,), float(index)), index

    def access(self, index):
        pass


class Sleeps(Base):
    """Every access waits."""

    def __init__(self, samples=2000, seconds=0.002):
        super().__init__(samples)
        self.seconds = seconds

    def access(self, index):
        time.sleep(self.seconds)


class Computes(Base):
    """Every access keeps a processor busy."""

    def __init__(self, samples=2000, seconds=0.001):
        super().__init__(samples)
        self.seconds = seconds

    def access(self, index):
        spin(self.seconds)


class Inflates(Base):
    """Images of 150 kB, each unpacked by zlib in about 2 ms."""

    def __init__(self, samples=2000, rounds=4):
        super().__init__(samples)
        pixels = numpy.random.default_rng(0).integers(0, 32, 3 * 224 * 224, dtype=numpy.uint8)
        self.rounds, self.packed = rounds, zlib.compress(pixels.tobytes(), 6)

    def __getitem__(self, index):
        for _ in range(self.rounds):
            pixels = zlib.decompress(self.packed)
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(3, 224, 224), index


class FirstAccessSlow(Sleeps):
    """The first access in each process waits half a second, later ones a little."""

    opened_by = None

    def access(self, index):
        if self.opened_by != os.getpid():
            self.opened_by = os.getpid()
            time.sleep(0.5)
        super().access(index)


class OneInAHundredSlow(Sleeps):
    """Every hundredth index takes 25 times as long."""

    def access(self, index):
        time.sleep(self.seconds * (25 if index % 100 == 7 else 1))


class Large(Base):
    """Samples of 3 MB, made cheaply."""

    def __getitem__(self, index):
        return torch.full((512, 1536), float(index))


class KilledWorker(Base):
    """A worker is killed as the kernel would when memory runs out; one process alone is not."""

    def access(self, index):
        if get_worker_info() is not None and index > 50:
            os.kill(os.getpid(), signal.SIGKILL)


class BusError(Base):
    """A worker gets the signal that writing to a full /dev/shm gives."""

    def access(self, index):
        if get_worker_info() is not None and index > 50:
            os.kill(os.getpid(), signal.SIGBUS)


class Raises(Base):
    """Index 77 raises."""

    def access(self, index):
        if index == 77:
            raise ValueError("broken sample")


class Hangs(Base):
    """Index 77 never returns."""

    def access(self, index):
        if index == 77:
            time.sleep(3600)


class HangsInWorker(Base):
    """One worker, by its number, hangs from its first access on; the others do not."""

    def __init__(self, samples=2000, number=0):
        super().__init__(samples)
        self.number = number

    def access(self, index):
        info = get_worker_info()
        if info is not None and info.id == self.number:
            time.sleep(3600)


class AlwaysHangs(Base):
    """No access returns."""

    def access(self, index):
        time.sleep(3600)


class ManyTensors(Base):
    """Each batch travels as forty tensors, so forty descriptors."""

    def __getitem__(self, index):
        return [torch.zeros(4) for _ in range(40)]


class Unpicklable(Base):
    """Workers started by spawn cannot be given this; it also does not pickle on its way here."""

    def __init__(self, samples=2000):
        super().__init__(samples)
        self.transform = lambda value: value


class OwnGenerator(Base):
    """Random samples from the dataset's own generator: the same in every forked worker."""

    def __init__(self):
        super().__init__()
        self.generator = numpy.random.default_rng(0)

    def __getitem__(self, index):
        return torch.from_numpy(self.generator.random(3))


class GlobalGenerator(Base):
    """Random samples from torch's generator, which DataLoader seeds differently in every worker."""

    def __getitem__(self, index):
        return torch.rand(3)


class Counting(IterableDataset):
    """Yield 0, 1, ... without end, or up to `stop`; every worker yields the same."""

    def __init__(self, stop=None):
        self.stop = stop

    def __iter__(self):
        position = 0
        while self.stop is None or position < self.stop:
            yield torch.tensor([position])
            position += 1


class Sharded(Counting):
    """Each worker yields its own share."""

    def __iter__(self):
        info = get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        position = first
        while self.stop is None or position < self.stop:
            time.sleep(0.001)
            yield torch.tensor([position])
            position += step


class Endless(Base):
    """A map-style dataset that has samples without end: 2**62 of them."""

    def __init__(self):
        super().__init__(2**62)


class MyLoader(DataLoader):
    """A DataLoader subclass with an argument of its own and no **kwargs."""

    def __init__(self, dataset, tag, batch_size=1, num_workers=0, collate_fn=None, **others):
        super().__init__(
            dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn, **others
        )
        self.tag = tag

    def __iter__(self):
        assert self.tag == "kept"
        return super().__iter__()


def summing_collate(samples):
    """Collate to something mbperf.collate would not make."""
    return torch.stack([sample[0] for sample in samples]).sum(0, keepdim=True).expand(len(samples), -1)


def ready_loader():
    """Return a ready loader of a subclass, as a factory would."""
    return MyLoader(Sleeps(400), "kept", batch_size=16, num_workers=1, collate_fn=summing_collate)


def tensors():
    """Return a TensorDataset that is fastest without workers."""
    return TensorDataset(torch.rand(4000, 784), torch.arange(4000))


def small_tensors():
    """Return a TensorDataset whose batches take far longer to hand over than to make."""
    return TensorDataset(torch.rand(4000, 8), torch.arange(4000))


def step(batch):
    """Take 4 ms, as a consumer might."""
    time.sleep(0.004)


class Step:
    """A step that takes `seconds`: it sleeps, as one that waits for an accelerator does, or it computes."""

    def __init__(self, kind, seconds):
        self.kind, self.seconds = kind, seconds

    def __call__(self, batch):
        if self.kind == "sleeps":
            time.sleep(self.seconds)
        else:
            spin(self.seconds)


def spin(seconds):
    """Keep a processor busy for this much of its time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def failing_factory():
    """Fail while being made."""
    raise FileNotFoundError("no such data")


sleeps = Sleeps()

KNOWN_COSTS = {
    "computes": lambda: Computes(20_000, 0.0005),
    "sleeps": lambda: Sleeps(20_000, 0.002),
    "tensors": tensors,
    "large": lambda: Large(2_000),
    "first-access": lambda: FirstAccessSlow(20_000, 0.002),
    "one-in-a-hundred": lambda: OneInAHundredSlow(20_000, 0.001),
}
