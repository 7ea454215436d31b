"""The build: its record and loader, what the per-instruction-set objects may hold, what importing needs."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mbperf
from mbperf import build_info, extension

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "csrc" / "cpu"


def output(*command: str | Path, **settings) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, **settings).stdout


# The record and the loader


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The build record as a file of its own, to be spoilt."""
    file = tmp_path / "_build_info.json"
    file.write_text(build_info.BUILD_INFO_FILE.read_text())
    monkeypatch.setattr(build_info, "BUILD_INFO_FILE", file)
    return file


def test_load_returns_the_extension(record):
    assert extension.load() is extension._C


def test_build_for_another_torch_names_both_versions_and_the_command(record):
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.11.0+cu130"}))
    with pytest.raises(ImportError) as caught:
        extension.load()
    message = str(caught.value)
    assert message.startswith("mbperf: ")
    for part in ("torch 2.11.0+cu130", f"torch {torch.__version__}", build_info.REBUILD):
        assert part in message


def test_missing_build_names_the_command(record):
    record.unlink()
    with pytest.raises(ImportError, match=f"^mbperf: .*not built; run: {re.escape(build_info.REBUILD)}$"):
        extension.load()


def test_damaged_record_names_the_command(record):
    record.write_text('{"torch": ')
    with pytest.raises(ImportError, match=f"damaged .*rebuild with: {re.escape(build_info.REBUILD)}"):
        extension.load()


def test_extension_that_does_not_load_names_the_command(record, monkeypatch):
    monkeypatch.delattr(mbperf, "_C")
    monkeypatch.setitem(sys.modules, "mbperf._C", None)
    with pytest.raises(ImportError, match=f"cannot load .*rebuild with: {re.escape(build_info.REBUILD)}"):
        extension.load()


def test_record_tells_what_the_build_was_made_with():
    info = build_info.build_info()
    assert info["torch"] == torch.__version__
    assert info["torch_cuda"] == torch.version.cuda
    assert info["python"] == platform.python_version()
    assert info["compiler"]
    assert "-fopenmp" in info["cxx_flags"]
    # A build must run on any machine of its architecture, and NaN and infinity have meanings here.
    assert not {"-march=native", "-ffast-math", "-Ofast"} & set(info["cxx_flags"])


def test_the_build_that_runs_is_the_one_asked_for():
    """Under `make sanitize` the sanitized copy is imported, else the ordinary one."""
    assert build_info.build_info()["sanitize"] == os.environ.get("MBPERF_SANITIZE", "")


@pytest.mark.parametrize(
    ("plant", "environment", "complaint"),
    [
        ("sys.modules['torch'] = None", {}, f"cannot import torch .*{re.escape(build_info.REBUILD)}"),
        ("", {"CXX": "no-such-g++"}, r"no C\+\+ compiler \('no-such-g\+\+' is not on PATH\); install one"),
        ("sysconfig.get_path = lambda name: '/none'", {}, "Python's C headers are missing; install them"),
    ],
    ids=["torch", "compiler", "headers"],
)
def test_setup_py_says_in_one_line_what_is_missing(plant, environment, complaint):
    code = f"import runpy, sys, sysconfig; {plant or 'pass'}; sys.argv = ['setup.py', '--version']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1
    assert re.fullmatch(f"mbperf: {complaint}.*\n", run.stderr), run.stderr


# The per-instruction-set objects


@pytest.fixture(scope="module")
def row_objects(tmp_path_factory) -> dict[str, Path]:
    """The compiled row kernels by instruction set: from the build, or compiled here with its flags."""
    sources = sorted(ROWS.glob("rows_*.cpp"))
    newest = max(file.stat().st_mtime for file in (*sources, *ROWS.glob("*.h")))
    built = ROOT / "build" / f"temp-torch-{torch.__version__}" / "csrc" / "cpu"
    folder = tmp_path_factory.mktemp("rows")
    objects = {}
    for source in sources:
        kept = built / f"{source.stem}.o"
        fresh = kept.exists() and kept.stat().st_mtime > newest
        objects[source.stem.removeprefix("rows_")] = kept if fresh else compiled(source, folder)
    return objects


def compiled(source: Path, folder: Path) -> Path:
    """Compile a file of row kernels without torch's headers, with the flags on record."""
    made = folder / f"{source.stem}.o"
    flags = build_info.build_info()["cxx_flags"]
    output(
        os.environ.get("CXX", "g++"),
        *flags,
        "-std=c++20",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        "-c",
        source,
        "-o",
        made,
    )
    return made


def test_one_object_for_each_instruction_set(row_objects):
    assert set(row_objects) == {"baseline", "avx2", "avx512"}


def test_row_objects_define_nothing_that_could_be_merged(row_objects):
    """A weak symbol compiled for AVX-512 may replace the baseline's: an illegal instruction elsewhere."""
    for name, file in row_objects.items():
        defined = [
            line.split(maxsplit=2)[1:] for line in output("nm", "-C", "--defined-only", file).splitlines()
        ]
        assert defined
        weak = [symbol for kind, symbol in defined if kind in "WVwvu"]
        assert not weak, f"{name}: {weak}"
        shared = [symbol for kind, symbol in defined if kind.isupper()]
        assert len(shared) == 1, f"{name} should define its table and nothing else: {shared}"


def test_row_objects_use_neither_torch_nor_the_standard_library(row_objects):
    for name, file in row_objects.items():
        needed = output("nm", "-C", "--undefined-only", file)
        assert "::" not in needed, f"{name}: {needed}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vector registers of x86-64")
def test_wide_registers_appear_only_where_they_belong(row_objects):
    def uses(register: str) -> set[str]:
        return {name for name, file in row_objects.items() if f"%{register}" in output("objdump", "-d", file)}

    assert uses("zmm") == {"avx512"}
    assert uses("ymm") == {"avx2", "avx512"}


# What importing needs

BLOCK_OTHERS = """
import sys

class OnlyTorch:
    '''Refuse to mbperf every third-party module but torch and numpy; torch may have its own.'''

    allowed = set(sys.stdlib_module_names) | {"mbperf", "torch", "numpy"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed and self.asked_by_mbperf():
            raise ModuleNotFoundError(f"refused: {name}", name=name)

    def asked_by_mbperf(self):
        frame = sys._getframe(2)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mbperf"

sys.meta_path.insert(0, OnlyTorch())
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )


def test_public_names_need_torch_alone():
    run = run_python(BLOCK_OTHERS + "import mbperf; from mbperf import cross_entropy, collate")
    assert run.returncode == 0, run.stderr


def test_the_refusal_above_refuses():
    run = run_python(BLOCK_OTHERS + "import mbperf.cli")
    assert "refused: click" in run.stderr
