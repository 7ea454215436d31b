"""Machines of other sizes, pretended: processors, a control group's quota and memory, free memory."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil

from mbperf import processors

GIB = 1 << 30


def pretend(
    monkeypatch,
    folder: Path,
    *,
    cores: int,
    quota: float | None = None,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    cached_bytes: int = 0,
    available_bytes: int = 8 * GIB,
    version: int = 2,
) -> None:
    """Let this process believe that it runs on another machine.

    Args:
        monkeypatch: pytest's.
        folder: an empty one, for the files of the control group.
        cores: processors that the scheduler may use.
        quota: of the control group, in processors.
        memory_bytes: its limit; of these `used_bytes` are taken, among them `cached_bytes` of files.
        available_bytes: what the system has left.
        version: of control groups.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: max(cores, 96))  # that of the machine around the container
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available_bytes))
    files = _version_2 if version == 2 else _version_1
    (folder / "self").write_text("0::/\n" if version == 2 else "4:memory:/\n3:cpu:/\n")
    for name, text in files(quota, memory_bytes, used_bytes, cached_bytes).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(processors, "CGROUP_FILE", folder / "self")
    monkeypatch.setattr(processors, "CGROUP_ROOT", folder)


def _version_2(quota, memory_bytes, used_bytes, cached_bytes):
    return {
        "cpu.max": "max 100000" if quota is None else f"{int(quota * 100_000)} 100000",
        "memory.max": "max" if memory_bytes is None else memory_bytes,
        "memory.current": used_bytes,
        "memory.stat": f"anon 1\ninactive_file {cached_bytes}",
    }


def _version_1(quota, memory_bytes, used_bytes, cached_bytes):
    return {
        "cpu/cpu.cfs_quota_us": -1 if quota is None else int(quota * 100_000),
        "cpu/cpu.cfs_period_us": 100_000,
        "memory/memory.limit_in_bytes": 9223372036854771712 if memory_bytes is None else memory_bytes,
        "memory/memory.usage_in_bytes": used_bytes,
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached_bytes}",
    }
