"""Every fault the doctor looks for is planted: the doctor must exit with 1 and name the remedy."""

import json
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from mbperf import build_info, extras, processors
from mbperf.doctor import display, examination, heap, processor, software
from mbperf.doctor.command import doctor
from mbperf.doctor.finding import Finding

HEALTHY_BUILD = {
    "torch": "2.13.0",
    "compiler": "g++ 12",
    "cxx_flags": ["-fopenmp"],
    "sanitize": "",
    "git_revision": "abc",
}


def timings(default: float, hugetlb: float, recycled: float) -> dict[str, heap.Timing]:
    """What three settings of the heap took, in seven rounds each."""
    seconds = {heap.AS_IT_IS: default, heap.HUGE: hugetlb, heap.RECYCLED: recycled}
    return {name: heap.Timing([s] * 7, [1000.0] * 7) for name, s in seconds.items()}


class Machine:
    """A healthy machine and installation, of which a test then breaks one part."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.patch = monkeypatch
        self.torch = types.SimpleNamespace(
            __version__="2.13.0",
            version=types.SimpleNamespace(cuda=None),
            get_num_threads=lambda: 4,
        )
        self.extension = types.SimpleNamespace(
            instruction_set=lambda: "avx512",
            instruction_sets=lambda: ["avx512", "avx2", "baseline"],
            parallel_threads=lambda: 4,
            memory_stats=lambda: (True, 64_000_000, 0, 64_000_000, 7, 1),
        )
        self.heap = timings(default=14e-3, hugetlb=14e-3, recycled=14e-3)
        self.build_file = folder / "_build_info.json"
        self.sources = folder / "csrc"
        self.sources.mkdir()
        self.huge_pages = folder / "enabled"
        self.maps = folder / "maps"
        self.write_build()
        self.huge_pages.write_text("always [madvise] never\n")
        self.maps.write_text("7f00-7f01 r-xp 0000 08:01 12 /venv/torch/lib/libgomp.so.1\n")
        monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
        monkeypatch.delenv("MBPERF_MEMORY_CACHE", raising=False)
        monkeypatch.setattr(software, "torch_module", lambda: self.torch)
        monkeypatch.setattr(processor, "torch_module", lambda: self.torch)
        monkeypatch.setattr(heap, "torch_module", lambda: self.torch)
        monkeypatch.setattr(heap, "has_states", lambda: True)
        monkeypatch.setattr(heap, "available_bytes", lambda: 16 << 30)
        monkeypatch.setattr(heap, "measured", lambda rows: self.heap)
        monkeypatch.setattr(software, "extension_module", lambda: self.extension)
        monkeypatch.setattr(software, "SOURCES", self.sources)
        monkeypatch.setattr(build_info, "BUILD_INFO_FILE", self.build_file)
        monkeypatch.setattr(processor, "HUGE_PAGES_FILE", self.huge_pages)
        monkeypatch.setattr(processor, "MAPS_FILE", self.maps)
        monkeypatch.setattr(processors, "affinity", lambda: 4)
        monkeypatch.setattr(processors, "quota", lambda: None)
        monkeypatch.setattr(extras, "missing", lambda extra: [])
        monkeypatch.setenv("MBPERF_DATA", str(folder / "data"))

    def write_build(self, **changes: object) -> None:
        self.build_file.write_text(json.dumps({**HEALTHY_BUILD, **changes}))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def examine():
    """Return the exit status of `mbperf doctor --json` and its findings by subject."""
    outcome = CliRunner().invoke(doctor, ["--json"])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    findings = json.loads(outcome.output)["findings"]
    return outcome.exit_code, {finding["subject"]: finding for finding in findings}


def assert_wrong(subject: str, fact: str, remedy: str) -> None:
    """Check that this subject alone is wrong, in JSON and in text."""
    status, findings = examine()
    assert status == 1
    assert [name for name, finding in findings.items() if finding["state"] == "wrong"] == [subject]
    assert fact in findings[subject]["fact"]
    assert remedy in findings[subject]["remedy"]
    text = CliRunner().invoke(doctor, [])
    assert text.exit_code == 1
    assert f"remedy: {findings[subject]['remedy']}" in text.output
    assert text.output.rstrip().endswith(f"1 wrong: {subject}.")


def assert_noted(subject: str, fact: str, remedy: str = "") -> None:
    """Check that this subject is noted, and nothing is wrong."""
    status, findings = examine()
    assert status == 0
    assert findings[subject]["state"] == "note"
    assert fact in findings[subject]["fact"]
    assert remedy in findings[subject]["remedy"]


def test_healthy_machine_exits_with_0(machine):
    status, findings = examine()
    assert status == 0
    assert not [finding for finding in findings.values() if finding["state"] == "wrong"]
    assert CliRunner().invoke(doctor, []).output.rstrip().endswith("Nothing is wrong.")


def test_torch_that_does_not_import(machine, monkeypatch):
    def broken():
        raise OSError("libtorch_cpu.so: cannot open shared object file\nsecond line")

    monkeypatch.setattr(software, "torch_module", broken)
    monkeypatch.setattr(processor, "torch_module", broken)
    monkeypatch.setattr(heap, "torch_module", broken)
    assert_wrong("torch", "libtorch_cpu.so: cannot open shared object file", "pip install torch")


def test_extension_not_built(machine):
    machine.build_file.unlink()
    assert_wrong("extension", "not built", build_info.REBUILD)


def test_extension_built_for_another_torch(machine, monkeypatch):
    def mismatch():
        raise ImportError("mbperf: the C++ extension was built for torch 2.11, but torch 2.13 is running")

    monkeypatch.setattr(software, "extension_module", mismatch)
    assert_wrong("extension", "built for torch 2.11, but torch 2.13", build_info.REBUILD)


def test_build_record_damaged(machine):
    machine.build_file.write_text("{")
    assert_wrong("extension", "damaged", build_info.REBUILD)


def test_extension_built_with_sanitizers(machine):
    machine.write_build(sanitize="address")
    assert_wrong("extension", "sanitizers (address)", build_info.REBUILD)


def test_extension_older_than_its_sources(machine):
    built = machine.build_file.stat().st_mtime
    for name in ("a.cpp", "b.h", "c.cpp", "d.cpp", "old.cpp"):
        (machine.sources / name).touch()
        os.utime(machine.sources / name, (built, built + (-60 if name == "old.cpp" else 60)))
    assert_wrong("extension", "a.cpp, b.h, c.cpp and 1 more changed since", build_info.REBUILD)


@pytest.mark.parametrize("built", [False, True])
def test_kernels_for_gpus_count_where_they_are_built(machine, built):
    machine.write_build(cuda={"built": built})
    later = machine.build_file.stat().st_mtime + 60
    (machine.sources / "cuda" / "shim").mkdir(parents=True)
    for name in ("rows.cu", "shim/threads.h"):
        (machine.sources / "cuda" / name).touch()
        os.utime(machine.sources / "cuda" / name, (later, later))
    if built:
        assert_wrong("extension", "rows.cu, threads.h changed since", build_info.REBUILD)
    else:
        assert examine()[1]["extension"]["state"] == "ok"


def test_extension_without_the_functions_that_the_doctor_asks(machine):
    del machine.extension.parallel_threads
    assert_noted("OpenMP", "cannot tell: the extension has no parallel_threads()")


def test_instruction_set_held_back_by_the_environment(machine, monkeypatch):
    machine.extension.instruction_set = lambda: "avx2"
    machine.extension.instruction_sets = lambda: ["avx2", "baseline"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert_noted("instruction set", "ATEN_CPU_CAPABILITY=avx2", "unset ATEN_CPU_CAPABILITY")


def test_the_lowest_level_of_torch_on_arm_holds_nothing_back(machine, monkeypatch):
    machine.extension.instruction_set = lambda: "neon"
    machine.extension.instruction_sets = lambda: ["neon", "baseline"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    _, findings = examine()
    assert findings["instruction set"]["state"] == "ok"


def test_environment_that_asks_for_the_best_holds_nothing_back(machine, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    _, findings = examine()
    assert findings["instruction set"]["state"] == "ok"


def test_best_instruction_set_unused(machine):
    machine.extension.instruction_set = lambda: "baseline"
    assert_wrong("instruction set", "baseline, of avx512, avx2, baseline", build_info.REBUILD)


def test_openmp_silently_serial(machine):
    machine.extension.parallel_threads = lambda: 1
    assert_wrong("OpenMP", "ran on 1 thread, torch has 4", "-fopenmp")


def test_one_thread_is_no_fault_of_openmp(machine):
    machine.extension.parallel_threads = lambda: 1
    machine.torch.get_num_threads = lambda: 1
    _, findings = examine()
    assert findings["OpenMP"]["state"] == "ok"


def test_two_openmp_runtimes(machine):
    machine.maps.write_text(
        "1-2 r-xp 0 0:0 1 /a/libgomp.so.1\n3-4 r-xp 0 0:0 2 /b/libiomp5.so\n3-4 rw-p 0 0:0 0\n"
    )
    assert_noted("OpenMP", "2 runtimes in one process (/a/libgomp.so.1, /b/libiomp5.so)", "LD_PRELOAD")


def test_more_threads_than_the_quota_allows(machine, monkeypatch):
    monkeypatch.setattr(processors, "quota", lambda: 1.5)
    assert_wrong("threads", "4 threads on 2 usable processors (a quota of 1.5 out of 4)", "OMP_NUM_THREADS=2")


def test_fewer_threads_than_processors(machine):
    machine.torch.get_num_threads = machine.extension.parallel_threads = lambda: 1
    assert_noted("threads", "1 thread on 4 usable processors", "OMP_NUM_THREADS=4")


def test_huge_pages_forbidden(machine):
    machine.huge_pages.write_text("always madvise [never]\n")
    assert_wrong("huge pages", "never", f"echo madvise | sudo tee {machine.huge_pages}")


def test_huge_pages_unknown_to_the_kernel(machine):
    machine.huge_pages.unlink()
    assert_noted("huge pages", "does not offer")


def test_memory_cache_counts(machine):
    found = examine()[1]["memory cache"]
    assert found["fact"] == "on: 64 MB kept, 7 hits, 1 miss"
    assert found["values"] == {"enabled": True, "kept_bytes": 64_000_000, "hits": 7, "misses": 1}


def test_memory_cache_off(machine):
    machine.extension.memory_stats = lambda: (False, 0, 0, 0, 0, 3)
    assert_noted("memory cache", "off (MBPERF_MEMORY_CACHE=0)", "unset MBPERF_MEMORY_CACHE")


def test_memory_cache_asked_for_in_unknown_words(machine, monkeypatch):
    monkeypatch.setenv("MBPERF_MEMORY_CACHE", "off")
    assert_wrong("memory cache", "expects 0 or 1, got 'off'", "unset MBPERF_MEMORY_CACHE")


def test_an_extension_that_refuses_its_environment_stops_no_other_check(machine):
    def refuse():
        raise ValueError("mbperf: MBPERF_MEMORY_CACHE expects 0 or 1, got 'off'")

    machine.extension.memory_stats = refuse
    assert_noted("memory cache", "cannot tell: mbperf: MBPERF_MEMORY_CACHE expects 0 or 1")


def test_a_heap_that_costs_nothing_is_told_with_its_figures(machine):
    found = examine()[1]["heap"]
    assert found["state"] == "ok"
    assert found["remedy"] == ""
    assert found["fact"] == (
        "F.cross_entropy forward and backward at 512x32000: 14.0 ms with 1,000 page faults; "
        "hugetlb 14.0 ms with 1,000 page faults (1.0x); recycled 14.0 ms with 1,000 page faults (1.0x)"
    )
    assert found["values"]["recycled"] == {"time_s": 14e-3, "page_faults": 1000.0}


def test_a_heap_that_gains_by_both_settings(machine):
    machine.heap = timings(default=60e-3, hugetlb=26e-3, recycled=14e-3)
    assert_noted(
        "heap",
        "hugetlb 26.0 ms with 1,000 page faults (2.3x); recycled 14.0 ms with 1,000 page faults (4.3x)",
        "(the process then gives no memory back until it ends), "
        "or export GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
    )


def test_a_heap_that_gains_by_huge_pages_alone(machine):
    machine.heap = timings(default=60e-3, hugetlb=26e-3, recycled=59e-3)
    assert_noted("heap", "recycled 59.0 ms")
    assert examine()[1]["heap"]["remedy"] == "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


def test_a_gain_of_the_median_alone_is_not_clear():
    base = heap.Timing([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0], [0.0] * 7)
    assert not heap.Timing([1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], [0.0] * 7).gains_clearly(base)
    assert heap.Timing([1.5, 1.5, 1.5, 1.5, 0.9, 1.5, 1.5], [0.0] * 7).gains_clearly(base)


def test_a_heap_that_is_not_glibcs(machine, monkeypatch):
    monkeypatch.setattr(heap, "has_states", lambda: False)
    found = examine()[1]["heap"]
    assert (found["state"], found["remedy"]) == ("ok", "")
    assert "do not apply" in found["fact"]


@pytest.mark.parametrize(("free_bytes", "told"), [(2 << 30, "512x32000"), (300 << 20, "64x32000")])
def test_a_heap_is_measured_as_large_as_memory_allows(machine, monkeypatch, free_bytes, told):
    monkeypatch.setattr(heap, "available_bytes", lambda: free_bytes)
    assert told in examine()[1]["heap"]["fact"]


def test_a_heap_is_not_measured_where_memory_is_short(machine, monkeypatch):
    monkeypatch.setattr(heap, "available_bytes", lambda: 50 << 20)
    monkeypatch.setattr(heap, "measured", lambda rows: pytest.fail("too little memory"))
    assert_noted("heap", "too little memory is free")


@pytest.mark.skipif(not heap.has_states(), reason="the settings are glibc's")
def test_three_processes_take_turns_and_recycled_pages_cost_few_faults(monkeypatch):
    """272 rows take 35 MB, more than the 32 MiB from which glibc always maps a block afresh."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = heap.measured(rows=272)
    assert all(min(timing.seconds) > 0 for timing in found.values())
    assert len(found[heap.RECYCLED].seconds) == heap.ROUNDS
    faults = {name: statistics.median(timing.page_faults) for name, timing in found.items()}
    assert faults[heap.RECYCLED] < faults[heap.AS_IT_IS] / 4


