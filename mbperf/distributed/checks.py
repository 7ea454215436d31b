"""Checks of what the functions over sharded classes are given: errors name the function and the argument."""

import torch
from torch import Tensor
from torch import distributed as dist

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_and_size(function: str, group: dist.ProcessGroup | None) -> tuple[str, int]:
    """Return the name of a group, by default of all ranks, and how many ranks it has."""
    if not dist.is_initialized():
        raise RuntimeError(f"{function}: torch.distributed is not initialised; call init_process_group first")
    chosen = group or dist.group.WORLD
    assert chosen is not None
    return chosen.group_name, dist.get_world_size(chosen)


def check_dtypes(name: str, argument: str, input: Tensor, target: Tensor) -> None:
    """Raise unless `input`, called `argument`, and `target` are of dtypes that go together."""
    if input.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: {argument} must be float32, float64, bfloat16 or float16, got {input.dtype}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{name}: expected target of class indices, int64 or uint8, got {target.dtype}")
    if target.device != input.device:
        raise RuntimeError(f"{name}: {argument} is on {input.device}, target on {target.device}")


def check_shapes(name: str, logits: Tensor, target: Tensor) -> None:
    """Raise unless there is a target for each position of local logits."""
    if logits.dim() < 2:
        raise ValueError(
            f"{name}: expected local_logits (C), (N, C) or (N, C, d1, ...), got {tuple(logits.shape)}"
        )
    expected = (logits.shape[0], *logits.shape[2:])
    if target.dim() > 0 and target.shape[0] != expected[0]:
        raise ValueError(
            f"Expected input batch_size ({expected[0]}) to match target batch_size ({target.shape[0]})."
        )
    if tuple(target.shape) != expected:
        raise RuntimeError(f"{name}: expected target of shape {expected}, got {tuple(target.shape)}")


def check_layer(name: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the weight and the bias of a rank fit hidden states (N, H)."""
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"{name}: expected input (N, H) and local_weight (C_r, H), got {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(
            f"{name}: expected local_bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    for argument, tensor in {"local_weight": weight, "local_bias": bias}.items():
        if tensor is not None and (tensor.dtype, tensor.device) != (input.dtype, input.device):
            raise RuntimeError(
                f"{name}: {argument} must be {input.dtype} on {input.device} as input is, got "
                f"{tensor.dtype} on {tensor.device}"
            )


def check_rows(name: str, input: Tensor, target: Tensor, ranks: int, memory_budget: int | None) -> None:
    """Raise unless there is a target for each row of the inputs of `ranks` ranks, and a budget is one."""
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"{name}: memory_budget must be a number of bytes >= 0, got {memory_budget}")
    if target.dim() != 1 or target.shape[0] != input.shape[0] * ranks:
        raise ValueError(
            f"{name}: expected target of shape ({input.shape[0] * ranks},), got {tuple(target.shape)}"
        )


def check_out_dtype(name: str, out_dtype: torch.dtype | None) -> None:
    """Raise unless results can be of this dtype."""
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(f"{name}: out_dtype must be float32, float64, bfloat16 or float16, got {out_dtype}")
