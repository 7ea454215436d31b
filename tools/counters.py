"""Instruction counts of the CPU kernels under callgrind, against those checked in: `make counters`.

Counts do not depend on load, clock or cache, so a shared machine can be trusted with them. valgrind knows no
AVX-512, so they are of the AVX2 path. `make counters ARGS=--refresh` rewrites them.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbperf.build_info import build_info

SOURCES = ("csrc/counters/cross_entropy.cpp", "csrc/cpu/cross_entropy/avx2.cpp")
EXIT_COUNTERS = 13  # 11 and 12 are those of `pytest --mbperf-gate`
EXPECTED = Path("csrc/counters/expected.json")
BUILD = Path("build/counters")
# Beyond this a change is not chance (there is none) but worth a look; below it, compilers' patch releases.
MARGIN = 0.03
COLLECTED = "*counted*"


def compile_driver(root: Path) -> Path:
    """Compile the driver with the extension's own flags; return the program."""
    folder = root / BUILD
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "cross_entropy"
    flags = [flag for flag in build_info()["cxx_flags"] if not flag.startswith("-fvisibility")]
    sources = [str(root / source) for source in SOURCES]
    command = ["g++", "-std=c++20", *flags, f"-I{root / 'csrc'}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def count(program: Path) -> dict[str, int]:
    """Return the instructions each case of the driver executes in its kernel."""
    cases = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {case: _count_one(program, case) for case in cases}


def _count_one(program: Path, case: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--toggle-collect={COLLECTED}",
            f"--callgrind-out-file={out}",
        ]
        done = subprocess.run([*command, str(program), case], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"counters: {case} failed under valgrind:\n{done.stderr}")
        return total(out.read_text())


def total(callgrind_out: str) -> int:
    """Return the instructions counted in a callgrind file.

    >>> total("events: Ir\\nsummary: 120\\n")
    120

    Raises:
        ValueError: nothing was counted, so the toggle named no function that ran.
    """
    match = re.search(r"^(?:summary|totals): (\d+)", callgrind_out, re.MULTILINE)
    if match is None or match[1] == "0":
        raise ValueError("counters: callgrind counted nothing; --toggle-collect matched no function")
    return int(match[1])


def judge(counted: Mapping[str, int], expected: Mapping[str, int], margin: float = MARGIN) -> list[str]:
    """Return a message for every case that is missing, new, slower or faster than checked in.

    >>> judge({"a": 120, "b": 100}, {"a": 100, "c": 5})
    ['a: 120 instructions, 20.0% more than the 100 saved', 'c: no longer counted', 'b: not saved yet']
    """
    messages = []
    for case, before in expected.items():
        if case not in counted:
            messages.append(f"{case}: no longer counted")
            continue
        change = counted[case] / before - 1
        if abs(change) > margin:
            direction = "more" if change > 0 else "fewer"
            messages.append(
                f"{case}: {counted[case]} instructions, {abs(change):.1%} {direction} than the {before} saved"
            )
    return messages + [f"{case}: not saved yet" for case in counted if case not in expected]


def compiler() -> str:
    """Return the first line of the compiler's version: counts of another are not comparable."""
    return subprocess.run(
        ["g++", "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and compare with or rewrite what is checked in."""
    parser = argparse.ArgumentParser(prog="python tools/counters.py", description=__doc__)
    parser.add_argument("--refresh", action="store_true", help="write the counts instead of judging them")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout")
    args = parser.parse_args(arguments)
    if missing := [tool for tool in ("valgrind", "g++") if shutil.which(tool) is None]:
        print(
            f"counters: skipped: no {' and no '.join(missing)}; "
            f"install, e.g. apt-get install {' '.join(missing)}"
        )
        return 0
    counted = count(compile_driver(args.root))
    file = args.root / EXPECTED
    if args.refresh:
        file.write_text(json.dumps({"compiler": compiler(), "instructions": counted}, indent=2) + "\n")
        print(f"counters: {len(counted)} counts written to {file}")
        return 0
    return _verdict(counted, json.loads(file.read_text()))


def _verdict(counted: Mapping[str, int], saved: Mapping[str, Any]) -> int:
    for case, instructions in counted.items():
        print(f"{case:<28} {instructions:>12,}  {_per_logit(case, instructions)}")
    messages = judge(counted, saved["instructions"])
    for message in messages:
        print(f"counters: {message}")
    if messages and saved["compiler"] != compiler():
        print(f"counters: taken with another compiler ({saved['compiler']}), so they only inform")
        return 0
    if messages:
        print("counters: if this is meant, run: make counters ARGS=--refresh")
    return EXIT_COUNTERS if messages else 0


def _per_logit(case: str, instructions: int) -> str:
    """Instructions per logit, from the sizes in the case's name."""
    logits = 1
    for size in case.split()[0].split("x"):
        logits *= int(size)
    return f"{instructions / logits:.2f} a logit"


if __name__ == "__main__":
    sys.exit(main())
