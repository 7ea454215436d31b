"""The gates: floors, losses since the saved run with confirmation and veto, instruction counts, records."""

import copy

import counters
import pytest
from made_up_runs import group, made_up_run, samples

from mbperf.plugin import gate
from mbperf.plugin.session import PROFILES, Session
from mbperf.report import record


def session(speedup, again=None, monkeypatch=None):
    """A finished run of one group, `speedup` times faster than torch; `again` is what a second pass finds."""
    one = group(512, 32000)
    run = Session(PROFILES["default"], [one], announce=lambda *_: None)
    run.samples[one.name] = [samples(one, speedup)]
    run.rows_of(one)
    if monkeypatch:
        monkeypatch.setattr(run, "measure_again", lambda _: [samples(one, again)])
    return run


def saved(speedup):
    return made_up_run(speedup)


def test_a_good_run_passes():
    assert gate.judge(session(10.0), saved(10.0)) == (0, [])


def test_a_floor_that_the_whole_interval_misses_fails():
    code, messages = gate.judge(session(1.5), None)
    assert code == gate.EXIT_FLOOR
    assert "the floor is 2x" in messages[0]


def test_a_floor_inside_the_interval_does_not_fail():
    assert gate.judge(session(1.999), None) == (0, [])


def test_a_loss_found_twice_fails(monkeypatch):
    code, messages = gate.judge(session(9.0, again=9.0, monkeypatch=monkeypatch), saved(10.0))
    assert code == gate.EXIT_SLOWER
    assert any("torch" in message for message in messages)


def test_a_loss_that_a_second_pass_does_not_find_passes(monkeypatch):
    assert gate.judge(session(9.0, again=10.0, monkeypatch=monkeypatch), saved(10.0)) == (0, [])


def test_a_loss_within_five_percent_passes():
    assert gate.judge(session(9.7), saved(10.0)) == (0, [])


def test_a_dirty_control_vetoes_a_loss(monkeypatch):
    run = session(9.0, again=9.0, monkeypatch=monkeypatch)
    for row in run.rows["cross_entropy 512x32000 f32 fwd+bwd"].values():
        row["clean_control"] = False
    assert gate.judge(run, saved(10.0)) == (0, [])


@pytest.mark.parametrize(("off", "code"), [(0.80, gate.EXIT_FLOOR), (0.70, 0)])
def test_a_floor_has_to_be_missed_by_more_than_the_control_was_off(off, code):
    run = session(1.5)  # of a floor of 2: by a third
    for row in run.rows["cross_entropy 512x32000 f32 fwd+bwd"].values():
        row["control"] = {"ratio": off, "low": off, "high": off + 0.01}
    assert gate.judge(run, None)[0] == code


def test_without_rounds_enough_for_a_control_no_floor_fails():
    run = session(1.5)
    for row in run.rows["cross_entropy 512x32000 f32 fwd+bwd"].values():
        row["control"] = {"ratio": 1.0, "low": 0.0, "high": None}
    assert gate.judge(run, None) == (0, [])


def test_a_gain_passes():
    assert gate.judge(session(20.0), saved(10.0)) == (0, [])


def test_counts_that_moved_or_went_missing_are_told_apart():
    messages = counters.judge(
        {"a": 104, "b": 96, "c": 101, "new": 1}, {"a": 100, "b": 100, "c": 100, "gone": 1}
    )
    assert [message.split(":")[0] for message in messages] == ["a", "b", "gone", "new"]
    assert "4.0% more" in messages[0]
    assert "4.0% fewer" in messages[1]


def test_a_count_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="counted nothing"):
        counters.total("events: Ir\nsummary: 0\n")


def test_counts_of_another_compiler_only_inform(monkeypatch, capsys):
    monkeypatch.setattr(counters, "compiler", lambda: "g++ 99")
    assert counters._verdict({"2x3 f32": 200}, {"compiler": "g++ 12", "instructions": {"2x3 f32": 100}}) == 0
    monkeypatch.setattr(counters, "compiler", lambda: "g++ 12")
    assert counters._verdict({"2x3 f32": 200}, {"compiler": "g++ 12", "instructions": {"2x3 f32": 100}}) == 13
    assert "make counters ARGS=--refresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["mbperf"], None, 'has no "mbperf" object'),
        (["mbperf", "schema"], 99, "schema is 99, this version reads 2"),
        (["mbperf", "complete"], "yes", "mbperf.complete is 'yes'"),
        (["benchmarks"], {}, '"benchmarks" is no list'),
        (["benchmarks", 0, "extra_info", "time_s"], "fast", r"benchmarks\[0\].extra_info.time_s is 'fast'"),
        (["benchmarks", 0, "extra_info", "ratios", "torch"], {}, "ratios.torch.ratio is missing"),
    ],
)
def test_a_bad_record_is_named_by_its_field(path, value, message):
    run = copy.deepcopy(made_up_run())
    place = run
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(record.BadRecord, match=message):
        record.validate(run, "file.json")
