"""How rounds are made: what is dealt, what comes before the clock, when a group is done, who times."""

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from mbperf.measure import fork, heap
from mbperf.measure.agreement import Agreement
from mbperf.measure.covariates import Covariates, page_faults
from mbperf.measure.figures import figures
from mbperf.measure.group import Group, Judgement, Samples, judge, measure
from mbperf.measure.rounds import Pace, Plan, WallTimer, deal, run_rounds
from mbperf.measure.rows import CONTROL, NULL, ROOF
from mbperf.measure.selftest import FakeMachine
from mbperf.measure.statistics import LEAST_ROUNDS, paired_ratio
from mbperf.measure.traffic import Traffic
from mbperf.plugin import session
from mbperf.plugin.session import PROFILES, Session
from mbperf.report.page import share_in_words
from mbperf.report.tables import share

PLAN = Plan(budget_s=100, width=0, max_rounds=200)


pytestmark = [pytest.mark.timed, pytest.mark.usefixtures("few_objects_to_collect")]


def undisturbed():
    return Covariates(0, 0.0)


def placed(fake, seconds, slowness):
    """A contender whose cost depends on where its input set lies."""
    return [fake.contender(seconds * slow) for slow in slowness]


def test_where_buffers_lie_makes_no_difference_between_identical_contenders():
    fake = FakeMachine(random.Random(5))
    calls = {name: placed(fake, 1e-3, (1.0, 1.02, 1.05)) for name in ("a", "b", "c")}
    rounds = run_rounds(calls, [("a", "b")], PLAN, clock=fake.clock, read=undisturbed)
    kept_apart = {name: its[i : i + 1] for i, (name, its) in enumerate(calls.items())}
    fixed = run_rounds(kept_apart, [("a", "b")], PLAN, clock=fake.clock, read=undisturbed)
    assert not paired_ratio(rounds.seconds["a"], rounds.seconds["b"]).excludes(1)
    assert paired_ratio(fixed.seconds["a"], fixed.seconds["b"]).excludes(1)


def test_where_buffers_lie_hides_no_difference():
    fake = FakeMachine(random.Random(6))
    calls = {name: placed(fake, seconds, (1.0, 1.02)) for name, seconds in (("a", 1e-3), ("b", 1.05e-3))}
    rounds = run_rounds(calls, [("a", "b")], PLAN, clock=fake.clock, read=undisturbed)
    ratio = paired_ratio(rounds.seconds["a"], rounds.seconds["b"])
    assert ratio.excludes(1)
    assert not ratio.excludes(1 / 1.05)


def test_every_contender_meets_every_input_set_and_none_is_shared_in_a_round():
    rng, sets = random.Random(0), [1, 2, 3]
    calls = {name: [lambda s=s: s for s in sets] for name in "abc"} | {"null": [lambda: None]}
    hands = [{name: call() for name, call in deal(calls, rng).items()} for _ in range(300)]
    assert all(sorted(hand[name] for name in "abc") == sets for hand in hands)
    assert all(hand["null"] is None for hand in hands)
    for name in "abc":
        counts = [sum(hand[name] == one for hand in hands) for one in sets]
        assert min(counts) > 60  # 100 expected; 60 is five standard deviations away


def test_two_sets_are_dealt_evenly_among_more_contenders():
    calls = {name: [lambda: 0, lambda: 1] for name in "abcd"}
    rng = random.Random(0)
    for _ in range(50):
        assert sum(call() for call in deal(calls, rng).values()) == 2


def test_an_untimed_call_of_its_own_comes_before_each_contenders_timed_ones():
    fake, seen = FakeMachine(random.Random(0)), []

    def call(name):
        cost = fake.contender(1e-3)
        return [lambda: (seen.append(name), cost())]

    timed = []

    def timer(one, n):
        timed.append(len(seen))
        return WallTimer(fake.clock)(one, n)

    plan = replace(PLAN, max_rounds=12)
    rounds = run_rounds({"a": call("a"), "b": call("b")}, [], plan, (), timer, fake.clock, undisturbed)
    starts = timed[-24:]  # the rounds; what came before them calibrated
    assert rounds.warm
    assert all(seen[start - 1] == seen[start] for start in starts)
    gaps = [start - before - rounds.inner_calls for before, start in itertools.pairwise(starts)]
    assert set(gaps) == {1}


