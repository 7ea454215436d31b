"""get_data: files in a folder or the cache, downloads from a loopback server, and what it falls back to."""

import gzip
import hashlib
import http.server
import os
import socket
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch

from mbperf.lesson import data, mnist
from mbperf.lesson.data import get_data
from mbperf.testing import test_near

N_IMAGES = 12


def idx(values, *shape):
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(values)


def image_bytes(n=N_IMAGES, seed=0):
    return torch.randint(256, (n * 784,), generator=torch.Generator().manual_seed(seed)).tolist()


IMAGES, LABELS = idx(image_bytes(), N_IMAGES, 28, 28), idx([i % 10 for i in range(N_IMAGES)], N_IMAGES)
FILES = {
    "train-images-idx3-ubyte.gz": gzip.compress(IMAGES),
    "train-labels-idx1-ubyte.gz": gzip.compress(LABELS),
    "t10k-images-idx3-ubyte.gz": gzip.compress(idx(image_bytes(2, seed=1), 2, 28, 28)),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(idx([3, 4], 2)),
}


def check_digits(got):
    """The 12 images above, split 10 and 2 in file order."""
    pixels = torch.tensor(image_bytes()).view(N_IMAGES, 784).float() / 255
    labels = torch.arange(N_IMAGES) % 10
    test_near(got, (pixels[:10], labels[:10], pixels[10:], labels[10:]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, not yet made, and no mirror but what the test names."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MBPERF_DATA", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # the mirrors of these tests
    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(mnist, "SHA256", {n: hashlib.sha256(b).hexdigest() for n, b in FILES.items()})
    return folder


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves FILES, each in the way that the test set for it, under /<way>/<name>."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        _, way, name = self.path.split("/")
        body = FILES[name]
        if way == "missing":
            self.send_error(404)
            return
        if way == "silent":
            time.sleep(1)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write({"good": body, "cut": body[:-20], "wrong": body[:-1] + b"?"}[way])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mirrors(address, cache, monkeypatch):
    """Set which ways the mirrors serve, in order; returns what is asked of them."""

    def use(*ways):
        monkeypatch.setattr(mnist, "MIRRORS", tuple(f"{address}/{way}/" for way in ways))
        monkeypatch.setattr(Mirror, "asked", [])
        return Mirror.asked

    return use


@pytest.fixture
def quick_embedded(monkeypatch):
    """A token in place of 60,000 digits, to see that get_data fell back to them."""
    monkeypatch.setattr(data, "embedded_digits", lambda: "embedded")
    return "embedded"


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("kind", ["plain", "gzipped", "mixed"])
def test_reads_a_local_folder(kind, tmp_path):
    for i, name in enumerate(list(FILES)[:2]):
        if kind == "gzipped" or (kind == "mixed" and i == 0):
            write(tmp_path, name, FILES[name])
        else:
            write(tmp_path, name.removesuffix(".gz"), gzip.decompress(FILES[name]))
    check_digits(get_data(tmp_path))
    check_digits(get_data(str(tmp_path)))


def test_local_folder_without_the_files_says_which(tmp_path):
    write(tmp_path, "train-images-idx3-ubyte", IMAGES)
    with pytest.raises(FileNotFoundError, match=f"no train-labels-idx1-ubyte .*in {tmp_path}"):
        get_data(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte .*in nowhere"):
        get_data("nowhere")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, idx([0] * 11, 11), r"labels\S*: field 'size 0' must be 12.*got 11"),
        (IMAGES, idx([10] + [0] * 11, 12), r"labels\S*: field 'values' must be 0 to 9, got 10"),
        (idx([0] * 12 * 27 * 28, 12, 27, 28), LABELS, r"images\S*: fields 'size 0' .*got \[12, 27, 28\]"),
        (idx([0] * 5 * 784, 5, 28, 28), LABELS, r"images\S*: fields 'size 0' .*got \[5, 28, 28\]"),
        (LABELS, LABELS, r"images\S*: field 'magic number' must be 0x00000803"),
        (IMAGES[:-1], LABELS, r"images\S*: field 'values' must have 9408 bytes, got 9407"),
        (IMAGES + b"x", LABELS, r"images\S*: field 'values' must end after 9408 bytes"),
    ],
    ids=["counts", "label", "rows", "few", "swapped", "truncated", "long"],
)
def test_files_that_do_not_fit_are_refused_by_file_and_field(images, labels, message, tmp_path):
    write(tmp_path, "train-images-idx3-ubyte", images)
    write(tmp_path, "train-labels-idx1-ubyte", labels)
    with pytest.raises(ValueError, match=message):
        get_data(tmp_path)


def test_a_full_cache_needs_no_network_and_no_pooch(cache, monkeypatch):
    for name in list(FILES)[:2]:
        write(cache, name, FILES[name])
    monkeypatch.setitem(sys.modules, "pooch", None)
    check_digits(get_data())
    check_digits(get_data("mnist"))


def test_a_damaged_file_in_the_cache_is_an_error_not_other_data(cache):
    write(cache, "train-images-idx3-ubyte.gz", FILES["train-images-idx3-ubyte.gz"][:-30])
    write(cache, "train-labels-idx1-ubyte.gz", FILES["train-labels-idx1-ubyte.gz"])
    with pytest.raises(ValueError, match=f"{cache}/train-images-idx3-ubyte.gz: field 'gzip stream'"):
        get_data()


