"""What importing mbperf costs beside torch: modules of its own alone, and a small part of torch's time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# 7.1 to 9 ms and 0.7 % of torch's time on a Zen 4 that other work shared; the part moves less than the time.
LARGEST_PART = 0.02

IMPORTS = """
import json, sys, time

def cost(statement):
    began, before = time.process_time(), set(sys.modules)
    exec(statement)
    return time.process_time() - began, sorted(set(sys.modules) - before)

torch_s, _ = cost("import torch; from torch.utils.data import DataLoader")
mbperf_s, new = cost("from mbperf import collate, cross_entropy")
print(json.dumps({"torch_s": torch_s, "mbperf_s": mbperf_s, "new": new}))
"""


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> list[dict]:
    """The costs of three fresh processes; a first one has compiled the sources, as an installation does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("bytecode"))
    command = [sys.executable, "-c", IMPORTS]
    runs = [subprocess.check_output(command, text=True, cwd=ROOT, env=kept) for _ in range(4)]
    return [json.loads(run) for run in runs[1:]]


def test_the_import_brings_nothing_but_mbperf(costs):
    """What torch and its DataLoader have not loaded yet is not loaded for mbperf either."""
    strangers = [name for name in costs[0]["new"] if name.partition(".")[0] != "mbperf"]
    assert strangers == []
    assert "mbperf._C" in costs[0]["new"]


def test_the_import_costs_a_small_part_of_torch_s(costs):
    assert min(cost["mbperf_s"] / cost["torch_s"] for cost in costs) < LARGEST_PART
