"""Read IDX files, the format of MNIST: a magic number, big-endian sizes, then the values as bytes.

Plain or gzipped. A file that is not exactly what its header says is refused, with the file and the field.
Source: the format's description by Y. LeCun, C. Cortes and C. Burges, "The MNIST database".
"""

import gzip
import io
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
# Far above MNIST's 47 MB: a damaged header must not make us ask for petabytes.
MAX_BYTES = 1 << 30
ByteFile = gzip.GzipFile | io.BufferedReader


def read_idx(path: str | Path, n_dims: int) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        n_dims: dimensions it must have: 3 for images (count, rows, columns), 1 for labels (count).

    Returns:
        uint8 tensor of the shape that the header gives.

    Raises:
        ValueError: truncated, too long, damaged or of another kind; names the file and the field.
        FileNotFoundError: no such file.

    Source: see the head of this file.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])), file.flush()
    ...     read_idx(file.name, n_dims=1)
    tensor([7, 9], dtype=torch.uint8)
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            return _read(file, path, n_dims)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"read_idx: {path}: field 'gzip stream' is damaged: {error}") from error


def _read(file: ByteFile, path: Path, n_dims: int) -> Tensor:
    magic = _exactly(file, 4, path, "magic number")
    expected = bytes([0, 0, UNSIGNED_BYTE, n_dims])
    if magic != expected:
        raise ValueError(
            f"read_idx: {path}: field 'magic number' must be 0x{expected.hex()} "
            f"(unsigned bytes, {n_dims} dimensions), got 0x{magic.hex()}"
        )
    shape = [int.from_bytes(_exactly(file, 4, path, f"size {i}"), "big") for i in range(n_dims)]
    n_bytes = math.prod(shape)
    if not 0 < n_bytes <= MAX_BYTES:
        raise ValueError(
            f"read_idx: {path}: fields 'size 0' to 'size {n_dims - 1}' must make 1 to {MAX_BYTES} values, "
            f"got {shape}"
        )
    values = _exactly(file, n_bytes, path, "values")
    # Reading past the end also makes gzip check the stream's CRC and length.
    if file.read(1):
        raise ValueError(f"read_idx: {path}: field 'values' must end after {n_bytes} bytes {shape}, got more")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(shape)


def _exactly(file: ByteFile, n_bytes: int, path: Path, field: str) -> bytes:
    got = file.read(n_bytes)
    if len(got) != n_bytes:
        raise ValueError(f"read_idx: {path}: field {field!r} must have {n_bytes} bytes, got {len(got)}")
    return got
