"""A group in the ranks of a process group: rounds in step, a contender as slow as its slowest rank.

Every rank runs the same rounds. What they decide by (seconds, the budget's clock, what disturbed a round) is
reduced over ranks before it is used, so that all decide alike; a barrier before each timed call lies outside
the clock. The subject's collectives run by themselves once a round, too: that is their share of its time.
Under torchrun these are torchrun's ranks, else processes that are started here.
"""

import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import ProcessException
from torch.profiler import ProfilerActivity, profile

from mbperf.measure import covariates, heap
from mbperf.measure.covariates import Covariates
from mbperf.measure.group import Group, Samples, brief, compared, functions_of, make, nothing, recycle_for
from mbperf.measure.launch import launched
from mbperf.measure.memory import added_at_peak
from mbperf.measure.rounds import Call, Plan, WallTimer, run_rounds
from mbperf.measure.rows import CONTROL, NULL

LIMIT = timedelta(minutes=2)  # of a collective: a rank that is gone ends the others
# By a server that has imported these once: an import takes 3 s in two ranks on two cores.
PRELOADED = ["mbperf.distributed", "mbperf.measure.agreement", "torch.distributed.tensor.parallel"]
ALONE = "collectives"  # those of the subject, by themselves
ITEM_BYTES = {"unsigned char": 1, "long int": 8, "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}


def measure_in_ranks(group: Group, plan: Plan, *, build: Callable[[], Group], ranks: int) -> Samples:
    """Measure a group in ranks: in those of torchrun, or in as many as `ranks` that end with the call.

    Args:
        group: what is to be measured.
        plan: how long and how finely; the first rank's holds.
        build: returns the group; called in each rank that is started here, so it has to be picklable.
        ranks: how many to start.

    Returns:
        Samples of the slowest rank in each round; of the subject also collectives and bytes a call.
    """
    if launched():
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=LIMIT)
        return in_this_rank(group, plan)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _threads_that_sleep():
                torch.multiprocessing.start_processes(
                    _rank, (ranks, folder, build, plan), nprocs=ranks, start_method="forkserver"
                )
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]
            return Samples({}, 0, 0, False, plan.seed, failed=f"a rank ended: {last}")
        return pickle.loads((Path(folder) / "samples").read_bytes())


