"""A group on a GPU: checked one contender at a time, as memory is dear, then raced, by graphs or not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mbperf.measure import covariates, gpu
from mbperf.measure.covariates import Covariates
from mbperf.measure.group import Group, Samples, compared, functions_of, make, nothing
from mbperf.measure.rounds import Call, Plan, Rounds, run_rounds
from mbperf.measure.rows import CONTROL, NULL, ROOF

CHUNK = 1 << 26  # elements that the check widens to float64 at a time: 0.5 GB each

Inputs = list[tuple[Any, ...]]


class Overwrites:
    """A contender that leaves its result in its input: it gets inputs of its own, and is checked on copies.

    >>> Overwrites(lambda x: x.add_(1)).function.__name__
    '<lambda>'
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, input: Any, *rest: Any) -> Any:
        """Call the function on a copy of its first argument."""
        return self.function(input.detach().clone().requires_grad_(input.requires_grad), *rest)


def measure_on_gpu(group: Group, plan: Plan, *, eager: bool, device: gpu.Device | None = None) -> Samples:
    """Check the contenders of a group, race those that agree, and check them again.

    Args:
        group: what to measure; needs traffic, which says how many input sets leave the cache.
        plan: how long and how finely.
        eager: from the host, end to end, instead of by graphs.
        device: the current CUDA device by default; the tests of this ruler have one that is not there.

    Returns:
        Samples, with the clock of the multiprocessors in every round.
    """
    assert group.traffic is not None
    device = device or gpu.Cuda()
    device.release()  # of the last group: graphs and inputs of up to half the memory
    rotation = gpu.input_sets(group.traffic, device.cache_bytes())
    functions, shared = functions_of(group), _inputs(group, rotation)
    inputs_of = {
        name: _inputs(group, rotation) if name == CONTROL or isinstance(fn, Overwrites) else shared
        for name, fn in functions.items()
    }
    wrong = _disagreements(group, functions, inputs_of)
    calls = {
        name: [_timed_calls(functions[name], inputs_of[name], eager, device)]
        for name in functions
        if name not in wrong
    }
    if not calls:
        return Samples({}, 0, 0, False, plan.seed, wrong)
    pace = list(calls)
    kind = gpu.EagerCalls if eager else gpu.GraphCalls
    calls[ROOF] = [kind(device.roof(group.traffic, rotation), device)]
    calls[NULL] = [gpu.EagerCalls([nothing], device)]
    clocks: list[float] = []
    rounds = run_rounds(
        calls, compared(group, calls), replace(plan, multiple=rotation), pace, gpu.timer,
        read=partial(_read, device, clocks),
    )  # fmt: skip
    for name, message in _disagreements(group, {name: functions[name] for name in pace}, inputs_of).items():
        wrong.setdefault(name, message)
    return _samples(group, rounds, wrong, clocks)


def _inputs(group: Group, rotation: int) -> Inputs:
    return [make(group, index) for index in range(rotation)]


def _timed_calls(function: Callable[..., Any], inputs: Inputs, eager: bool, device: gpu.Device) -> Call:
    run = function.function if isinstance(function, Overwrites) else function
    calls = [partial(run, *one) for one in inputs]
    return gpu.EagerCalls(calls, device) if eager else gpu.GraphCalls(calls, device)


def _disagreements(
    group: Group, functions: dict[str, Callable[..., Any]], inputs_of: dict[str, Inputs]
) -> dict[str, str]:
    """What is wrong with each contender that is wrong, on fresh inputs for those that overwrite theirs.

    The first input set speaks for all: the others differ in values alone, and the check of a large one takes
    half a second.
    """
    from mbperf.measure.agreement import Judge

    wrong: dict[str, str] = {}
    for name, function in functions.items():
        inputs = [make(group, 0)] if isinstance(function, Overwrites) else inputs_of[name][:1]
        judge = Judge({name: inputs}, group.expected, chunk=CHUNK)
        wrong |= judge.disagreements({name: [partial(function, *inputs[0])]})
    return wrong


def _read(device: gpu.Device, clocks: list[float]) -> Covariates:
    clock_mhz = device.sm_clock_mhz()
    if clock_mhz is not None:
        clocks.append(clock_mhz)
    return covariates.read()


def _samples(group: Group, rounds: Rounds, wrong: dict[str, str], clocks: list[float]) -> Samples:
    kept, dropped, noisy = rounds.kept()
    timed = {name: kept[name] for name in group.lineup() if name in kept and name not in wrong}
    return Samples(timed, rounds.inner_calls, dropped, noisy, rounds.seed, wrong, sm_clock_mhz=clocks)
