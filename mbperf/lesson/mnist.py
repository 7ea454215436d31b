"""MNIST's four IDX files: found in a folder, or downloaded once into the cache and checked.

The cache is the folder named by the environment variable MBPERF_DATA, or pooch's for "mbperf". A file enters
it whole and with the right sha256, or not at all.
"""

import logging
import os
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from mbperf.lesson.idx import read_idx

CACHE_VARIABLE = "MBPERF_DATA"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SHA256 = {
    f"{TRAIN_IMAGES}.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    f"{TRAIN_LABELS}.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
SIDE = 28
# Seconds to connect, and to wait for the next bytes: without a network the lesson starts all the same, soon.
TIMEOUT_S = (2.0, 10.0)
CHUNK_BYTES = 1 << 16


def cache_folder() -> Path:
    """Return where downloaded files are kept.

    Raises:
        ImportError: neither MBPERF_DATA nor pooch is there to say.

    >>> cache_folder().name == "mbperf" or CACHE_VARIABLE in os.environ
    True
    """
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(_pooch().os_cache("mbperf"))


def has_mnist(folder: Path) -> bool:
    """Tell whether `folder` holds the two files that the lesson reads, gzipped or not.

    >>> has_mnist(Path("/nowhere"))
    False
    """
    return all(_find(folder, name) is not None for name in (TRAIN_IMAGES, TRAIN_LABELS))


def read_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the training files in `folder` and split them in file order, 5 to 1: 50,000 and 10,000 of MNIST.

    Args:
        folder: holds train-images-idx3-ubyte and train-labels-idx1-ubyte, with or without .gz.

    Returns:
        x_train, y_train, x_valid, y_valid: images (n, 784) float32 in [0, 1], labels (n,) int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or images and labels do not belong together.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    >>> read_mnist(Path("/nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: get_data: no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in /nowhere
    """
    images_path, labels_path = _require(folder, TRAIN_IMAGES), _require(folder, TRAIN_LABELS)
    images, labels = read_idx(images_path, n_dims=3), read_idx(labels_path, n_dims=1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) < 6:
        raise ValueError(
            f"get_data: {images_path}: fields 'size 0' to 'size 2' must be 6 or more images of "
            f"{SIDE} x {SIDE}, got {list(images.shape)}"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"get_data: {labels_path}: field 'size 0' must be {len(images)}, the number of images in "
            f"{images_path.name}, got {len(labels)}"
        )
    if labels.max() > 9:
        raise ValueError(f"get_data: {labels_path}: field 'values' must be 0 to 9, got {int(labels.max())}")
    x, y = images.flatten(1).to(torch.float32).div_(255), labels.to(torch.int64)
    n_train = len(x) * 5 // 6
    return x[:n_train], y[:n_train], x[n_train:], y[n_train:]


def download_mnist(folder: Path) -> None:
    """Download those of MNIST's four files that `folder` lacks, each from the first mirror that has it.

    Args:
        folder: made if it is not there.

    Raises:
        OSError: no mirror could be reached, or gave the file with the right sha256; says which and why.
            Nothing of that file is left in `folder`.
        ImportError: pooch is not installed.
    """
    _pooch()
    for name in SHA256:
        if _find(folder, name.removesuffix(".gz")) is None:
            _download(name, folder)


def _download(name: str, folder: Path) -> None:
    pooch = _pooch()
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT_S, chunk_size=CHUNK_BYTES)
    reasons = []
    for mirror in MIRRORS:
        try:
            _look_up(mirror)
            pooch.retrieve(mirror + name, f"sha256:{SHA256[name]}", name, folder, downloader=downloader)
            return
        except (OSError, ValueError) as error:
            reasons.append(f"{urlsplit(mirror).netloc}: {_in_short(error)}")
    raise OSError(f"get_data: cannot download {name}: {'; '.join(reasons)}")


def _look_up(mirror: str) -> None:
    """Raise soon if the mirror's name does not resolve, for which the system may take half a minute."""
    url, proxies = urlsplit(mirror), urllib.request.getproxies()
    if url.scheme in proxies or "all" in proxies:
        return  # a proxy resolves names itself
    answer: list[OSError | None] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(url.hostname, None)
            answer.append(None)
        except OSError as error:
            answer.append(error)

    # A daemon, so that a lookup that hangs does not hold up the end of the program.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S[0])
    if not answer:
        raise TimeoutError(f"its name was not resolved within {TIMEOUT_S[0]:g} s")
    if answer[0]:
        raise answer[0]


def _in_short(error: Exception) -> str:
    """Network errors wrap each other many times over; the innermost one says why."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    words = str(cause).splitlines()
    return words[0][:120] if words else type(cause).__name__


def _pooch():  # type: ignore[no-untyped-def]
    try:
        import pooch
    except ImportError:
        raise ImportError('get_data: pooch is not installed; run: pip install "mbperf[lesson]"') from None
    # Its progress lines would come before the lesson's own.
    pooch.get_logger().setLevel(logging.WARNING)
    return pooch


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise FileNotFoundError(f"get_data: no {name} or {name}.gz in {folder}")
    return path
