"""make check-cuda without nvcc, and with stand-ins for it that fail or spill: its words and its exit code."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPILLING = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
as -o "$2" /dev/null
cat <<'REPORT'
ptxas info    : Compiling entry function '_ZN6mbperf4cuda11roof_kernelENS0_4RoofE' for 'sm_90a'
ptxas info    : Function properties for _ZN6mbperf4cuda11roof_kernelENS0_4RoofE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
REPORT
"""


HOST_FILE_FAILS = """#!/bin/sh
case "$*" in *kl_div.cpp*) echo this is no host code >&2; exit 2 ;; esac
while [ "$1" != -o ]; do shift; done
as -o "$2" /dev/null
"""
LAUNCH_MISSES = """#!/bin/sh
case "$*" in *gather.cpp*) code=".quad _ZN6mbperf4cuda9forgottenEv" ;; esac
while [ "$1" != -o ]; do shift; done
echo "$code" | as -o "$2"
"""


def check(home, nvcc=""):
    """Run it with a toolkit of our own, whose nvcc is this script or is not there."""
    if nvcc:
        (home / "bin").mkdir()
        (home / "bin" / "nvcc").write_text(nvcc)
        (home / "bin" / "nvcc").chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(home), "PATH": without_nvcc(os.environ["PATH"])}
    for room in ("csrc", "tools"):  # so that its objects do not replace those of the real check
        (home / room).symlink_to(ROOT / room)
    return subprocess.run(
        [sys.executable, home / "tools" / "check_kernels.py"],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


def without_nvcc(path):
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if not Path(folder, "nvcc").exists())


def test_without_nvcc_it_says_so_and_passes(tmp_path):
    run = check(tmp_path)
    assert run.returncode == 0
    assert run.stdout == (
        f"check-cuda: skipped: no nvcc in CUDA_HOME={tmp_path}; no CUDA kernel was compiled or checked\n"
    )


def test_a_file_that_does_not_compile_is_named_with_the_compilers_words(tmp_path):
    run = check(tmp_path, "#!/bin/sh\necho this is no kernel >&2\nexit 2\n")
    assert run.returncode == 1
    assert re.search(r"check-cuda: \w+/\w+\.cu does not compile:\nthis is no kernel", run.stderr), run.stderr


def test_host_code_that_does_not_compile_is_named_with_the_compilers_words(tmp_path):
    run = check(tmp_path, HOST_FILE_FAILS)
    assert run.returncode == 1
    assert "check-cuda: kl_div/kl_div.cpp does not compile:\nthis is no host code" in run.stderr


def test_a_launch_that_no_file_defines_is_a_fault(tmp_path):
    run = check(tmp_path, LAUNCH_MISSES)
    assert run.returncode == 1
    assert "no file defines mbperf::cuda::forgotten()" in run.stderr


def test_spills_and_missing_machine_code_are_faults(tmp_path):
    run = check(tmp_path, SPILLING)
    assert run.returncode == 1
    assert "roof_kernel spills 20 bytes on sm_90a" in run.stderr
    assert "roof/kernels.o lacks sm_80" in run.stderr
    assert "no file compiles held_rows_kernel" in run.stderr
    assert re.search(r"roof_kernel +- +255! 20 B", run.stdout), run.stdout
