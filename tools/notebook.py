"""Writes ``examples/t4_notebook.ipynb`` from its ``.py``; with ``--run`` runs it without its installation.

It needs jupytext and, to run it, nbclient and ipykernel: ``tox -e notebook``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext

SOURCE = Path(__file__).parents[1] / "examples" / "t4_notebook.py"


def main(arguments: list[str]) -> None:
    """Write it; or run it in a temporary folder, and end with 1 where a cell raises or a promise is not kept."""
    notebook = jupytext.read(SOURCE)
    if arguments != ["--run"]:
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # not drawn at random: the file changes where the source does
        jupytext.write(notebook, SOURCE.with_suffix(".ipynb"))
        return
    from nbclient import NotebookClient

    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    sys.stdout.write(said)
    if "baseline: kept" not in said:
        sys.exit("the notebook's verdict on the baseline is not that it is kept")


if __name__ == "__main__":
    main(sys.argv[1:])
