"""Executes a notebook with Jupyter and stores its outputs.

    pip install nbclient ipykernel
    python -m tests.notebook examples/tour.ipynb

The tests run the same cells without Jupyter (test_notebook.py).
"""

import pathlib
import sys

import nbformat
from nbclient import NotebookClient


def main(path: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, record_timing=False).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            # Pillow gives each picture twice.
            if "image/png" in output.get("data", ()):
                output["data"].pop("image/jpeg", None)
    notebook.metadata.pop("language_info", None)  # the version of this Python
    notebook.metadata.language_info = {"name": "python"}
    pathlib.Path(path).write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
