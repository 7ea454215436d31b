"""The build: its record and loader, what the per-instruction-set objects may hold, what importing needs."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_objects import object_of, output

import mbperf
from mbperf import build_info, extension

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = {"x86_64": ("baseline", "avx2", "avx512"), "aarch64": ("baseline", "neon")}
HERE = INSTRUCTION_SETS.get(platform.machine(), ("baseline",))


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


@pytest.mark.parametrize(
    ("built_for", "back"), [("2.11.0+cu130", "2.11.0"), ("2.11.0", "2.11.0"), ("2.11.0+cpu", "2.11.0+cpu")]
)
def test_build_for_another_torch_names_both_versions_and_the_command(record, built_for, back):
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": built_for}))
    with pytest.raises(ImportError) as caught:
        extension.load()
    message = str(caught.value)
    assert message.startswith("mbperf: ")
    running, remedy = f"torch {torch.__version__}", f"pip install torch=={back},"
    for part in (f"torch {built_for}", running, remedy, build_info.REBUILD):
        assert part in message


def test_an_installed_package_is_rebuilt_from_its_sdist():
    """Outside a checkout there is nothing for `pip install -e .` to install."""
    code = Path(build_info.__file__).read_text()
    here: dict = {"__file__": "/site-packages/mbperf/build_info.py", "__name__": "build_info"}
    exec(code, here)
    assert here["REBUILD"].endswith("--no-build-isolation --no-binary mbperf mbperf")
    assert build_info.REBUILD == "pip install --no-build-isolation -e ."


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
    assert info["cuda"]["built"] or info["cuda"]["because"]
    assert "-fopenmp" in info["cxx_flags"]
    # A build must run on any machine of its architecture, and NaN and infinity have meanings here.
    assert not {"-march=native", "-ffast-math", "-Ofast"} & set(info["cxx_flags"])


def test_nothing_is_built_with_the_flags_of_python_itself():
    """Else the kernels would be other ones for each Python, and be compiled for each."""
    ninja = ROOT / "build" / f"temp-torch-{torch.__version__}" / "build.ninja"
    if not ninja.exists():
        pytest.skip("this build was not made in the checkout")
    (flags,) = re.findall(r"^cflags = (.*)$", ninja.read_text(), re.MULTILINE)
    assert {flag for flag in shlex.split(flags) if not flag.startswith("-I")} == {"-fPIC", "-c"}


def test_the_build_that_runs_is_the_one_asked_for():
    """Under `make sanitize` the sanitized copy is imported, else the ordinary one."""
    assert build_info.build_info()["sanitize"] == os.environ.get("MBPERF_SANITIZE", "")


@pytest.mark.parametrize(
    ("plant", "environment", "complaint"),
    [
        ("sys.modules['torch'] = None", {}, f"cannot import torch .*{re.escape(build_info.REBUILD)}"),
        ("", {"CXX": "no-such-g++"}, r"no C\+\+ compiler \('no-such-g\+\+' is not on PATH\); install one"),
        ("sysconfig.get_path = lambda name: '/none'", {}, "Python's C headers are missing; install them"),
        ("", {"CXX": "false"}, "false has no OpenMP, without which every loop is serial; install it"),
    ],
    ids=["torch", "compiler", "headers", "openmp"],
)
def test_setup_py_says_in_one_line_what_is_missing(plant, environment, complaint):
    code = f"import runpy, sys, sysconfig; {plant or 'pass'}; sys.argv = ['setup.py', '--version']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "No CUDA runtime is found" not in line]  # torch's
    assert len(lines) == 1, run.stderr
    assert re.fullmatch(f"mbperf: {complaint}.*", lines[0]), run.stderr


# Which extensions are built. One process runs setup.py for every case: importing torch takes seconds.

SETUP_CASES = """
import json, os, runpy, sys, torch

torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False
sys.argv = ["setup.py", "--quiet", "--version"]
answers = {}
for name, (version, environment) in json.load(sys.stdin).items():
    for variable in ("MBPERF_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MBPERF_SANITIZE"):
        os.environ.pop(variable, None)
    os.environ.update(environment)
    torch.version.cuda = version
    sys.modules.pop("torch.utils.cpp_extension", None)
    try:
        made = runpy.run_path("setup.py", run_name="__main__")
        built = [extension.name for extension in made["extensions"]()]
        answers[name] = [made["WHY_NO_CUDA"], built, made["CUDA_ARCHITECTURES"]]
    except SystemExit as complaint:
        answers[name] = str(complaint)