@pytest.mark.skipif(not heap.has_states(), reason="the settings are glibc's")
def test_a_process_of_the_heaps_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = examination.result("heap", heap.heap)
    assert (found.state, found.fact) == ("note", "cannot tell: a process that measures ended with code 1")


def test_missing_extra(machine, monkeypatch):
    monkeypatch.setattr(extras, "missing", lambda extra: ["scipy"] if extra == "loader" else [])
    assert_noted("extra loader", "not installed: scipy", 'pip install "mbperf[loader]"')


def test_mnist_not_in_the_cache(machine, tmp_path):
    assert_noted("lesson data", f"MNIST is not in {tmp_path / 'data'}", "get_data('mnist')")


def test_damaged_mnist_in_the_cache(machine, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (folder / name).write_bytes(b"\0\0\x08\x03\0\0")
    assert_wrong("lesson data", "train-images-idx3-ubyte", f"rm -r {folder}")


def test_torch_without_cuda(machine):
    assert_noted("CUDA", "2.13.0 is built without it")


def test_cuda_that_does_not_start(machine):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore lines")

    machine.torch.version.cuda = "13.0"
    machine.torch.cuda = types.SimpleNamespace(init=init)
    assert_noted("CUDA", "Found no NVIDIA driver on your system.")


def with_gpu(machine):
    machine.torch.version.cuda = "13.0"
    machine.torch.cuda = types.SimpleNamespace(init=lambda: None, get_device_name=lambda: "NVIDIA H200")


def test_cuda_without_kernels(machine):
    with_gpu(machine)
    machine.write_build(cuda={"built": False, "because": "no CUDA toolkit"})
    assert_noted("CUDA", "NVIDIA H200, but mbperf's CUDA kernels are not built: no CUDA toolkit")


def test_a_build_from_before_there_were_cuda_kernels(machine):
    with_gpu(machine)
    assert_noted("CUDA", "the build is older than its CUDA kernels")


def test_cuda_with_kernels(machine):
    with_gpu(machine)
    machine.write_build(cuda={"built": True, "architectures": "8.0;9.0+PTX", "nvcc": "13.0"})
    finding = processor.cuda()
    assert finding.state == "ok"
    assert finding.fact == "NVIDIA H200; kernels for 8.0;9.0+PTX by nvcc 13.0"


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """An empty /sys/fs/cgroup and /proc/self/cgroup."""
    monkeypatch.setattr(processors, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "CGROUP_FILE", tmp_path / "self")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def test_quota_of_a_parent_group_binds(control_groups):
    (control_groups / "self").write_text("0::/slice/own\n")
    write_group(control_groups / "cgroup/slice/own", cpu__max="max 100000\n")
    write_group(control_groups / "cgroup/slice", cpu__max="150000 100000\n")
    assert processors.quota() == 1.5


def test_quota_of_a_container_stands_at_the_root(control_groups):
    (control_groups / "self").write_text("0::/docker/hidden\n")
    write_group(control_groups / "cgroup", cpu__max="200000 100000\n")
    assert processors.quota() == 2


def test_quota_of_control_groups_version_1(control_groups):
    (control_groups / "self").write_text("5:memory:/x\n4:cpu,cpuacct:/x\n")
    folder = control_groups / "cgroup/cpu,cpuacct/x"
    write_group(folder, cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert processors.quota() == 0.5
    write_group(folder, cpu__cfs_quota_us="-1\n")
    assert processors.quota() is None


def test_no_control_groups_no_quota(control_groups, monkeypatch):
    monkeypatch.setattr(processors, "affinity", lambda: 3)
    assert processors.quota() is None
    assert processors.usable() == 3


def test_usable_rounds_a_quota_up_and_never_reaches_0(monkeypatch):
    monkeypatch.setattr(processors, "affinity", lambda: 8)
    for quota, expected in ((0.2, 1), (1.5, 2), (8.0, 8), (20.0, 8)):
        monkeypatch.setattr(processors, "quota", lambda quota=quota: quota)
        assert processors.usable() == expected


def test_every_wrong_finding_has_a_remedy_in_colour_too(capsys):
    finding = Finding("threads", "too many", "wrong", "export OMP_NUM_THREADS=2")
    display.show_rich([finding, Finding("torch", "2.13")])
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "remedy: export OMP_NUM_THREADS=2" in shown
    assert "1 wrong: threads." in shown


def test_text_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(extras, "is_installed", lambda package: False)
    monkeypatch.setattr(display, "show_rich", lambda findings: pytest.fail("rich is not installed"))
    display.show([Finding("torch", "2.13")])
    assert capsys.readouterr().out == "ok     torch            2.13\nNothing is wrong.\n"


def test_the_extension_of_this_checkout_is_healthy():
    """No plants: the true build, its instruction sets and its parallel loop."""
    findings = {finding.subject: finding for finding in examination.examine()}
    for subject in ("torch", "extension", "OpenMP"):
        assert findings[subject].state == "ok", findings[subject]
    assert findings["instruction set"].state != "wrong"


def test_doctor_needs_no_torch_to_start():
    """A torch that cannot be imported is a finding, not a traceback."""
    code = "import sys; sys.modules['torch'] = None; from mbperf.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1, run.stderr
    assert "WRONG  torch" in run.stdout
    assert run.stderr == ""
