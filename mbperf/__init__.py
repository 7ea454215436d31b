"""The loss and the batch of a mini-batch training loop at the speed of memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbperf import memory
    from mbperf.ops.collate import Collate, collate
    from mbperf.ops.cross_entropy import CrossEntropyLoss, cross_entropy
    from mbperf.ops.cross_entropy_stats import LossAndStats, cross_entropy_with_stats
    from mbperf.ops.dataset import TensorDataset
    from mbperf.ops.gather import gather
    from mbperf.ops.kl_div import kl_div_from_logits
    from mbperf.ops.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
    from mbperf.ops.linear_token_log_probs import linear_token_log_probs
    from mbperf.ops.token_log_probs import token_log_probs

__all__ = [
    "Collate",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LossAndStats",
    "TensorDataset",
    "collate",
    "cross_entropy",
    "cross_entropy_with_stats",
    "gather",
    "kl_div_from_logits",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "memory",
    "token_log_probs",
]

_ROOMS = {
    "Collate": "mbperf.ops.collate",
    "CrossEntropyLoss": "mbperf.ops.cross_entropy",
    "LinearCrossEntropyLoss": "mbperf.ops.linear_cross_entropy",
    "LossAndStats": "mbperf.ops.cross_entropy_stats",
    "TensorDataset": "mbperf.ops.dataset",
    "collate": "mbperf.ops.collate",
    "cross_entropy": "mbperf.ops.cross_entropy",
    "cross_entropy_with_stats": "mbperf.ops.cross_entropy_stats",
    "gather": "mbperf.ops.gather",
    "kl_div_from_logits": "mbperf.ops.kl_div",
    "linear_cross_entropy": "mbperf.ops.linear_cross_entropy",
    "linear_token_log_probs": "mbperf.ops.linear_token_log_probs",
    "token_log_probs": "mbperf.ops.token_log_probs",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `mbperf --help` and pytest's plugin must be quick (torch takes 1.5 s), and
    # `mbperf doctor` must run where the extension, or torch itself, does not load.
    if name == "memory":
        return import_module("mbperf.memory")
    if name not in _ROOMS:
        raise AttributeError(f"module 'mbperf' has no attribute {name!r}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
