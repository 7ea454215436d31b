"""Samples -> batch: a drop-in for default_collate, the same in the main process and in a worker."""

from typing import Any

from mbperf.extension import _C


def collate(batch: Any) -> Any:
    """Put the samples of a batch together, as `torch.utils.data.default_collate` does in the main process.

    Unlike it, collate gives the same result in a DataLoader worker (where the whole batch lies in one piece of
    shared memory), names the sample and the key path in every error, never changes a sample, and takes
    dataclasses apart field by field.

    Args:
        batch: list of samples; a sample is a tensor, numpy array, number, string, or any nesting of these in
            dicts, lists, tuples, named tuples and dataclasses. Entries of
            `torch.utils.data._utils.collate.default_collate_fn_map` are honoured.

    Returns:
        The containers of sample 0 (a tuple as a list); a field of shape (...) becomes a tensor (N, ...).

    Raises:
        RuntimeError: shapes or lengths differ.
        TypeError: a sample of a type that is not known.
        KeyError: a key of sample 0 is missing in another.
        IndexError: the batch is empty.

    >>> collate([({"x": 1.0}, 3), ({"x": 2.0}, 4)])
    [{'x': tensor([1., 2.], dtype=torch.float64)}, tensor([3, 4])]
    """
    return _C.collate(batch)
