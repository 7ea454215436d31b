"""The lesson's notebook: run from top to bottom, cleaned of what only one machine knows, made one HTML page.

`python tools/notebook.py` does it in place, which is what `make notebook` calls.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbperf.require import require

LESSON = Path("notebooks/03_minibatch_training.ipynb")
TEMPLATE = Path(__file__).with_name("notebook.html.j2")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(file: Path, timeout_s: float = 600, cells: int | None = None) -> Any:
    """Run a notebook in a fresh kernel of this Python, in its own folder.

    Args:
        file: the notebook.
        timeout_s: for each cell.
        cells: how many to run, from the top; all by default, which then are all that is returned.

    Returns:
        The notebook with its outputs, cleaned.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has its traceback.
    """
    notebook = require("nbformat", "lesson").read(file, as_version=4)
    notebook.cells = notebook.cells[:cells]
    client = require("nbclient", "lesson").NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(file.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return cleaned(client.execute())


def cleaned(notebook: Any) -> Any:
    """Return a notebook without what only one run or machine knows: versions, times."""
    from_dict = require("nbformat", "lesson").from_dict
    notebook.metadata = from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = from_dict({})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = from_dict({})
    return notebook


def html(notebook: Any) -> str:
    """Return an executed notebook as a page that stands alone: no script, font or style from elsewhere."""
    body, _ = require("nbconvert", "lesson").HTMLExporter(template_name="basic").from_notebook_node(notebook)
    template = (
        require("jinja2").Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    )
    return str(
        template.render(
            title=title(notebook),
            body=require("markupsafe").Markup(body),
            colors=require("pygments.formatters").HtmlFormatter(style="default").get_style_defs(".highlight"),
        )
    )


def title(notebook: Any) -> str:
    """Return the first heading.

    >>> from types import SimpleNamespace as Fake
    >>> title(Fake(cells=[Fake(source="# One\\ntext"), Fake(source="2")]))
    'One'
    """
    return str(notebook.cells[0].source).splitlines()[0].lstrip("# ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebook, and write it and its page."""
    parser = argparse.ArgumentParser(prog="python tools/notebook.py", description=__doc__)
    parser.add_argument("notebook", type=Path, nargs="?", default=LESSON)
    parser.add_argument("--out", type=Path, help="folder to write to; the notebook's own by default")
    args = parser.parse_args(arguments)
    notebook = executed(args.notebook)
    folder = args.out or args.notebook.parent
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / args.notebook.with_suffix(".html").name
    require("nbformat", "lesson").write(notebook, folder / args.notebook.name)
    page.write_text(html(notebook), encoding="utf-8")
    print(f"{folder / args.notebook.name} ran; open {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
