"""What machine this is: a name made of its hardware, so that a new host of the same kind finds its runs."""

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from mbperf import processors
from mbperf.processors import affinity

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def name() -> str:
    """Return the name of this kind of machine: CPU model, usable cores, memory class.

    >>> name() == name()
    True
    """
    return f"{_slug(_cpu_model())}-{affinity()}c-{memory_class_gib()}g"


def hardware() -> dict[str, Any]:
    """Return the facts behind the name, with the last cache, as base units.

    >>> sorted(hardware())[0]
    'architecture'
    """
    return {
        "name": name(),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": affinity(),
        "memory_class_bytes": memory_class_gib() << 30,
        "last_cache_bytes": last_cache_bytes(),
    }


def software() -> dict[str, Any]:
    """Return the versions and settings a time depends on beside the hardware.

    >>> software()["threads"] >= 1
    True
    """
    import torch

    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "executable_bits": 64 if sys.maxsize > 2**32 else 32,
    }


def gpu() -> dict[str, Any]:
    """Return the facts of the current CUDA device, in base units.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "machine": _slug(found.name),
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "last_cache_bytes": found.L2_cache_size,
    }


def memory_class_gib() -> int:
    """Return the memory rounded up to a power of two GiB: firmware and hypervisors take uneven bits of it."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return 1 << max(0, (int(-(-gib // 1)) - 1).bit_length())


def last_cache_bytes() -> int | None:
    """Return the size of the last cache level, or None where the system does not tell."""
    sizes = [_size_bytes(processors.read(file) or "") for file in CACHES.glob("index*/size")]
    return max(sizes, default=0) or None


def available_bytes() -> int:
    """Return the memory this process may still take: what the system has left, within its control groups.

    >>> available_bytes() > 0
    True
    """
    import psutil

    available, left = psutil.virtual_memory().available, processors.memory_left()
    return available if left is None else min(available, left)


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0


def _cpu_model() -> str:
    """The model in words; with family and model numbers, as a hypervisor may call many CPUs the same."""
    fields = _cpu_fields()
    words = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model") if key in fields]
    return " ".join([words, *(["family", "model"][i] + " " + n for i, n in enumerate(numbers))])


def _cpu_fields() -> dict[str, str]:
    try:
        first = CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _slug(text: str) -> str:
    """Return the name of a piece of hardware as a folder is called.

    >>> _slug("Intel(R) Xeon(R) Processor"), _slug("NVIDIA H100 80GB HBM3")
    ('intel-xeon-processor', 'nvidia-h100-80gb-hbm3')
    """
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
