"""Log-probabilities over sharded classes against one process, from logits and from hidden states; faults."""

import pytest
import torch
import torch.nn.functional as F
from sharded import Sharded, assert_no_worse, layer
from torch.autograd import profiler

import mbperf
from mbperf.distributed import vocab_parallel_linear_token_log_probs, vocab_parallel_token_log_probs

SETTINGS = [
    {},
    {"return_entropy": True},
    {"temperature": 0.7},
    {"temperature": 1.6, "return_entropy": True, "ignore_index": 3},
]
ENTROPY = {"return_entropy": True, "temperature": 0.8}
SHARDS = [(13,), (8, 5), (0, 6), (7, 0, 4), (1, 1, 1), (300, 5000, 100)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [
    *(Sharded(shards, settings=settings) for shards in SHARDS for settings in SETTINGS),
    *(Sharded((33, 20), dtype=dtype, settings=settings) for dtype in DTYPES for settings in SETTINGS),
    *(Sharded((20, 13), dtype=dtype, settings=ENTROPY | {"out_dtype": torch.float64}) for dtype in DTYPES),
    *(Sharded(shards, rows=(3, 2, 5), settings=ENTROPY) for shards in ((4, 3), (2, 0, 9))),
    *(Sharded((6, 7), settings=settings, special=True) for settings in SETTINGS),
    Sharded((6, 7), offset=2.0**24, settings=ENTROPY),
    Sharded((6, 7), rows=(0,), settings=ENTROPY),
    Sharded((40, 3), rows=(2_000,), settings=ENTROPY),
]


def parts_of(result):
    return result if isinstance(result, tuple) else (result,)


def total(result):
    """Of both results, with upstream gradients that differ between them and between rows."""
    scales = (0.5, -1.0)
    return sum(
        (part.double() * torch.linspace(scale, 2, part.numel(), dtype=torch.float64).view(part.shape)).sum()
        for part, scale in zip(parts_of(result), scales, strict=False)
    )


def detached(result):
    return tuple(part.detach() for part in parts_of(result))


def in_rank(rank, cases):
    out = []
    for case in cases:
        leaf = case.of_rank(rank, case.logits()).clone().requires_grad_()
        result = vocab_parallel_token_log_probs(leaf, case.target(), **case.settings)
        out.append((*detached(result), torch.autograd.grad(total(result), leaf)[0]))
    return out


def in_one_process(case, dtype):
    leaf = case.logits().to(dtype).requires_grad_()
    result = mbperf.token_log_probs(leaf, case.target(), **case.settings)
    return *detached(result), torch.autograd.grad(total(result), leaf)[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_agrees_with_one_process(world, size):
    cases = [case for case in CASES if len(case.classes) == size]
    ranks = world.run(size, in_rank, cases)
    for number, case in enumerate(cases):
        whole, exact = in_one_process(case, case.dtype), in_one_process(case, torch.float64)
        each = [rank[number] for rank in ranks]
        for index in range(len(whole) - 1):
            assert all(torch.equal(its[index].nan_to_num(7), each[0][index].nan_to_num(7)) for its in each)
            # Also of half precision both values are in float32.
            of_values = torch.float64 if case.dtype == torch.float64 else torch.float32
            assert_no_worse(each[0][index], whole[index], exact[index].double(), of_values)
        grad = torch.cat([its[-1] for its in each], 1)
        assert_no_worse(grad, whole[-1], exact[-1], case.dtype)


# From hidden states

LAYERS = {1: [(13,)], 2: [(20, 9), (0, 11)], 3: [(9, 1, 12)]}
LINEAR_CASES = [
    ({"return_entropy": True}, torch.float32),
    ({"temperature": 0.7, "memory_budget": 0}, torch.float32),
    ({"temperature": 1.6, "return_entropy": True, "memory_budget": 300}, torch.float32),
    ({"return_entropy": True, "memory_budget": 300}, torch.float64),
    ({"return_entropy": True, "memory_budget": 300}, torch.bfloat16),
]


def linear_in_rank(rank, shards, sequence_parallel):
    out = []
    start = sum(shards[:rank])
    mine = slice(start, start + shards[rank])
    for settings, dtype in LINEAR_CASES:
        input, weight, bias, target = layer(sum(shards), dtype)
        if sequence_parallel:
            input = input.chunk(len(shards))[rank]
        x, w, b = (t.clone().requires_grad_() for t in (input, weight[mine], bias[mine]))
        result = vocab_parallel_linear_token_log_probs(
            x, w, target, local_bias=b, sequence_parallel=sequence_parallel, **settings
        )
        out.append((detached(result), torch.autograd.grad(total(result), (x, w, b))))
    return out


def linear_in_one_process(classes, settings, dtype, compute_dtype):
    leaves = [t.to(compute_dtype).requires_grad_() for t in layer(classes, dtype)[:3]]
    settings = {name: value for name, value in settings.items() if name != "memory_budget"}
    result = mbperf.token_log_probs(F.linear(*leaves), layer(classes, dtype)[3], **settings)
    return *detached(result), *torch.autograd.grad(total(result), leaves)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_hidden_states_agree_with_one_process(world, size, sequence_parallel):
    for shards in LAYERS[size]:
        ranks = world.run(size, linear_in_rank, shards, sequence_parallel)
        for number, (settings, dtype) in enumerate(LINEAR_CASES):
            exact = linear_in_one_process(sum(shards), settings, dtype, torch.float64)
            whole = linear_in_one_process(sum(shards), settings, dtype, dtype)
            values, grads = zip(*(rank[number] for rank in ranks), strict=True)
            assert all(all(map(torch.equal, its, values[0])) for its in values)
            of_input = torch.cat([grad[0] for grad in grads]) if sequence_parallel else grads[0][0]
            ours = *values[0], of_input, *(torch.cat([grad[i] for grad in grads]) for i in (1, 2))
            for mine, one, right in zip(ours, whole, exact, strict=True):
                assert_no_worse(mine, one, right, dtype)


# What a call sends, and what goes wrong

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 4, 5])


