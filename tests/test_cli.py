"""The command line starts quickly, and says a missing extra or a bad build in one line."""

import builtins
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mbperf import cli, extras

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )


@pytest.mark.parametrize("name", list(cli.ENTRIES))
def test_every_entry_is_a_command(name):
    """Each place in the table exists, and each command has help."""
    outcome = CliRunner().invoke(cli.main, [name, "--help"])
    assert outcome.exit_code == 0, outcome.output
    assert f"Usage: main {name}" in outcome.output


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from mbperf.cli import main\n"
        "try:\n    main(['--help'], prog_name='mbperf')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'scipy', 'matplotlib', 'pytest', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    outcome = run("-c", code)
    assert outcome.returncode == 0, outcome.stderr
    for name, entry in cli.ENTRIES.items():
        assert name in outcome.stdout
        assert entry.help in " ".join(outcome.stdout.split())


def test_python_m_mbperf_is_the_command():
    outcome = run("-m", "mbperf", "--version")
    assert outcome.stdout == "python -m mbperf, version 0.2.0\n"


def test_import_mbperf_imports_neither_click_nor_torch():
    outcome = run("-c", "import mbperf, sys; assert not {'click', 'torch'} & set(sys.modules)")
    assert outcome.returncode == 0, outcome.stderr


def test_public_names_are_listed_and_unknown_ones_are_refused():
    import mbperf

    assert {"collate", "cross_entropy"} <= set(dir(mbperf))
    with pytest.raises(AttributeError, match="module 'mbperf' has no attribute 'colate'"):
        mbperf.colate  # noqa: B018


def test_unknown_command_is_one_clear_error():
    outcome = CliRunner().invoke(cli.main, ["bnech"])
    assert outcome.exit_code == 2
    assert "No such command 'bnech'" in outcome.output


@pytest.fixture
def absent(monkeypatch):
    """Make a package look as if it had never been installed."""

    def uninstall(package: str) -> None:
        original_import, original_installed = builtins.__import__, extras.is_installed

        def without(name, *args, **kwargs):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return original_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        monkeypatch.setattr(extras, "is_installed", lambda name: name != package and original_installed(name))

    return uninstall


def entry_that_runs(monkeypatch, name: str, extra: str, body) -> None:
    """Plant a subcommand with this body."""
    monkeypatch.setattr(cli, "planted", click.command(name)(body), raising=False)
    monkeypatch.setitem(cli.ENTRIES, name, cli.Entry("mbperf.cli:planted", extra, "Planted."))


def test_missing_extra_while_running_is_one_line(monkeypatch, absent):
    def body():
        import rich.table  # noqa: F401

    entry_that_runs(monkeypatch, "planted", "loader", body)
    absent("rich")
    outcome = CliRunner().invoke(cli.main, ["planted"])
    assert outcome.exit_code == 1
    assert outcome.output == 'Error: mbperf planted needs rich.table; run: pip install "mbperf[loader]"\n'


def test_missing_extra_while_loading_is_one_line(monkeypatch, absent, tmp_path):
    (tmp_path / "planted_room.py").write_text("import psutil\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.ENTRIES, "planted", cli.Entry("planted_room:command", "bench", "Planted."))
    absent("psutil")
    outcome = CliRunner().invoke(cli.main, ["planted"])
    assert outcome.exit_code == 1
    assert outcome.output == 'Error: mbperf planted needs psutil; run: pip install "mbperf[bench]"\n'


def test_a_module_of_the_user_that_is_missing_is_not_called_an_extra(monkeypatch):
    def body():
        raise ModuleNotFoundError("No module named 'my_dataset'", name="my_dataset")

    entry_that_runs(monkeypatch, "planted", "loader", body)
    outcome = CliRunner().invoke(cli.main, ["planted"])
    assert isinstance(outcome.exception, ModuleNotFoundError)
    assert outcome.output == ""


def test_an_installed_package_that_fails_is_not_called_missing(monkeypatch):
    def body():
        raise ImportError("cannot import name 'x' from 'scipy'", name="scipy")

    entry_that_runs(monkeypatch, "planted", "loader", body)
    outcome = CliRunner().invoke(cli.main, ["planted"])
    assert isinstance(outcome.exception, ImportError)
    assert "needs scipy" not in outcome.output


def test_bad_build_is_one_line(monkeypatch):
    def body():
        raise ImportError("mbperf: the C++ extension is not built; run: pip ...")

    entry_that_runs(monkeypatch, "planted", "bench", body)
    outcome = CliRunner().invoke(cli.main, ["planted"])
    assert outcome.exit_code == 1
    assert outcome.output == "Error: the C++ extension is not built; run: pip ...\n"


@pytest.fixture
def pytest_calls(monkeypatch):
    """Record what would be run instead of running it."""
    calls = []

    def call(command, cwd):
        calls.append((command, cwd))
        return 3

    monkeypatch.setattr(cli.subprocess, "call", call)
    return calls


def test_bench_hands_its_arguments_and_status_through(pytest_calls, monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = CliRunner().invoke(cli.main, ["bench", "-k", "collate", "--benchmark-disable"])
    assert outcome.exit_code == 3
    [(command, folder)] = pytest_calls
    assert command[1:] == [
        "-m",
        "pytest",
        "bench/",
        "--benchmark-compare",
        "-k",
        "collate",
        "--benchmark-disable",
    ]
    assert folder == ROOT


def test_bench_finds_the_checkout_of_an_editable_install(pytest_calls, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(cli.main, ["bench"])
    assert pytest_calls[0][1] == ROOT


def test_bench_outside_a_checkout_says_where_it_looked(pytest_calls, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.mbperf, "__file__", str(tmp_path / "site-packages/mbperf/__init__.py"))
    outcome = CliRunner().invoke(cli.main, ["bench"])
    assert outcome.exit_code == 1
    assert f"no bench/ in {tmp_path} or {tmp_path / 'site-packages'}" in outcome.output
    assert not pytest_calls


def test_bench_without_its_extra_is_one_line(pytest_calls, monkeypatch):
    monkeypatch.setattr(extras, "missing", lambda extra: ["pytest-benchmark"])
    outcome = CliRunner().invoke(cli.main, ["bench"])
    assert outcome.exit_code == 1
    assert outcome.output == 'Error: mbperf bench needs pytest-benchmark; run: pip install "mbperf[bench]"\n'
    assert not pytest_calls


def test_extras_are_read_from_the_metadata():
    assert "pytest-benchmark" in extras.packages("bench")
    assert "pooch" in extras.packages("lesson")
    assert "torch" not in extras.packages("bench")
    assert extras.packages("no-such-extra") == []
    assert extras.extra_that_brings("pytest_benchmark.plugin") == "bench"
    assert extras.extra_that_brings("rich", prefer="loader") == "loader"
    assert extras.extra_that_brings("my_dataset") is None
    assert extras.is_installed("pytest")
    assert not extras.is_installed("mbperf-no-such-package")