def test_a_group_of_long_calls_makes_one_untimed_call_on_each_input_set():
    fake, calls = FakeMachine(random.Random(0)), []

    def on(name):
        cost = fake.contender(2.0)
        return lambda: (calls.append(name), cost())

    plan = replace(PLAN, max_rounds=30)
    sets = {"a": [on("first"), on("second")]}
    rounds = run_rounds(sets, [], plan, clock=fake.clock, read=undisturbed)
    assert not rounds.warm
    assert rounds.inner_calls == 1
    calibrating = 2  # no need to see better how long it takes; one of them is that set's untimed one
    assert len(calls) == calibrating + 1 + len(rounds.seen)


@pytest.mark.parametrize("budget_s", [0.001, 5.0])
def test_every_group_gets_its_least_rounds_and_disturbed_ones_do_not_count(budget_s):
    fake, reads = FakeMachine(random.Random(0)), 0

    def disturbed_every_fifth():
        nonlocal reads
        reads += 1
        return Covariates(10_000 * (reads // 10), 0.0)  # two readings a round

    calls = {"a": [fake.contender(0.1)], "b": [fake.contender(0.3)]}
    plan = replace(PLAN, budget_s=budget_s, min_rounds=10)
    rounds = run_rounds(calls, [("a", "b")], plan, clock=fake.clock, read=disturbed_every_fifth)
    kept, dropped, noisy = rounds.kept()
    assert dropped > 0
    assert not noisy
    assert len(kept["a"]) >= 10


def test_a_machine_that_stalls_does_not_get_all_its_rounds():
    fake = FakeMachine(random.Random(0))
    plan = replace(PLAN, budget_s=1.0, min_rounds=10_000, max_rounds=10_000)
    rounds = run_rounds({"a": [fake.contender(0.5)]}, [], plan, clock=fake.clock, read=undisturbed)
    assert len(rounds.seen) < 200


def with_a_slow_one(read=undisturbed, slow=0.5, **changes):
    fake = FakeMachine(random.Random(0))
    seconds = {"mine": 1e-3, "again": 1e-3, "torch": 4e-3, "naive": slow}
    calls = {name: [fake.contender(its)] for name, its in seconds.items()}
    plan = replace(PLAN, **{"budget_s": 4.0, "min_rounds": 3} | changes)
    pairs = [("torch", "mine"), ("naive", "mine")]
    return run_rounds(calls, pairs, plan, clock=fake.clock, read=read, brief=["naive"])


def test_a_slow_contender_nobody_is_judged_against_leaves_the_others_its_time():
    rounds = with_a_slow_one()
    counts = {name: len(its) for name, its in rounds.seconds.items()}
    assert counts["naive"] == 3
    assert counts["mine"] == counts["again"] == counts["torch"] == len(rounds.seen) > 30
    kept, _, _ = rounds.kept()
    assert kept["naive"] == rounds.seconds["naive"]
    for nobody_leaves in (with_a_slow_one(slow=5e-3), with_a_slow_one(max_rounds=5)):
        assert {len(its) for its in nobody_leaves.seconds.values()} == {len(nobody_leaves.seen)}


def test_who_leaves_has_rounds_that_will_be_kept():
    reads = 0

    def disturbed_at_first():
        nonlocal reads
        reads += 1
        return Covariates(10_000 * min(reads, 12), 0.0)  # two readings a round

    rounds = with_a_slow_one(disturbed_at_first, slow=0.05)
    kept, dropped, noisy = rounds.kept()
    assert (dropped, noisy) == (6, False)
    assert len(rounds.seconds["naive"]) == 9
    assert len(kept["naive"]) == 3


def test_a_process_takes_over_what_an_earlier_one_found():
    calls = []
    pace = Pace(inner_calls=3, warm=True)
    plan = replace(PLAN, max_rounds=5, pace=pace)
    rounds = run_rounds({"a": [lambda: calls.append(1)]}, [], plan)
    assert (rounds.inner_calls, rounds.warm) == (3, True)
    assert len(calls) == 5 * (1 + 3)


def test_a_round_of_dear_calls_makes_few_of_them():
    many = with_a_slow_one(slow=1e-3, max_rounds=9, batch_s=0.1)
    few = with_a_slow_one(slow=1e-3, max_rounds=9, batch_s=0.1, budget_s=0.1)
    assert few.inner_calls < many.inner_calls


def group(**changes):
    return Group("double", "1", lambda: (3.0,), {"mine": lambda x: x + x}, lambda x: [x * 2], **changes)


def test_a_group_brings_its_own_timer():
    calls = []

    def timer(call, n):
        calls.append(call())
        return 2e-3 * n

    samples = measure(group(timer=timer), Plan(budget_s=0.01, max_rounds=9))
    assert set(samples.seconds["mine"]) == {2e-3}
    assert 6.0 in calls


def test_a_limit_of_work_is_raced_in_the_place_of_the_bare_copy():
    seen, facts = [], {"limit": "half of the work"}
    limited = group(traffic=Traffic(8, 8), limit=seen.append, facts=facts)
    row = figures(limited, [measure(limited, Plan(budget_s=0.01, max_rounds=12))])["mine"]
    assert limited.lineup() == ["mine", CONTROL, ROOF, NULL]
    assert set(seen) == {3.0}
    assert share_in_words(row) == f"{row['ratios'][ROOF]['ratio']:.0%} of half of the work"
    assert f"{share(row)} of half of the work" == share_in_words(row)


def test_each_contender_has_inputs_of_its_own():
    made = []

    def make():
        made.append([3.0])
        return (made[-1],)

    double = Group("double", "1", make, {"mine": sum, "theirs": sum}, lambda x: [3.0])
    measure(double, Plan(budget_s=0.01, max_rounds=9))
    assert len({id(one) for one in made}) == 3  # mine, again, theirs
    made.clear()
    measure(replace(double, input_sets=2), Plan(budget_s=0.01, max_rounds=9))
    assert len({id(one) for one in made}) == 2


def test_few_rounds_of_a_slow_group_are_still_enough_for_an_interval():
    samples = measure(group(min_rounds=2), Plan(budget_s=0.0, min_rounds=30))
    assert len(samples.seconds["mine"]) >= LEAST_ROUNDS
    assert paired_ratio(samples.seconds[CONTROL], samples.seconds["mine"]).low > 0


def done(page_faults=0.0, **changes):
    return Samples({"mine": [1.0] * 9}, 1, 0, False, 0, page_faults={"mine": page_faults}, **changes)


def test_the_budget_is_shared_by_weight_among_those_who_wait():
    one, heavy = group(), replace(group(weight=3.0), case="2")
    run = Session(PROFILES["long"], [one, heavy], announce=lambda *_: None)
    run.judged = {its.name: Judgement(took_s=2.0) for its in run.groups}
    assert run.share_s(one, 220.0) == 10.0  # five processes of each, which take 2 s beside their rounds
    run.samples[one.name] = [done()] * 5
    assert run.share_s(heavy, 210.0) == 40.0
    run.samples[heavy.name] = [done()]
    run.process_s[heavy.name], run.share_of[heavy.name] = 45.0, 40.0  # 5 s beside them, as it turned out
    assert run.share_s(heavy, 220.0) == 50.0
    assert run.share_s(heavy, 0.0) == session.LEAST_SHARE_S


def test_page_faults_are_counted_for_each_contender():
    torch = pytest.importorskip("torch")
    pages = 2 << 20

    def touches(x):
        return [torch.ones(pages, dtype=torch.uint8)[0] * 0 + x]

    one = Group("touch", "1", lambda: (torch.tensor(1),), {"fresh": touches, "none": lambda x: [x + 0]}, list)
    faults = measure(replace(one, expected=lambda x: [x]), Plan(budget_s=0.05, max_rounds=9)).page_faults
    assert set(faults) == {"fresh", "again", "none", "null"}
    assert faults["none"] < 2


def test_making_and_judging_the_inputs_count_for_the_patience():
    def rounds_after(since_s):
        fake = FakeMachine(random.Random(0))
        plan = replace(PLAN, budget_s=0.1, patience_s=20.0, min_rounds=10_000, max_rounds=10_000)
        calls = {"a": [fake.contender(0.5)]}
        run = run_rounds(calls, [], plan, clock=fake.clock, read=undisturbed, since_s=since_s)
        return len(run.seen), fake.now

    assert rounds_after(0)[0] > rounds_after(15)[0] >= rounds_after(100)[0] == 1
    assert rounds_after(15)[1] < 10


def test_the_time_left_is_what_judges_and_processes_so_far_have_shown():
    sizes = {"0": 0, "1": 0, "2": 20_000_000}
    groups = [replace(group(), case=case, traffic=Traffic(size, size)) for case, size in sizes.items()]
    run = Session(PROFILES["smoke"], groups, announce=lambda *_: None)
    usual_s = sum(map(session.usual_s, groups))
    assert run.expected_s(left_s=100.0) == 100.0  # there is time, and it will be used
    run.judged = {"double 0": Judgement(took_s=10 * session.usual_s(groups[0]))}  # ten times the usual
    to_judge_s = 10 * sum(map(session.usual_s, groups[1:])) / run._judges()
    assert run.expected_s(left_s=0.0) == pytest.approx(to_judge_s + 10 * usual_s)
    run.judged = {one.name: Judgement(took_s=took_s) for one, took_s in zip(groups, (1, 2, 6), strict=True)}
    run._keep(groups[0], done(), seconds=0.5)  # half of its judge
    assert run.expected_s(left_s=0.0) == pytest.approx(0.5 * (2 + 6))
    run.samples |= {one.name: [done()] for one in groups}
    assert run.expected_s(left_s=0.0) == 0.0


def test_a_group_of_which_the_system_counts_no_bytes_counts_by_what_it_took():
    run = Session(PROFILES["long"], [group()], announce=lambda *_: None)
    run.judged = {run.groups[0].name: Judgement(took_s=0.1)}
    run._keep(run.groups[0], done(), seconds=7.0)
    assert run.expected_s(left_s=0.0) == pytest.approx(4 * 7.0)


def session_of(one, **changes):
    return Session(replace(PROFILES["default"], budget_s=0.1, **changes), [one], announce=lambda *_: None)


@pytest.fixture
def may_fork(monkeypatch):
    """Other tests have started threads here; these groups compute nothing with them."""
    monkeypatch.setattr(fork, "threads", lambda: 1)


def test_each_group_has_several_fresh_processes(may_fork):
    one = group()
    run = session_of(one)
    run.measure_all()
    assert len(run.samples_of(one)) == 3
    assert {len(its.seconds) for its in run.samples_of(one)} == {3}
    assert len({its.seed for its in run.samples_of(one)}) == 3
    assert len(run.rows_of(one)["mine"]["rounds"]) == 3


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: os.kill(os.getpid(), signal.SIGSEGV), "died of SIGSEGV"),
        (lambda x: os._exit(7), "exited with code 7"),
        (lambda x: time.sleep(99), "did not end within 1 s"),
        (lambda x: sys.exit("no"), "raised SystemExit: no"),
    ],
)
def test_a_process_that_fails_is_a_failed_group_with_its_reason(may_fork, monkeypatch, how, reason):
    monkeypatch.setattr(session, "PROCESS_TIMEOUT_S", 1)
    run = session_of(replace(group(), contenders={"mine": how}))
    run.measure_all()
    (only,) = run.samples_of(run.groups[0])  # and no second one
    assert reason in run.failed(run.groups[0])
    assert only.seconds == {}