def sent_by(call):
    """What the profiler records of the process group in a call, and the call's result."""
    with profiler.profile() as recorded:
        result = call()
    return [event.name for event in recorded.function_events if event.name.startswith("gloo:")], result


def collectives(rank):
    leaf, sent = LOGITS.clone().requires_grad_(), []
    vocab_parallel_token_log_probs(leaf, TARGET)  # where this rank's classes begin is known from here on
    for entropy in (False, True):
        forward, result = sent_by(
            lambda entropy=entropy: vocab_parallel_token_log_probs(leaf, TARGET, return_entropy=entropy)
        )
        sent += [forward, sent_by(total(result).backward)[0]]
    return sent


def test_one_collective_forward_and_none_backward(world):
    for sent in world.run(2, collectives):
        assert sent == [["gloo:all_gather"], []] * 2


def outcome(rank, target=TARGET, logits=LOGITS, **settings):
    try:
        vocab_parallel_token_log_probs(logits, target, **settings)
    except (IndexError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


DISAGREEMENTS = {
    "temperature": {"temperature": 0.5},
    "return_entropy": {"return_entropy": True},
    "ignore_index": {"ignore_index": 5},
    "out_dtype": {"out_dtype": torch.float64},
    "N": {"logits": LOGITS[:5], "target": TARGET[:5]},
    "different targets": {"target": TARGET.flip(0).repeat(7)},
}


def faults(rank):
    """Of targets that no rank owns, then what rank 1 alone does; after each a call that works."""
    said = [outcome(rank, torch.tensor([0, 1, 2, 3, 4, 12])), outcome(rank, TARGET - 1)]
    for number, change in enumerate(DISAGREEMENTS.values()):
        # New sizes on all ranks first: those are compared before anything is sent.
        rows = {"logits": LOGITS.repeat(number + 2, 1), "target": TARGET.repeat(number + 2)}
        said.append(outcome(rank, **(rows | change if rank == 1 else rows)))
        assert outcome(rank) == ("nothing", "")
    return said


def test_faults_are_raised_on_every_rank(world):
    for above, below, *disagreements in world.run(3, faults):
        assert above == ("IndexError", "Target 12 is out of bounds.")
        assert below == ("IndexError", "Target -1 is out of bounds.")
        for name, (kind, text) in zip(DISAGREEMENTS, disagreements, strict=True):
            assert kind == "RuntimeError"
            assert text.startswith("vocab_parallel_token_log_probs: ")
            assert name in text


def derivatives(rank):
    leaf, target = LOGITS.clone().requires_grad_(), TARGET.clone()
    result = vocab_parallel_token_log_probs(leaf, target, return_entropy=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(total(result), leaf, create_graph=True)
    result = vocab_parallel_token_log_probs(leaf, target, return_entropy=True)
    entropy_alone = torch.autograd.grad(result[1].sum(), leaf, retain_graph=True)[0]
    target.data[0] = 99
    with pytest.raises(IndexError, match="Target 99 is out of bounds"):
        total(result).backward()
    return entropy_alone


def test_each_output_alone_and_targets_that_change(world):
    whole = torch.cat([LOGITS] * 2, 1).requires_grad_()
    mbperf.token_log_probs(whole, TARGET, return_entropy=True)[1].sum().backward()
    torch.testing.assert_close(torch.cat(world.run(2, derivatives), 1), whole.grad)


def compiled(rank):
    leaf = LOGITS.clone().requires_grad_()

    def step(logits, target):
        return total(vocab_parallel_token_log_probs(logits, target, return_entropy=True, temperature=0.8))

    results = [f(leaf, TARGET) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    return [(result.detach(), torch.autograd.grad(result, leaf)[0]) for result in results]


def test_the_compiler_sees_one_graph(world):
    for eager, traced in world.run(2, compiled):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a number between 1e-30 and 1e30, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be float32"),
        ({"local_logits": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "local_logits must be float32"),
        ({"target": torch.zeros(4)}, RuntimeError, "expected target of class indices"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_named(call, error, message):
    call = {"local_logits": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.int64)} | call
    with pytest.raises(error, match=f"vocab_parallel_token_log_probs: {message}"):
        vocab_parallel_token_log_probs(**call)
