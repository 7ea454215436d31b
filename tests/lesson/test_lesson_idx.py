"""IDX files: what is good is read, everything else is refused by file and field."""

import gzip
import tracemalloc

import pytest
import torch

from mbperf.lesson.idx import read_idx

GOOD = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(250, 256))


def size(n):
    return n.to_bytes(4, "big")


@pytest.fixture(params=["file", "file.gz"])
def save(request, tmp_path):
    """Write bytes as a file, plain and gzipped."""
    path = tmp_path / request.param

    def write(content):
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


def test_reads_values_in_their_shape(save):
    values = read_idx(save(GOOD), n_dims=2)
    assert values.dtype is torch.uint8
    assert values.tolist() == [[250, 251, 252], [253, 254, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "field 'magic number' must have 4 bytes, got 0"),
        (GOOD[:3], "field 'magic number' must have 4 bytes, got 3"),
        (b"\0\0\x0d\2" + GOOD[4:], "field 'magic number' must be 0x00000802 .*, got 0x00000d02"),
        (b"\0\0\x08\1" + GOOD[4:], "field 'magic number' must be 0x00000802 .*, got 0x00000801"),
        (b"PK\3\4" + GOOD[4:], "field 'magic number' must be .* got 0x504b0304"),
        (GOOD[:6], "field 'size 0' must have 4 bytes, got 2"),
        (GOOD[:8], "field 'size 1' must have 4 bytes, got 0"),
        (GOOD[:12], "field 'values' must have 6 bytes, got 0"),
        (GOOD[:-1], "field 'values' must have 6 bytes, got 5"),
        (GOOD + b"\0", r"field 'values' must end after 6 bytes \[2, 3\], got more"),
        (GOOD[:4] + size(0) + size(3), r"fields 'size 0' to 'size 1' must make 1 to .*, got \[0, 3\]"),
        (GOOD[:4] + size(2**32 - 1) * 2 + GOOD[12:], r"fields 'size 0' .*, got \[4294967295, 4294967295\]"),
    ],
)
def test_what_is_not_an_idx_file_is_refused_by_file_and_field(content, message, save):
    path = save(content)
    with pytest.raises(ValueError, match=f"^read_idx: {path}: {message}"):
        read_idx(path, n_dims=2)


def test_every_truncation_of_a_gzipped_file_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    packed = gzip.compress(GOOD)
    for length in range(len(packed)):
        path.write_bytes(packed[:length])
        with pytest.raises(ValueError, match=f"{path}: field"):
            read_idx(path, n_dims=2)


def test_a_flipped_bit_in_a_gzipped_file_never_gives_other_values(tmp_path):
    path = tmp_path / "file.gz"
    packed = gzip.compress(GOOD)
    refused = 0
    for i in range(len(packed)):
        path.write_bytes(packed[:i] + bytes([packed[i] ^ 0x10]) + packed[i + 1 :])
        try:
            assert read_idx(path, n_dims=2).flatten().tolist() == list(GOOD[12:])
        except ValueError as error:
            assert f"{path}: field" in str(error)  # noqa: PT017 -- bits of gzip's own header may flip unseen
            refused += 1
    assert refused > len(packed) // 2


def test_a_damaged_size_does_not_ask_for_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(GOOD[:4] + size(2**32 - 1) * 2)
    tracemalloc.start()
    with pytest.raises(ValueError, match="size 0"):
        read_idx(path, n_dims=2)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_idx(tmp_path / "absent", n_dims=1)