@contextmanager
def _threads_that_sleep() -> Iterator[None]:
    """Have the server of ranks, if it starts in this block, keep threads of OpenMP from waiting awake.

    After a contender of several threads they would take a processor from another rank for some milliseconds.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = before or "passive"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


def _rank(rank: int, ranks: int, folder: str, build: Callable[[], Group], plan: Plan) -> None:
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=LIMIT)
    try:
        samples = in_this_rank(build(), plan)
        if rank == 0:
            (Path(folder) / "samples").write_bytes(pickle.dumps(samples))
    finally:
        dist.destroy_process_group()
    # Not by the interpreter's own end: threads of torch that still free tensors are unwound there, which ends
    # the process by SIGABRT now and then.
    os._exit(0)


def in_this_rank(group: Group, plan: Plan) -> Samples:
    """Take part in the measuring of a group, on recycled pages; every rank has to."""
    state = heap.RECYCLED if heap.set_state(heap.RECYCLED) else ""
    torch.set_num_threads(group.threads or 1)
    plan = _from_first(plan)
    functions = functions_of(group)
    inputs = make(group, 0)
    # Before anything else: freed blocks would hide what the subject needs.
    peak = _peak(partial(functions[group.subject], *inputs))
    recycle_for(inputs)
    wrong = _wrong(group, functions, inputs)
    # After a first call, which may tell ranks of each other.
    sent = {name: _sent(partial(functions[name], *inputs)) for name in group.contenders}
    facts = {name: _facts(its) for name, its in sent.items()}
    facts[group.subject]["peak_memory_bytes"] = peak
    right = [name for name in functions if name not in wrong]
    if not right:
        return Samples({}, 0, 0, False, plan.seed, wrong)
    calls: dict[str, list[Call]] = {name: [partial(functions[name], *inputs)] for name in right}
    calls |= {NULL: [nothing], ALONE: [_alone(sent[group.subject])]}
    rounds = run_rounds(
        calls, compared(group, calls), plan, right, _in_step, clock=_first_clock, read=_read_all,
        brief=brief(group),
    )  # fmt: skip
    kept, dropped, noisy = rounds.kept()
    timed = {name: kept[name] for name in group.lineup() if name in kept}
    faults = {name: statistics.median(rounds.page_faults[name]) for name in timed}
    if group.subject in timed:
        facts[group.subject] |= _time_of_collectives(kept[ALONE], kept[group.subject])
    return Samples(
        timed, rounds.inner_calls, dropped, noisy, rounds.seed, wrong, faults, heap=state,
        extra_metrics=facts, warm=rounds.warm,
    )  # fmt: skip


def _in_step(call: Call, n: int) -> float:
    dist.barrier()
    seconds = WallTimer()(call, n)
    return float(_reduced([seconds], dist.ReduceOp.MAX)[0])


def _first_clock() -> float:
    now = torch.tensor([time.perf_counter()], dtype=torch.float64)
    dist.broadcast(now, 0)
    return float(now)


def _read_all() -> Covariates:
    here = covariates.read()
    switches, steal_s = _reduced([here.switches, here.steal_s], dist.ReduceOp.SUM)
    return Covariates(int(switches), steal_s)


def _reduced(values: list[float], op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def _from_first(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _wrong(group: Group, functions: Mapping[str, Callable[..., Any]], inputs: Any) -> dict[str, str]:
    """What is wrong with each contender that is wrong on some rank; None is the result of who has no part."""
    from mbperf.measure.agreement import Judge

    judge = Judge({name: [inputs] for name in functions}, group.expected)
    calls = {name: partial(function, *inputs) for name, function in functions.items() if name != CONTROL}
    here = judge.disagreements({name: [call] for name, call in calls.items() if call() is not None})
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return {
        name: f"rank {rank}: {text}"
        for rank, its in reversed([*enumerate(found)])
        for name, text in its.items()
    }


def _peak(call: Call) -> int:
    """What a first call adds to resident memory at its highest, in the rank that needs most."""
    dist.barrier()
    return int(_reduced([added_at_peak(call)], dist.ReduceOp.MAX)[0])


# Of each collective of a call its name, and the bytes that this rank puts into it.
Sent = list[tuple[str, int]]


def _sent(call: Call) -> Sent:
    """The collectives of a call, as the profiler saw them."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    return _collectives(recorded)


def _facts(sent: Sent) -> dict[str, Any]:
    return {
        "collectives": len(sent),
        "collective_names": [name for name, _ in sent],
        "sent_bytes": sum(size for _, size in sent),
        "world_size": dist.get_world_size(),
        "backend": dist.get_backend(),
    }


def _alone(sent: Sent) -> Call:
    """What sends as many bytes by the same collectives, and does nothing else.

    Raises:
        NotImplementedError: one is no all-gather.
    """
    if others := {name for name, _ in sent} - {"all_gather"}:
        raise NotImplementedError(f"measure_in_ranks: a subject may all-gather; its collectives are {others}")
    c10d, world = torch.ops._c10d_functional, dist.group.WORLD
    assert world is not None
    messages = [torch.zeros(size, dtype=torch.uint8) for _, size in sent]

    def call() -> None:
        for message in messages:
            c10d.wait_tensor(c10d.all_gather_into_tensor(message, world.size(), world.group_name))

    return call


def _time_of_collectives(alone_s: Sequence[float], whole_s: Sequence[float]) -> dict[str, float]:
    """The time of a call's collectives by themselves, and which share of the call that is."""
    shares = [alone / whole for alone, whole in zip(alone_s, whole_s, strict=True)]
    return {"collectives_s": statistics.median(alone_s), "collectives_share": statistics.median(shares)}


def _collectives(recorded: profile) -> Sent:
    """Name and bytes of what this rank put into each collective of the process group."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    backend = f"{dist.get_backend()}:"
    return [
        (event["name"].removeprefix(backend), _input_bytes(event["args"]))
        for event in events
        if event.get("name", "").startswith(backend)
    ]


def _input_bytes(arguments: Mapping[str, Any]) -> int:
    sizes = zip(arguments.get("Input type", ()), arguments.get("Input Dims", ()), strict=True)
    return sum(ITEM_BYTES[kind] * torch.Size(dims).numel() for kind, dims in sizes if kind in ITEM_BYTES)