def test_downloads_once(mirrors, cache, capfd):
    asked = mirrors("good")
    check_digits(get_data())
    assert sorted(asked) == sorted(f"/good/{name}" for name in FILES)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES
    check_digits(get_data())
    assert len(asked) == len(FILES)
    assert capfd.readouterr() == ("", "")


def test_downloads_only_what_is_missing(mirrors, cache):
    write(cache, "train-images-idx3-ubyte", IMAGES)
    asked = mirrors("good")
    check_digits(get_data())
    assert "/good/train-images-idx3-ubyte.gz" not in asked
    assert len(asked) == 3


@pytest.mark.parametrize("first", ["missing", "cut", "wrong"])
def test_the_second_mirror_helps_out(first, mirrors, cache):
    asked = mirrors(first, "good")
    check_digits(get_data("mnist"))
    assert asked == [f"/{way}/{name}" for name in FILES for way in (first, "good")]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES


@pytest.mark.parametrize(
    ("way", "reason"),
    [("missing", "404"), ("cut", "20 more expected"), ("wrong", "hash"), ("silent", "timed out")],
)
def test_when_every_mirror_fails_nothing_is_left_and_one_line_is_said(
    way, reason, mirrors, cache, capfd, monkeypatch, quick_embedded
):
    monkeypatch.setattr(mnist, "TIMEOUT_S", (0.2, 0.2))
    asked = mirrors(way, way)
    assert get_data() == quick_embedded
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert "embedded digits" in out
    assert reason in out
    assert "MBPERF_DATA" in out
    assert err == ""
    # One file from both mirrors; the others are not waited for.
    assert len(asked) == 2
    assert list(cache.iterdir()) == []
    with pytest.raises(OSError, match=f"cannot download train-images-idx3-ubyte.gz: .*{reason}"):
        get_data("mnist")


def test_a_mirror_that_refuses_connections_is_given_up_at_once(cache, monkeypatch, quick_embedded):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{unused.getsockname()[1]}/",))
        assert get_data() == quick_embedded
    with pytest.raises(OSError, match="Connection refused"):
        get_data("mnist")


@pytest.mark.parametrize(
    ("delay_s", "reason"), [(0, "Name or service not known"), (1, "not resolved within 0.1 s")]
)
def test_a_name_that_does_not_resolve_is_given_up_soon(delay_s, reason, cache, monkeypatch, quick_embedded):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def unknown(*args, **kwargs):
        time.sleep(delay_s)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(mnist, "TIMEOUT_S", (0.1, 0.1))
    monkeypatch.setattr(mnist, "MIRRORS", ("https://one.invalid/", "https://two.invalid/"))
    start = time.monotonic()
    assert get_data() == quick_embedded
    if delay_s:
        assert time.monotonic() - start < delay_s
    with pytest.raises(OSError, match=f"one.invalid: .*{reason}; two.invalid: .*{reason}"):
        get_data("mnist")


def test_a_failure_half_way_keeps_the_whole_files_only(mirrors, cache, monkeypatch, quick_embedded):
    mirrors("good")
    monkeypatch.setitem(mnist.SHA256, "train-labels-idx1-ubyte.gz", "0" * 64)
    assert get_data() == quick_embedded
    assert [path.name for path in cache.iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_an_interrupted_download_leaves_nothing(mirrors, cache, monkeypatch):
    import requests

    mirrors("good")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_data()
    assert list(cache.iterdir()) == []


def test_without_pooch_the_line_says_how_to_get_it(cache, monkeypatch, capsys, quick_embedded):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert get_data() == quick_embedded
    assert 'pip install "mbperf[lesson]"' in capsys.readouterr().out
    with pytest.raises(ImportError, match="pooch is not installed"):
        get_data("mnist")


def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(mirrors, tmp_path, monkeypatch, quick_embedded):
    mirrors("good")
    write(tmp_path, "file", b"")
    monkeypatch.setenv("MBPERF_DATA", str(tmp_path / "file" / "cache"))
    assert get_data() == quick_embedded


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("MBPERF_DATA", "~/digits")
    assert mnist.cache_folder() == mnist.Path.home() / "digits"
    monkeypatch.delenv("MBPERF_DATA")
    assert mnist.cache_folder().name == "mbperf"


def test_embedded_is_asked_for_without_a_look_at_the_cache(cache, capsys, quick_embedded):
    write(cache, "train-images-idx3-ubyte", b"damaged")
    write(cache, "train-labels-idx1-ubyte", b"damaged")
    assert get_data("embedded") == quick_embedded
    assert capsys.readouterr().out.startswith("get_data: the embedded digits")
    assert sorted(os.listdir(cache)) == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]


def test_the_real_mirrors_and_hashes_are_those_of_mnist():
    assert [url.split("/")[2] for url in mnist.MIRRORS] == [
        "ossci-datasets.s3.amazonaws.com",
        "storage.googleapis.com",
    ]
    assert mnist.SHA256 == {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }
