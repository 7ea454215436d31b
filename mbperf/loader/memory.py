"""Memory, descriptors and shared memory of a loader: this process and its workers.

PSS divides each shared page among those who map it, so the sum over processes counts every page once;
RSS would count the dataset once per worker. USS is what ends with the process.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Footprint:
    """Bytes and descriptors at one moment. `workers` lists each worker's PSS."""

    pss_bytes: int = 0
    uss_bytes: int = 0
    main_pss_bytes: int = 0
    workers_pss_bytes: list[int] | None = None
    shared_bytes: int = 0
    descriptors: int = 0


def footprint(shares_with: int | None = None) -> Footprint:
    """Return the footprint of this process and its living descendants.

    Args:
        shares_with: the process this one was forked from, whose part of the pages both map counts too:
            a training script would not have it beside itself.
    """
    me = psutil.Process()
    result = Footprint(workers_pss_bytes=[], descriptors=me.num_fds())
    for process in [me, *me.children(recursive=True)]:
        try:
            pss, uss, shared = _rollup(process.pid)
        except (OSError, psutil.Error):
            continue
        result.pss_bytes += pss
        result.uss_bytes += uss
        result.shared_bytes += shared
        if process.pid == os.getpid():
            result.main_pss_bytes = pss
        elif result.workers_pss_bytes is not None:
            result.workers_pss_bytes.append(pss)
    if shares_with is not None:
        pss, uss, _ = _rollup(shares_with)
        result.pss_bytes += pss - uss
        result.main_pss_bytes += pss - uss
    return result


def _rollup(pid: int) -> tuple[int, int, int]:
    """Return (PSS, USS, PSS in shared memory) in bytes; smaps_rollup costs a tenth of smaps."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024
    unique = fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)
    return fields["Pss"], unique, fields.get("Pss_Shmem", 0)
