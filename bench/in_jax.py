"""The mean cross entropy of a JAX user, jitted, on the very memory of torch's tensors (DLPack, no copy)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mbperf.require import require


def step(backward: bool) -> Callable[[Tensor, Tensor], tuple[Any, ...]]:
    """The function that is timed: the loss, with `backward` also its gradient, until both are ready.

    Args:
        backward: jax.value_and_grad, or the loss alone.
    """
    jax = require("jax", extra="jax")
    jax.config.update("jax_enable_x64", True)  # targets are int64

    def loss(logits: Any, target: Any) -> Any:
        # optax.softmax_cross_entropy_with_integer_labels, over the classes of any rank
        picked = jax.numpy.take_along_axis(logits, jax.numpy.expand_dims(target, 1), axis=1)
        return (jax.nn.logsumexp(logits, axis=1) - picked.squeeze(1)).mean()

    jitted = jax.jit(jax.value_and_grad(loss) if backward else loss)
    met: dict[int, tuple[Any, ...]] = {}

    def run(input: Tensor, target: Tensor) -> tuple[Any, ...]:
        if id(input) not in met:
            met[id(input)] = _view(jax, input), _view(jax, target), input
        result = jax.block_until_ready(jitted(*met[id(input)][:2]))
        return result if backward else (result,)

    return run


def _view(jax: Any, tensor: Tensor) -> Any:
    array = jax.dlpack.from_dlpack(tensor.detach())
    if array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise RuntimeError(
            "jax copied an input: it would not see what the judge changes, nor the same memory"
        )
    return array
