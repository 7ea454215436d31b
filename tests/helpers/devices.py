"""The devices of this machine, and the one that the test at hand runs on."""

import os

import torch

# Where torch has no CUDA, or sees no GPU, the tests are not there twice; bench/on_gpu.sh asks for them to be.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() or os.environ.get("MBPERF_NEEDS_CUDA") else [])]

_here = ["cpu"]


def here() -> str:
    """Return the device of the test at hand."""
    return _here[-1]


def on(device: str):
    """Let `here` return a device until the generator is resumed; the body of the fixture `device`."""
    _here.append(device)
    yield device
    _here.pop()


def generator(seed: int) -> torch.Generator:
    """Return a generator for values that are the same on every device: they are drawn on the CPU."""
    return torch.Generator().manual_seed(seed)
