"""The lesson's data: 50,000 images of handwritten digits to train on, 10,000 to validate on.

MNIST where it can be had; else real digits that come with the package, so that everything runs without
a network. One line says which they are.
"""

import os
from pathlib import Path

from torch import Tensor

from mbperf.lesson.digits import embedded_digits
from mbperf.lesson.mnist import CACHE_VARIABLE, cache_folder, download_mnist, has_mnist, read_mnist

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def get_data(source: str | os.PathLike[str] = "auto") -> Digits:
    """Return x_train, y_train, x_valid, y_valid.

    The torch equivalent is `torchvision.datasets.MNIST`, split and scaled by hand.

    Args:
        source: "auto": MNIST from the cache, else downloaded once into it, else the embedded digits;
            "mnist": the same, but an error in place of the embedded digits;
            "embedded": the embedded digits, no matter what the cache holds;
            anything else: a folder that holds MNIST's IDX files, gzipped or not.
            The cache is the folder named by the environment variable MBPERF_DATA, or pooch's for "mbperf".

    Returns:
        Images (50000, 784) and (10000, 784) float32 in [0, 1]; labels (50000,) and (10000,) int64.
        The same source gives the same tensors.

    Raises:
        ValueError: a file is truncated, too long or damaged; names the file and the field.
        FileNotFoundError: `source` is a folder that lacks one of the files.
        OSError, ImportError: "mnist", and MNIST cannot be had.

    Source: fast.ai part 2 (2019), lesson 8, `get_data`; the data: `mnist.py`, `digits.py` beside this.

    >>> x_train, y_train, x_valid, y_valid = get_data("embedded")  # doctest: +ELLIPSIS
    get_data: the embedded digits, ...
    >>> x_train.shape, y_valid.shape
    (torch.Size([50000, 784]), torch.Size([10000]))
    """
    if source == "embedded":
        return _embedded("as asked")
    if source not in ("auto", "mnist"):
        return read_mnist(Path(source).expanduser())
    try:
        folder = cache_folder()
        if not has_mnist(folder):
            download_mnist(folder)
    except (OSError, ImportError) as error:
        if source == "mnist":
            raise
        return _embedded(str(error).removeprefix("get_data: "))
    # Outside the try: a damaged file in the cache is an error to see, not a reason to take other data.
    return read_mnist(folder)


def _embedded(reason: str) -> Digits:
    print(
        f"get_data: the embedded digits, 1,797 real ones enlarged and varied to 50,000 + 10,000 ({reason}). "
        f"For MNIST, be online once, or put its IDX files in the folder that {CACHE_VARIABLE} names."
    )
    return embedded_digits()
