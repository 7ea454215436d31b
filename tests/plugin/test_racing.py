"""docs/racing.md does what it says: its code runs in a folder outside the checkout, as a reader runs it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mbperf.plugin.hooks import PROFILE_NAMES
from mbperf.report import record

PAGE = (Path(__file__).parents[2] / "docs/racing.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# As a reader with little time and a terminal of 130 columns would set them.
HURRY = "--mbperf-budget=1 -p no:cacheprovider"


def blocks(language):
    return [text for kind, text in FENCE.findall(PAGE) if kind == language]


def commands():
    """The command lines of the page, in its order."""
    return [line for block in blocks("sh") for line in block.splitlines()]


def run(command, folder, columns=130, **environment):
    """Run a command of the page, with the programs that were installed beside this Python."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=inherited
        | {"PATH": programs, "COLUMNS": str(columns), "PYTEST_ADDOPTS": HURRY, "PY_COLORS": "0"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one's own, with the test file of the page under the name that the page gives it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "pytest.ini").write_text("[pytest]\n")  # the root: what lies above is nobody's
    (code,) = blocks("python")
    (name,) = set(re.findall(r"test_\w+\.py", " ".join(commands())))
    assert f"`{name}`" in PAGE
    (folder / name).write_text(code)
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """What every command of the page printed, in the page's order, and its exit code."""
    return {command: run(command, folder) for command in commands()}


def saved(folder):
    return [record.load(file) for file in sorted(folder.glob(".benchmarks/*/*.json"))]


def test_every_command_of_the_page_works(told):
    assert len(told) >= 5
    for command, (code, text) in told.items():
        # Beside a busy neighbour a row may well be worse; then the run has to say so.
        worse = "--mbperf-fail-on-worse" in command and "WORSE than the compared run" in text
        assert code == int(worse), f"{command}\n{text}"


def test_every_column_that_the_page_explains_is_in_the_table(told):
    explained = [
        name
        for cell in re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
        for name in re.findall(r"`(.*?)`", cell)
    ]
    comparing = next(text for command, (_, text) in told.items() if "--benchmark-compare" in command)
    header = next(line for line in comparing.splitlines() if line.startswith("case "))
    for name in explained:
        assert name in header, name
    assert {"x mine_v1", "x numpy", "GB/s", "roof", "A/A", "verdict", "change"} <= {*explained}
    assert re.search(r"^100000\b.*x \[\d", comparing, re.MULTILINE)  # the interval


def test_optional_contenders_race_on_request_alone(told):
    headers = {
        command: next((line for line in text.splitlines() if line.startswith("case ")), "")
        for command, (_, text) in told.items()
    }
    asked = {command for command, header in headers.items() if "x scipy" in header}
    assert asked == {command for command in told if "--mbperf-with=scipy" in command}


def test_saved_records_are_lean_and_hold_the_change(told, folder):
    first, second, *_ = saved(folder)
    assert not any("change" in row for row in record.rows(first))
    for run_ in (first, second):
        assert run_["mbperf"]["complete"]
        assert run_["machine_info"] == run_["mbperf"]["hardware"]
    changes = [row["change"] for row in record.subjects(second)]
    assert len(changes) == 3
    assert {change["verdict"] for change in changes} <= {"BETTER", "WORSE", "SAME", "CANNOT TELL"}
    assert all(change["against"] in ("mine_v1", "roof") for change in changes)
    for file in folder.glob(".benchmarks/*/*.json"):
        text = file.read_text()
        assert len(text) < 1000 * len(record.load(file)["benchmarks"])
        assert not re.search(r"UNSERIALIZABLE|0x[0-9a-f]|\"data\":\[", text)


def test_the_page_of_the_run_shows_every_base_and_the_command(told, folder):
    (page,) = folder.glob(".benchmarks/*/report/index.html")
    text = page.read_text()
    for words in ("x mine_v1", "x numpy", "verdict", "change", "moving_mean 100000 cold", "<svg"):
        assert words in text, words
    command = next(one for one in reversed(commands()) if "--benchmark-autosave" in one)
    assert command in text
    assert "unversio" not in text
    table = (page.parent / "table.md").read_text()
    assert "| x mine_v1 | x numpy |" in table
    assert "x_numpy_ratio" in (page.parent / "rows.csv").read_text()
    assert (page.parent / "history.png").exists()


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_keeps_every_ratio(told, folder, columns):
    code, text = run(
        "pytest -q --mbperf-profile=smoke --benchmark-columns=median --mbperf-with=scipy", folder, columns
    )
    assert code == 0, text
    table = text.partition("mbperf: ratios inside this run")[2]
    for base in ("mine_v1", "numpy", "scipy"):
        assert base in table
    assert max(len(line.rstrip()) for line in table.splitlines() if "=" not in line) <= columns


def test_profiles_and_options_named_on_the_page_exist(folder):
    _, text = run("pytest --help", folder)
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        assert option in text, option
    assert re.search(r"\(`smoke`,\s`default`, `long`\)", PAGE)
    assert PROFILE_NAMES == ("smoke", "default", "long")


SLIPS = """
import pytest, torch
from mbperf.measure.group import Group

def group(**changes):
    its = dict(
        op="sum", case="100", make_inputs=lambda: (torch.randn(100),), expected=lambda x: [x.double().sum()],
        contenders={{"mine": lambda x: x.sum(), "other": lambda x: x.sum()}},
    )
    return Group(**(its | changes))

def raises(x):
    raise ValueError("no such mode")

@pytest.mark.race({marked})
def test_sum(race):
    race()
"""


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        ("", r"race needs @pytest.mark.race\(\[Group\(...\), ...\]\), one list of groups"),
        ("group()", "@pytest.mark.race takes a list of groups, got a Group"),
        ("[]", r"@pytest.mark.race takes a list of groups, got \[\]"),
        ("['sum']", "@pytest.mark.race takes a list of groups, and in it is 'sum'"),
        ("[group(contenders={})]", "group 'sum 100' has no contenders; give at least the function"),
        ("[group(), group()]", "two groups are called 'sum 100'; op and case have to tell them apart"),
        ("[group(contenders={'roof': sum})]", "group 'sum 100' has a contender 'roof', a name that mbperf"),
        ("[group(contenders={'mine': 3})]", "group 'sum 100': contender 'mine' is no function"),
        ("[group(contenders={'mine': raises})]", "sum 100: mine is wrong: raised ValueError: no such mode"),
        ("[group(expected=lambda x: [x.double().sum() * 2])]", "sum 100: mine is wrong: .*differs in 1 of 1"),
    ],
)  # fmt: skip
def test_a_slip_is_told_in_one_line(tmp_path, marked, message):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_slip.py").write_text(SLIPS.format(marked=marked))
    code, text = run("pytest -q --mbperf-profile=smoke", tmp_path)
    assert code in (1, 2)
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert ".py:" not in re.sub(r"test_slip.py::", "", text)  # no stack of frames either
