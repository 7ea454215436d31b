"""What is read off logits, on a GPU: the groups of the CPU's benchmarks, on inputs that are made there.

Log-probabilities with entropies, KL divergence, a loss with statistics, soft-capped losses: fused against the
ways people write them and torch.compile of these, against the memory limit. Kernel time by captured graphs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_cross_entropy_stats as stats
import bench_kl_div as kl_div
import bench_softcap as softcap
import bench_token_log_probs as tokens
import pytest
import torch
from cases import (
    FORWARD_BACKWARD,
    LARGE_TOKENS,
    NO_GRAD,
    SHAPES,
    KlDivCase,
    SoftcapCase,
    StatsCase,
    TokenCase,
)

from mbperf.measure.gpu_group import measure_on_gpu
from mbperf.measure.group import Group

LARGE = LARGE_TOKENS[0]
# The largest first: where the time for all is short, the last ones are cut. Of smaller logits than these a
# rotation past the cache takes hundreds of sets.
GRID = [(*LARGE.shape, LARGE.why)]
GRID += [
    (rows, classes, why)
    for (rows, classes, *inner), why, _ in SHAPES
    if not inner and rows * classes >= 500_000
]


def there(make: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function's new tensors lie on the GPU."""

    def on_gpu(*args: Any) -> Any:
        with torch.device("cuda"):
            return make(*args)

    return on_gpu


def moved(group: Group, *, compiled: bool) -> Group:
    """A group of the CPU's benchmarks as one of the GPU; floors and peak memory are the CPU's."""
    more = {name: make() for name, make in group.optional.items()} if compiled else {}
    return replace(
        group,
        case=f"cuda {group.case}",
        make_inputs=there(group.make_inputs),
        expected=there(group.expected),
        contenders={**group.contenders, **more},
        optional={},
        floors={},
        extra_metrics={},
        facts={**group.facts, "device": "cuda", "timing": "events around graphs"},
        measured_by=partial(measure_on_gpu, eager=False),
    )


def groups() -> list[Group]:
    made = []
    for rows, classes, why in GRID:
        shape, dtype = (rows, classes), torch.bfloat16
        of_shape = [
            tokens.group(TokenCase(shape, why, FORWARD_BACKWARD, dtype, temperature=0.7)),
            kl_div.group(KlDivCase(shape, why, dtype)),
            stats.group(StatsCase(shape, why, FORWARD_BACKWARD, dtype)),
            softcap.group(SoftcapCase(shape, why, dtype)),
        ]
        # Compiling takes seconds each.
        made += [moved(group, compiled=shape == LARGE.shape) for group in of_shape]
    more = [
        TokenCase(
            LARGE.shape, "the log-probabilities of the old policy", NO_GRAD, LARGE.dtype, entropy=False
        ),
        TokenCase(LARGE.shape, "float32 logits", FORWARD_BACKWARD),
    ]
    return made + [moved(tokens.group(case), compiled=False) for case in more]


if torch.cuda.is_available():

    @pytest.mark.race(groups())
    def test_off_logits_cuda(race):
        race()

else:

    @pytest.mark.skip(reason="no CUDA device")
    def test_off_logits_cuda():
        """Visible where there is nothing to race on."""
