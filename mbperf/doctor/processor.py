"""Findings about the machine: instruction sets, threads and their limits, pages and memory, CUDA."""

import os
import re
from pathlib import Path

from mbperf import processors
from mbperf.build_info import REBUILD, cuda_build
from mbperf.doctor.finding import Finding
from mbperf.doctor.software import ask_extension, first_line, torch_module

HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BEST = ("avx512", "neon")
MAPS_FILE = Path("/proc/self/maps")


def instruction_set() -> Finding:
    """Tell which instruction set the kernels use, and whether a better one lies idle."""
    used, available = ask_extension("instruction_set"), ask_extension("instruction_sets")
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "")
    values = {"used": used, "available": available, "ATEN_CPU_CAPABILITY": asked}
    fact = f"{used}, of {', '.join(available)}"
    if used != available[0]:
        return Finding("instruction set", f"{fact}: the best is not used", "wrong", REBUILD, values)
    if asked and used not in BEST:  # it narrows what is available, for torch too
        fact += f"; ATEN_CPU_CAPABILITY={asked} holds back torch and mbperf alike"
        return Finding("instruction set", fact, "note", "unset ATEN_CPU_CAPABILITY", values)
    return Finding("instruction set", fact, values=values)


def openmp() -> Finding:
    """Tell whether a parallel loop of the extension really runs on several threads.

    Compiled without -fopenmp, at::parallel_for is a serial loop and says nothing.
    """
    threads, ran_on = torch_module().get_num_threads(), ask_extension("parallel_threads")
    values = {"threads": threads, "ran_on": ran_on, "runtimes": openmp_runtimes()}
    if threads > 1 and ran_on == 1:
        fact = f"off: a parallel loop ran on 1 thread, torch has {threads}"
        return Finding("OpenMP", fact, "wrong", f"{REBUILD} (with a compiler that knows -fopenmp)", values)
    if len(values["runtimes"]) > 1:
        fact = f"{len(values['runtimes'])} runtimes in one process ({', '.join(values['runtimes'])})"
        remedy = "start Python with LD_PRELOAD set to the first of them, or threads may be doubled"
        return Finding("OpenMP", fact, "note", remedy, values)
    return Finding("OpenMP", f"on: a parallel loop ran on {count(ran_on, 'thread')}", values=values)


def openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes that this process has loaded."""
    files = {line.split()[-1] for line in (processors.read(MAPS_FILE) or "").splitlines()}
    return sorted(file for file in files if re.search(r"/lib(gomp|omp|iomp5)[-.]", file))


def threads() -> Finding:
    """Compare torch's threads with the processors that this process may use."""
    asked, usable = torch_module().get_num_threads(), processors.usable()
    values = {
        "threads": asked,
        "affinity": processors.affinity(),
        "quota": processors.quota(),
        "usable": usable,
    }
    fact = f"{count(asked, 'thread')} on {count(usable, 'usable processor')}"
    if processors.quota() is not None:
        fact += f" (a quota of {processors.quota():g} out of {processors.affinity()})"
    if asked > usable:
        return Finding("threads", f"{fact}: they wait for one another", "wrong", omp_threads(usable), values)
    if asked < usable:
        return Finding("threads", f"{fact}: the others idle", "note", omp_threads(usable), values)
    return Finding("threads", fact, values=values)


def omp_threads(number: int) -> str:
    """Return the command that sets the number of threads."""
    return f"export OMP_NUM_THREADS={number}"


def huge_pages() -> Finding:
    """Tell whether large new buffers may have huge pages: page faults can cost more than the loss itself."""
    text = processors.read(HUGE_PAGES_FILE)
    if text is None:
        return Finding("huge pages", "this kernel does not offer them", "note")
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else text.strip()
    if mode == "never":
        remedy = f"echo madvise | sudo tee {HUGE_PAGES_FILE}"
        return Finding("huge pages", "never", "wrong", remedy, {"mode": mode})
    return Finding("huge pages", mode, values={"mode": mode})


def memory_cache() -> Finding:
    """Tell whether the memory of large results waits to be used again, and how much does."""
    asked = os.environ.get("MBPERF_MEMORY_CACHE", "1")
    if asked not in ("0", "1"):
        fact = f"MBPERF_MEMORY_CACHE expects 0 or 1, got {asked!r}: mbperf does not load"
        return Finding("memory cache", fact, "wrong", "unset MBPERF_MEMORY_CACHE")
    enabled, kept, *_, hits, misses = ask_extension("memory_stats")
    values = {"enabled": enabled, "kept_bytes": kept, "hits": hits, "misses": misses}
    if not enabled:
        fact = "off (MBPERF_MEMORY_CACHE=0): every large result clears fresh pages"
        return Finding("memory cache", fact, "note", "unset MBPERF_MEMORY_CACHE", values)
    fact = (
        f"on: {kept / 1e6:.0f} MB kept, {count(hits, 'hit')}, {misses} {'miss' if misses == 1 else 'misses'}"
    )
    return Finding("memory cache", fact, values=values)


def cuda() -> Finding:
    """Tell whether the CUDA kernels can run, or why not; a machine without a GPU is not at fault."""
    torch = torch_module()
    if torch.version.cuda is None:
        return Finding("CUDA", f"not in this torch ({torch.__version__} is built without it)", "note")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return Finding("CUDA", f"torch has it, but: {first_line(error)}", "note")
    name, made = torch.cuda.get_device_name(), cuda_build()
    values = {"device": name, "build": made}
    if not made["built"]:
        fact = f"{name}, but mbperf's CUDA kernels are not built: {made['because']}"
        return Finding("CUDA", fact, "note", f"MBPERF_CUDA=1 {REBUILD}", values)
    return Finding(
        "CUDA", f"{name}; kernels for {made['architectures']} by nvcc {made['nvcc']}", values=values
    )


def count(number: int, thing: str) -> str:
    """Return "1 thread", "2 threads"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")