print("\\n" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def setup_answers(tmp_path_factory) -> dict[str, list | str]:
    """The choice of setup.py for a torch with or without CUDA, beside a toolkit of some release or none."""

    def toolkit(release: str) -> str:
        nvcc = tmp_path_factory.mktemp("cuda") / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
        nvcc.chmod(0o755)
        return str(nvcc.parents[1])

    cases = {
        "torch without CUDA": (None, {}),
        "asked for, torch without CUDA": (None, {"MBPERF_CUDA": "1"}),
        "not asked for": ("13.0", {"MBPERF_CUDA": "0", "CUDA_HOME": toolkit("13.0")}),
        "nonsense": ("13.0", {"MBPERF_CUDA": "yes"}),
        "toolkit": ("13.0", {"CUDA_HOME": toolkit("13.0")}),
        "newer toolkit": ("13.0", {"CUDA_HOME": toolkit("13.2"), "TORCH_CUDA_ARCH_LIST": "9.0a"}),
        "older toolkit": ("13.0", {"CUDA_HOME": toolkit("12.8")}),
        "no toolkit": ("13.0", {"CUDA_HOME": "/none"}),
        "asked for, no toolkit": ("13.0", {"CUDA_HOME": "/none", "MBPERF_CUDA": "1"}),
        "sanitized": ("13.0", {"CUDA_HOME": toolkit("13.0"), "MBPERF_SANITIZE": "address"}),
    }
    printed = output(sys.executable, "-c", SETUP_CASES, cwd=ROOT, input=json.dumps(cases))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "because"),
    [
        ("torch without CUDA", "torch .* is built without CUDA"),
        ("not asked for", "MBPERF_CUDA=0"),
        ("older toolkit", "nvcc is CUDA 12.8, torch is built for CUDA 13.0"),
        ("no toolkit", r"no CUDA toolkit \(nvcc\) beside torch's CUDA 13.0; set CUDA_HOME"),
        ("sanitized", "the sanitizers are those of the host compiler"),
    ],
)
def test_without_cuda_the_cpu_extension_is_built_alone(setup_answers, case, because):
    said, extensions, _ = setup_answers[case]
    assert re.fullmatch(because, said)
    assert extensions == ["mbperf._C"]


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("asked for, torch without CUDA", "mbperf: MBPERF_CUDA=1, but torch .* is built without CUDA"),
        ("asked for, no toolkit", r"mbperf: MBPERF_CUDA=1, but no CUDA toolkit \(nvcc\) .*; set CUDA_HOME"),
        ("nonsense", "mbperf: MBPERF_CUDA expects auto, 0 or 1, got 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_is_one_error(setup_answers, case, complaint):
    assert re.fullmatch(complaint, setup_answers[case])


@pytest.mark.parametrize(("case", "architectures"), [("toolkit", "8.0;9.0+PTX"), ("newer toolkit", "9.0a")])
def test_torch_and_toolkit_of_one_major_release_build_both(setup_answers, case, architectures):
    assert setup_answers[case] == ["", ["mbperf._C", "mbperf._C_cuda"], architectures]


def test_a_cuda_extension_that_does_not_load_names_the_command(record, monkeypatch):
    record.write_text(json.dumps({**json.loads(record.read_text()), "cuda": {"built": True}}))
    monkeypatch.delattr(mbperf, "_C_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "mbperf._C_cuda", None)
    with pytest.raises(
        ImportError, match=f"cannot load the CUDA extension .*MBPERF_CUDA=0 {build_info.REBUILD}"
    ):
        extension.load_cuda()


def test_a_record_without_cuda_loads_none(record):
    record.write_text(json.dumps({**json.loads(record.read_text()), "cuda": {"built": False}}))
    assert extension.load_cuda() is None


# The per-instruction-set objects


@pytest.fixture(scope="module", params=["cross_entropy", "cross_entropy/stats", "kl_div", "softcap"])
def row_objects(request, tmp_path_factory) -> dict[str, Path]:
    """The compiled row kernels by instruction set: from the build, or compiled here with its flags."""
    rows = ROOT / "csrc" / "cpu" / request.param
    folder = tmp_path_factory.mktemp("rows")
    return {file.stem: object_of(file, folder) for file in rows.glob("*.cpp") if file.stem in HERE}


def test_one_object_for_each_instruction_set(row_objects):
    assert set(row_objects) == set(HERE)


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


# Another architecture

CROSS = "aarch64-linux-gnu-g++"


def needs_torch(source: Path) -> bool:
    """Return whether a file includes torch's headers, also by way of the project's."""
    rule = output(CROSS, "-std=c++20", "-M", "-MG", f"-I{ROOT / 'csrc'}", source)
    return any(header.startswith(("ATen/", "c10/", "torch/")) for header in rule.split())


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no {CROSS}: apt-get install g++-aarch64-linux-gnu")
def test_kernels_compile_for_aarch64():
    sources = [file for file in (ROOT / "csrc" / "cpu").rglob("*.cpp") if not needs_torch(file)]
    assert {(file.parent.name, file.stem) for file in sources} >= {
        (kernel, name)
        for kernel in ("cross_entropy", "stats", "kl_div", "softcap", "gather")
        for name in ("baseline", "neon")
    }
    # The syntax alone, templates instantiated: code takes a minute, and needs nothing more of the language.
    output(CROSS, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *sources)


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
