"""A git repository that looks like a checkout of mbperf and costs nothing: torch and clock are made up."""

import subprocess
import textwrap
from pathlib import Path

FILES = {
    "pyproject.toml": """
        [project.entry-points.pytest11]
        mbperf = "mbperf.old_plugin"

        [tool.pytest.ini_options]
        python_files = ["bench_*.py"]
        """,
    ".gitignore": "mbperf/_C*\nmbperf/_build_info.json\n__pycache__\n",
    "torch.py": """
        __version__ = "0"
        get_num_threads = lambda: 1
        set_num_threads = manual_seed = lambda number: None
        """,
    "setup.py": """
        import pathlib, sys
        text = pathlib.Path("csrc/a.cpp").read_text()
        if "nonsense" in text:
            sys.exit("compiling\\na.cpp:3:1: error: 'nonsense' does not name a type\\nninja: stopped")
        pathlib.Path("mbperf/_C.toy.so").write_text(text)
        pathlib.Path("mbperf/_build_info.json").write_text("built here")
        """,
    "csrc/a.cpp": "int a;\n",
    "mbperf/__init__.py": "",
    "mbperf/old_plugin.py": """
        import pytest

        def pytest_configure(config):
            config.addinivalue_line("markers", "race(groups): as in mbperf")

        class Row:
            def __init__(self, group):
                self.group = group

        def pytest_generate_tests(metafunc):
            (groups,) = metafunc.definition.get_closest_marker("race").args
            rows = [pytest.param(Row(group), id=group.name) for group in groups]
            metafunc.parametrize("race", rows, indirect=True)

        @pytest.fixture
        def race(request):
            return request.param
        """,
    "mbperf/groups.py": """
        class Group:
            subject = "mine"

            def __init__(self, name, seconds, wrong=None, make_inputs=tuple, call=lambda: None):
                self.name, self.wrong, self.make_inputs = name, wrong, make_inputs
                self.contenders = {"mine": call}
                self.timer = lambda call, n: (call(), n * seconds)[1]

        def check(group, name):
            return group.wrong
        """,
}
BENCH = """
    import os, pathlib, signal, time

    import pytest
    from mbperf.groups import Group

    GROUPS = [{groups}]

    @pytest.mark.race(GROUPS)
    def test_toy(race):
        pass
    """


class ToyTree:
    """The repository in a folder; `write` changes the working tree, `commit` keeps it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.git("init", "-q")
        for name, text in FILES.items():
            self.write(name, text)

    def git(self, *arguments: str) -> str:
        who = ("-c", "user.name=toy", "-c", "user.email=toy@example.org")
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def bench(self, *groups: str) -> None:
        self.write("bench/bench_toy.py", BENCH.format(groups=", ".join(groups)))

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "toy")

    def worktrees(self) -> list[str]:
        return self.git("worktree", "list").splitlines()
