"""Runs of a GPU: their name, what is shown of them, and that no figure of a CPU comes from them."""

import readme
from click.testing import CliRunner
from made_up_runs import made_up_run, saved

from mbperf.report import page, record
from mbperf.report.command import report

NAME = "nvidia-h100-80gb-hbm3"
GPU = {"name": "NVIDIA H100 80GB HBM3", "machine": NAME, "driver": "580"}


def run_of_gpu(**changes):
    """A run whose groups raced on a GPU, one of them from the host."""
    run = made_up_run(**{"gpu": GPU, "command": "bench/on_gpu.sh", **changes})
    for row in record.rows(run):
        row["facts"] |= {"device": "cuda", "options": ""}
        row["case"] = "cuda " + row["case"].removesuffix(" none")
        if row["facts"]["N"] == 64:
            row["facts"]["options"] = "eager"
            row["case"] += " eager"
    return run


def test_a_run_of_a_gpu_goes_by_its_name_and_a_mixed_one_by_the_machine():
    run = run_of_gpu()
    assert record.machine_name(run) == NAME
    assert page.reproduce(run) == f"bench/on_gpu.sh, commit 01234567, machine {NAME}"
    record.rows(run)[0]["facts"] = {"N": 1}
    assert record.machine_name(run) == "test-machine"
    assert record.machine_name(made_up_run()) == "test-machine"


def test_no_run_of_a_gpu_is_the_baseline_of_the_machine_around_it(tmp_path):
    saved(made_up_run(), tmp_path)
    saved(run_of_gpu(when="2026-05-05T00:00:00"), tmp_path, "0002_gpu.json")
    file, _ = record.newest_complete(tmp_path, "test-machine")
    assert file.name == "0001_x.json"
    file, _ = record.newest_complete(tmp_path, NAME)
    assert file.name == "0002_gpu.json"


def test_readme_takes_the_figures_of_each_from_a_run_of_its_own(tmp_path):
    saved(made_up_run(), tmp_path / "test-machine")
    run = run_of_gpu(when="2026-05-05T00:00:00", incomplete_because="bench_x.py not run; 3 tests failed")
    saved(run, tmp_path / NAME)
    text = "".join(
        f"{readme.BEGIN.format(n)}\nbefore\n{readme.END.format(n)}\n"
        for n in (*readme.BLOCKS, *readme.GPU_BLOCKS)
    )
    new = readme.with_figures(text, tmp_path)
    of_cpu, _, of_gpu = new.partition(readme.BEGIN.format("gpu"))
    assert "machine test-machine" in of_cpu
    assert NAME not in of_cpu
    assert "before" not in new
    assert f"`bench/on_gpu.sh, commit 01234567, machine {NAME}`, 2026-05-05" in of_gpu
    assert "NVIDIA H100 80GB HBM3, driver 580, torch 2.13.0" in of_gpu
    assert "Not a whole run: 3 tests failed." in of_gpu


def test_readme_shows_graphs_and_calls_from_the_host_apart_with_the_fastest_in_bold():
    run = run_of_gpu()
    in_graphs, from_host, origin = readme.gpu_block(run).split("\n\n")
    times = {
        (row["case"], row["contender"]): row["time_s"] * 1e6 for row in record.rows(run)
    }  # us; fused is tenfold as fast as torch
    fused, torch = (times["cuda 512x32000 f32 fwd+bwd", name] for name in ("fused", "torch"))
    [line] = [line for line in in_graphs.splitlines() if "512x32000" in line]
    assert line.startswith(f"| cross_entropy 512x32000 f32 fwd+bwd | **{fused:.0f}** |  |  | {torch:.0f} | ")
    share = next(row for row in record.subjects(run) if row["facts"]["N"] == 512)["ratios"]["roof"]["ratio"]
    assert f" ({share:.0%}) |" in line
    assert "64x10" not in in_graphs
    assert "| cross_entropy 64x10 f32 fwd+bwd |" in from_host
    assert "512x32000" not in from_host
    assert "not clean" in origin


def test_rows_of_a_gpu_stay_out_of_the_table_of_a_cpu():
    mixed = made_up_run()
    for row in record.subjects(mixed):
        if row["facts"]["N"] == 64:
            row["facts"]["device"] = "cuda"
    block = readme.block(mixed)
    assert "512x32000" in block
    assert "64x10" not in block


def test_the_page_names_the_gpu_and_says_that_the_record_was_converted(tmp_path):
    file = saved(run_of_gpu(converted="from schema 1"), tmp_path)
    done = CliRunner().invoke(report, [str(file), "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / NAME / "report/index.html").read_text()
    assert f"<h1>mbperf on {NAME}</h1>" in text
    assert "NVIDIA H100 80GB HBM3 beside Test CPU" in text
    assert "Converted from schema 1." in text
    assert "Converted" not in page.html(made_up_run(), {})
