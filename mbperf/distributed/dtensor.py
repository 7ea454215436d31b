"""Cross entropy of DTensors: on each rank the loss of its own tensor, over sharded classes that of all ranks.

A mesh dimension may shard the classes (one at most), shard positions, or replicate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from mbperf.distributed.losses import vocab_parallel_cross_entropy
from mbperf.distributed.rows import accumulation_dtype


class _Layout(NamedTuple):
    """How logits lie: the mesh dimension of their classes, or None, and the placements of a target."""

    mesh: DeviceMesh
    class_mesh_dim: int | None
    positions: tuple[Placement, ...]

    @property
    def shards_positions(self) -> bool:
        return any(placement.is_shard() for placement in self.positions)

    def partial(self) -> list[Placement]:
        """The placements of each rank's sum over its positions."""
        return [Partial() if placement.is_shard() else Replicate() for placement in self.positions]


def cross_entropy_of_dtensor(
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    of_one_process: Callable[..., Any],
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype | None,
    z_loss: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss as a DTensor: replicated, with "none" placed as `target` is.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ...).
        target: a DTensor; or a tensor that is the same on all ranks, where no position is sharded.
        weight: one weight a class, replicated.
        of_one_process: the loss of a rank's own tensor, where classes are not sharded.
        ignore_index, reduction, label_smoothing, out_dtype, z_loss, return_lse: as for `cross_entropy`.

    Raises:
        NotImplementedError: `input` is placed in another way, or its classes are sharded and the target holds
            probabilities, or `weight` meets label smoothing or z loss.
    """
    layout = _layout_of(input)
    soft = target.is_floating_point()
    _check_supported(layout, soft, weight, label_smoothing, z_loss, reduction)
    here = _local_target(target, layout, input.placements if soft else layout.positions)
    local_weight = _replicated(weight)
    directly = reduction if not layout.shards_positions and local_weight is None else "none"
    accumulated = accumulation_dtype(input.dtype)
    loss, lse = _local_loss(
        input, here, local_weight, layout, of_one_process, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, reduction=directly,
        out_dtype=out_dtype if directly == reduction else accumulated,
    )  # fmt: skip
    shape = target.shape if not soft else torch.Size((*input.shape[:1], *input.shape[2:]))
    placed_lse = _placed(lse, layout, shape)
    if directly != reduction:
        live = torch.ones_like(loss, dtype=torch.bool) if soft else here != ignore_index
        counted = live if local_weight is None or soft else local_weight.to(accumulated)[here * live] * live
        result = _reduced(loss, counted, layout, reduction).to(out_dtype or input.dtype)
    else:
        result = _placed(loss, layout, shape if reduction == "none" else torch.Size(()))
    return (result, placed_lse) if return_lse else result


def _layout_of(input: DTensor) -> _Layout:
    class_dim = 0 if input.dim() == 1 else 1
    mesh_dims = [i for i, placement in enumerate(input.placements) if placement.is_shard(class_dim)]
    for placement in input.placements:
        if type(placement) not in (Shard, Replicate):
            raise NotImplementedError(
                f"cross_entropy: input is a DTensor with placement {placement!r}; expected Shard or "
                f"Replicate (redistribute it first)"
            )
    if len(mesh_dims) > 1:
        raise NotImplementedError(
            f"cross_entropy: the classes of input are sharded over {len(mesh_dims)} mesh dimensions, "
            f"{input.placements}; expected one at most"
        )
    positions = tuple(
        Replicate()
        if not isinstance(placement, Shard) or placement.dim == class_dim
        else Shard(placement.dim - (placement.dim > class_dim))
        for placement in input.placements
    )
    return _Layout(input.device_mesh, mesh_dims[0] if mesh_dims else None, positions)


def _check_supported(
    layout: _Layout, soft: bool, weight: Tensor | None, label_smoothing: float, z_loss: float, reduction: str
) -> None:
    if layout.class_mesh_dim is not None and soft:
        raise NotImplementedError(
            "cross_entropy: target holds probabilities, but the classes of input are sharded"
        )
    if weight is not None and z_loss:
        raise NotImplementedError("cross_entropy: weight and z_loss together are not supported for a DTensor")
    if layout.class_mesh_dim is not None and weight is not None and label_smoothing:
        raise NotImplementedError(
            "cross_entropy: weight and label_smoothing together are not supported where classes are sharded"
        )


def _local_target(target: Tensor, layout: _Layout, placements: tuple[Placement, ...]) -> Tensor:
    if isinstance(target, DTensor):
        return target.redistribute(layout.mesh, placements).to_local()
    if layout.shards_positions:
        raise ValueError(
            f"cross_entropy: target must be a DTensor where input shards positions, as {placements}"
        )
    return target


def _replicated(weight: Tensor | None) -> Tensor | None:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _local_loss(
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    layout: _Layout,
    of_one_process: Callable[..., Any],
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "out_dtype": out_dtype,
    }
    if layout.class_mesh_dim is None:
        return of_one_process(input.to_local(), target, weight, return_lse=True, **settings)
    group = layout.mesh.get_group(layout.class_mesh_dim)
    loss, lse = vocab_parallel_cross_entropy(input.to_local(), target, group, return_lse=True, **settings)
    if weight is not None:
        live = target != ignore_index
        loss = loss * weight.to(loss.dtype)[target * live]
    return loss, lse


def _placed(local: Tensor, layout: _Layout, shape: torch.Size) -> DTensor:
    placements = layout.positions if local.dim() else [Replicate()] * layout.mesh.ndim
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, layout.mesh, placements, run_check=False, shape=shape, stride=stride)


def _reduced(loss: Tensor, counted: Tensor, layout: _Layout, reduction: str) -> Tensor:
    """The sum over all positions, or their mean, replicated."""
    everywhere = [Replicate()] * layout.mesh.ndim

    def over_ranks(local: Tensor) -> DTensor:
        partial = DTensor.from_local(local.sum(), layout.mesh, layout.partial(), run_check=False)
        return partial.redistribute(layout.mesh, everywhere)

    total = over_ranks(loss)
    return total if reduction == "sum" else total / over_ranks(counted)