def test_no_process_is_left_behind(may_fork, monkeypatch, tmp_path):
    def grandchild():
        child = subprocess.Popen(["sleep", "99"])
        (tmp_path / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(99)

    def interrupted(*_):
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(fork.connection, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork.call(grandchild, timeout_s=60)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until_gone(pid)


def wait_until_gone(pid):
    end = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_process_with_threads_is_refused():
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="more thread"):
            fork.call(lambda: 1, timeout_s=60)
    finally:
        go_on.set()
        thread.join()


def touching(heap_state):
    """Median page faults of a call that frees a block of 8 MiB, in a process whose heap is in that state."""
    import torch

    assert heap.set_state(heap_state)
    torch.set_num_threads(1)

    def touch():
        torch.ones(8 << 20, dtype=torch.uint8)

    faults = []
    for _ in range(21):
        before = page_faults()
        touch()
        faults.append(page_faults() - before)
    return statistics.median(faults)


@pytest.mark.skipif(not heap.has_states(), reason="the heap's state is glibc's")
def test_the_heap_recycles_or_asks_the_system_as_it_is_told():
    assert in_an_interpreter_of_its_own("touching", heap.RECYCLED) < 1
    assert in_an_interpreter_of_its_own("touching", heap.FRESH) >= heap.LEAST_FAULTS // 2


def in_an_interpreter_of_its_own(function, state):
    """What a function of this file prints there: what other tests freed here would serve any request."""
    code = f"import test_measure_rounds as here; print(here.{function}({state!r}))"
    command = [sys.executable, "-c", code]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    return float(run.stdout)


def first_block(state):
    """Page faults of the first block of 8 MiB in a process of that state, memory in advance."""
    import torch

    assert heap.set_state(state)
    torch.set_num_threads(1)
    torch.ones(1)
    heap.recycle_in_advance(32 << 20)
    before = page_faults()
    torch.ones(8 << 20, dtype=torch.uint8)
    return page_faults() - before


@pytest.mark.skipif(not heap.has_states(), reason="the heap's state is glibc's")
def test_the_first_large_block_of_a_recycled_heap_is_recycled():
    assert in_an_interpreter_of_its_own("first_block", heap.RECYCLED) < 64
    assert in_an_interpreter_of_its_own("first_block", heap.FRESH) >= 2048  # pages of 8 MiB


def test_the_headline_is_against_torchs_better_heap_and_the_other_stands_beside_it():
    def process(state, torch_s, faults):
        seconds = {"mine": [1.0] * 9, "again": [1.0] * 9, "torch": [torch_s] * 9}
        return Samples(seconds, 1, 0, False, 0, page_faults={"torch": faults}, heap=state)

    one = replace(group(), contenders={"mine": sum, "torch": sum})
    run = session_of(one)
    run.samples[one.name] = [process("fresh", 16.0, 9000.0), process("recycled", 4.0, 0.0)] * 3
    row = run.rows_of(one)["mine"]
    assert (row["heap"], row["ratios"]["torch"]["ratio"]) == ("recycled", pytest.approx(4))
    other = row["other_heap"]
    assert (other["heap"], other["ratios"]["torch"]["ratio"]) == ("fresh", pytest.approx(16))
    assert run.seconds_of(one, "torch") == [4.0] * 27


@pytest.mark.skipif(not heap.has_states(), reason="the heap's state is glibc's")
@pytest.mark.parametrize(
    ("faults", "fresh_s", "recycled_s", "expected"),
    [
        (0.0, 1.0, 1.0, [["fresh"], ["fresh"], ["fresh"]]),
        (32.0, 4.0, 1.0, [["fresh", "recycled"], ["recycled"], ["recycled"]]),
        (32.0, 1.0, 4.0, [["fresh", "recycled"], ["fresh"], ["fresh"]]),
        (32.0, 1.0, 1.01, [["fresh", "recycled"], ["recycled"], ["recycled"]]),
    ],
)
def test_the_first_process_says_which_state_the_others_are_in(faults, fresh_s, recycled_s, expected):
    one = group()
    run = session_of(one)
    run.samples[one.name] = []
    for number, states in enumerate(expected):
        for state, its in zip(states, run.states(one, number), strict=True):
            assert its == state
            seconds = {"mine": [fresh_s if state == "fresh" else recycled_s] * 9}
            samples = Samples(seconds, 1, 0, False, 0, page_faults={"mine": faults}, heap=state)
            run.samples[one.name].append(samples)
    assert run.waiting(one) == 0
    assert {its.heap for its in run.headline(one)} == {expected[-1][0]}


def test_later_processes_are_judged_by_agreement_with_the_subject():
    lying = replace(group(), expected=lambda x: [x * 3])
    plan = Plan(budget_s=0.01, max_rounds=9)
    torch = pytest.importorskip("torch")
    lying = replace(lying, make_inputs=lambda: (torch.ones(3),), contenders={"mine": lambda x: x + x})
    assert "mine" in measure(lying, plan).wrong
    assert not measure(lying, plan, Judgement()).wrong
    odd = replace(lying, contenders={"mine": lambda x: x + x, "odd": lambda x: x * 3})
    assert list(measure(odd, plan, Judgement()).wrong) == ["odd"]
    assert set(measure(odd, plan, Judgement({"odd": "said before"})).seconds) == {"mine", "again", "null"}


def test_judges_work_side_by_side_and_one_that_finds_none_right_has_the_group_left_out(may_fork):
    torch = pytest.importorskip("torch")
    good = Group("add", "1", lambda: (torch.ones(3),), {"mine": lambda x: x + x}, lambda x: [x * 2])
    bad = replace(good, case="2", expected=lambda x: [x * 3])
    run = Session(replace(PROFILES["default"], budget_s=0.1), [good, bad], announce=lambda *_: None)
    run.measure_all()
    assert len(run.samples_of(good)) == 3
    assert [list(one.seconds) for one in run.samples_of(bad)] == [[]]
    assert "differs" in run.wrong(bad, "mine")
    assert "2 processes to judge, " in run.account()


def test_who_begins_to_cheat_later_is_found_by_the_judge():
    torch = pytest.importorskip("torch")
    kept = []

    def tires(x):
        kept.append((x + x).clone())
        return [kept[9 if len(kept) > 9 else -1].clone()]

    one = Group("add", "1", lambda: (torch.ones(3),), {"mine": tires}, lambda x: [x * 2])
    assert list(judge(one).wrong) == ["mine", "again"]


def test_one_who_changes_inputs_or_hands_out_old_memory_disagrees():
    torch = pytest.importorskip("torch")
    inputs = {name: (torch.ones(3),) for name in ("good", "bad")}
    kept = torch.full((3,), 2.0)
    for bad in (lambda x: x.add_(0.5) * 0 + 2, lambda x: kept):
        calls = {"good": lambda: inputs["good"][0] + 1, "bad": lambda bad=bad: bad(*inputs["bad"])}
        assert list(Agreement(inputs).disagreements(calls)) == ["bad"]
