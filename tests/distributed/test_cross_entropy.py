"""The loss over sharded classes against the loss of one process, in worlds of one to four ranks."""

import pytest
import torch
from sharded import Sharded, assert_no_worse, in_one_process, in_rank

SETTINGS = [
    *({"reduction": reduction} for reduction in ("mean", "sum", "none")),
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"z_loss": 1e-2},
    {"z_loss": 1e-2, "label_smoothing": 0.2, "reduction": "sum"},
    {"ignore_index": 3},
    {"return_lse": True},
    {"return_lse": True, "reduction": "none", "label_smoothing": 0.1, "z_loss": 0.1},
]
SHARDS = [(13,), (8, 5), (5, 8), (0, 6), (7, 0, 4), (1, 1, 1), (40, 3, 0, 170), (300, 300, 300, 100)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [
    *(Sharded(shards, settings=settings) for shards in SHARDS for settings in SETTINGS),
    *(Sharded((33, 20), dtype=dtype, settings=settings) for dtype in DTYPES for settings in SETTINGS),
    *(Sharded((20, 13), dtype=dtype, settings={"out_dtype": torch.float32}) for dtype in DTYPES),
    *(Sharded(shards, rows=(3, 2, 5)) for shards in ((4, 3), (2, 0, 9))),
    *(Sharded((6, 7), settings=settings, special=True) for settings in SETTINGS),
    Sharded((6, 7), offset=2.0**24),
    Sharded((6, 7), rows=(0,), settings={"reduction": "sum"}),
    Sharded((6, 7), rows=(0,)),
    Sharded((6, 7), rows=(0,), settings={"reduction": "none"}),
    Sharded((40, 3), rows=(20_000,)),
]


def parts_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_agrees_with_one_process(world, size):
    cases = [case for case in CASES if len(case.classes) == size]
    ranks = world.run(size, in_rank, cases)
    for number, case in enumerate(cases):
        results = [parts_of(rank[number][0]) for rank in ranks]
        whole, whole_grad = in_one_process(case)
        exact, exact_grad = in_one_process(case, torch.float64)
        for index, (one, right) in enumerate(zip(parts_of(whole), parts_of(exact), strict=True)):
            ours = [its[index] for its in results]
            assert all(torch.equal(its.nan_to_num(7), ours[0].nan_to_num(7)) for its in ours), case
            assert_no_worse(ours[0], one, right, case.dtype), case
        grad = torch.cat([rank[number][1] for rank in ranks], 1)
        assert_no_worse(grad, whole_grad, exact_grad, case.dtype)
