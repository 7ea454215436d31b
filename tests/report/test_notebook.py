"""The lesson's notebook runs, says what it should, and lies here executed, clean and as a page of its own."""

import gzip
import html
import re
from pathlib import Path

import nbformat
import notebook
import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / notebook.LESSON
PAGE = FILE.with_suffix(".html")
MNIST = {"train-images-idx3-ubyte.gz": [28, 28], "train-labels-idx1-ubyte.gz": []}
N_MNIST = 60_000


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def is_png(output):
    return "image/png" in output.get("data", {})


def printed(cells):
    return "".join(out.get("text", "") for cell in code(cells) for out in cell.outputs)


def kinds(cells):
    """What each cell gives; a warning of another version of something is no matter."""
    return [[o.output_type for o in cell.outputs if o.get("name") != "stderr"] for cell in code(cells)]


@pytest.fixture
def kept():
    return nbformat.read(FILE, as_version=4)


@pytest.fixture
def no_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("MBPERF_DATA", str(tmp_path))
    monkeypatch.setenv("MBPERF_NOTEBOOK", "short")


def test_it_runs_from_top_to_bottom_on_the_embedded_digits(no_mnist, kept):
    done = notebook.executed(FILE)
    assert [cell.source for cell in done.cells] == [cell.source for cell in kept.cells]
    assert "embedded: (50000, 784) to train on" in printed(done.cells)
    assert "[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]" in printed(done.cells)
    assert kinds(done.cells) == kinds(kept.cells)


def test_it_takes_mnist_where_the_cache_holds_it(no_mnist, tmp_path):
    """Files of MNIST's format and size; what is in them is the business of get_data's own tests."""
    for name, shape in MNIST.items():
        sizes = b"".join(size.to_bytes(4, "big") for size in [N_MNIST, *shape])
        body = bytes(N_MNIST * (shape[0] * shape[1] if shape else 1))
        (tmp_path / name).write_bytes(gzip.compress(bytes([0, 0, 8, 1 + len(shape)]) + sizes + body, 1))
    with_data = next(i for i, cell in enumerate(notebook_cells()) if "get_data(source)" in cell.source)
    assert "mnist: (50000, 784) to train on" in printed(notebook.executed(FILE, cells=with_data + 1).cells)


def notebook_cells():
    return nbformat.read(FILE, as_version=4).cells


def test_both_ways_to_train_have_to_be_accurate(kept):
    asserted = [
        cell.source for cell in code(kept.cells) if re.search(r"^assert .*_acc > 0\.95$", cell.source, re.M)
    ]
    assert len(asserted) == 2
    assert "mbperf.cross_entropy" in asserted[1]


def test_it_is_kept_executed_and_knows_no_machine(kept):
    assert [cell.execution_count for cell in code(kept.cells)] == list(range(1, len(code(kept.cells)) + 1))
    assert all(cell.metadata == {} for cell in kept.cells)
    assert kept.metadata == notebook.METADATA
    for file in (FILE, PAGE):
        assert not re.findall(r"/(?:work|home|root|tmp|usr)/", file.read_text()), file
        assert file.stat().st_size < 2e6


def test_its_pictures_are_there(kept):
    pictures = [
        out for cell in code(kept.cells) for out in cell.outputs if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 3  # digits, curves, ladder


def test_its_page_is_made_of_it_and_needs_nothing_else(kept):
    text = PAGE.read_text()
    outputs = [
        out.data["image/png"].strip() for cell in code(kept.cells) for out in cell.outputs if is_png(out)
    ]
    assert all(picture.replace("\n", "") in text.replace("\n", "") for picture in outputs), (
        "run: make notebook"
    )
    assert all(html.escape(line, quote=False) in text for line in printed(kept.cells).splitlines()), (
        "run: make notebook"
    )
    assert text.count('class="highlight') == len(code(kept.cells))
    assert not re.findall(r"<script|<link|@import|url\(|src=[\"'](?!data:)", text)
    assert text.count("<img") == 3
