"""Make up groups, samples and whole records of known ratios."""

import json
import math
import random

from mbperf.measure.figures import figures
from mbperf.measure.group import Group, Samples
from mbperf.measure.traffic import cross_entropy_traffic


def group(n, c, step="fwd+bwd", options=""):
    case = " ".join(filter(None, [f"{n}x{c} f32 {step}", options]))
    return Group(
        "cross_entropy",
        case,
        tuple,
        {"fused": max, "naive": max, "torch": max},
        list,
        cross_entropy_traffic(n, c, 4, backward=step == "fwd+bwd"),
        floors={"torch": 2.0},
        facts={"N": n, "C": c, "dtype": "f32", "pass": step, "options": options, "why": "<because>"},
    )


def samples(one, speedup, rounds=30, seed=0):
    rng = random.Random(seed)
    roof = one.traffic.total_bytes / 50e9
    cost = {
        "fused": 1.2,
        "again": 1.2,
        "naive": 2.4 * speedup,
        "torch": 1.2 * speedup,
        "roof": 1.0,
        "null": 0.01,
    }
    drift = [1 + 0.3 * math.sin(i / 5) for i in range(rounds)]
    noise = {name: [math.exp(rng.gauss(0, 0.003)) for _ in drift] for name in cost}
    seconds = {
        name: [roof * cost[name] * d * e for d, e in zip(drift, noise[name], strict=True)] for name in cost
    }
    return Samples(seconds, 1, 2, False, 7)


def saved(run, folder, name="0001_x.json"):
    """Write a run into a folder, and return its file."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(run))
    return file


def made_up_run(speedup=10.0, when="2026-01-02T03:04:05", machine="test-machine", **changes):
    benchmarks = []
    for one in [
        group(512, 32000),
        group(64, 10),
        group(64, 10, "forward"),
        group(512, 32000, options="none"),
    ]:
        process = samples(one, speedup)
        for name, row in figures(one, [process]).items():
            stats = {"data": process.seconds[name], "median": row["time_s"]}
            benchmarks.append(
                {"group": one.name, "fullname": f"b::{one.case}-{name}", "extra_info": row, "stats": stats}
            )
    mean = {"ratio": speedup, "low": speedup * 0.98, "high": speedup * 1.02, "groups": 2}
    run = {
        "schema": 2,
        "complete": True,
        "incomplete_because": "",
        "profile": "default",
        "budget_s": 220,
        "processes": 1,
        "confidence": 0.99,
        "geometric_means": {"cross_entropy f32 fwd+bwd": {"naive": mean, "torch": mean}},
        "hardware": {"name": machine, "cpu": "Test CPU", "cores": 2},
        "software": {"torch": "2.13.0", "threads": 2, "cpu_capability": "AVX512"},
    }
    commit = {"id": "0123456789abcdef"}
    return {"datetime": when, "commit_info": commit, "benchmarks": benchmarks, "mbperf": run | changes}
