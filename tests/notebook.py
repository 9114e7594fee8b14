"""Executes a notebook with Jupyter, and stores its outputs in it.

    pip install -e '.[train]' nbclient ipykernel
    python -m tests.notebook examples/tour.ipynb

The tests run the same cells without Jupyter, see `run_plainly`.
"""

import ast
import contextlib
import io
import json
import pathlib
import sys


def code_cells(path):
    """The notebook's cells of code."""
    notebook = json.loads(pathlib.Path(path).read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_plainly(path, output, *, replaced):
    """Runs the cells one after the other; nothing is displayed.

    Args:
      path: the notebook.
      output: a JSON file to write, for each cell with what it printed (`text`) and the size in
        bytes of the picture that it would show (`picture`; 0 if it shows nothing).
      replaced: text -> text of the cells; each must be there once.
    """
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    for before, after in replaced.items():
        if sum(source.count(before) for source in sources) != 1:
            raise ValueError(f"{before!r} is not there once")
        sources = [source.replace(before, after) for source in sources]
    output = pathlib.Path(output).absolute()  # the cells may go to another folder
    names, shown = {"__name__": "__main__"}, []
    for number, source in enumerate(sources, 1):
        body, value = ast.parse(source).body, None
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
            if last is not None:
                value = eval(compile(last, f"cell {number}", "eval"), names)
        picture = 0 if value is None else len(value._repr_png_())
        shown.append({"text": text.getvalue(), "picture": picture})
    output.write_text(json.dumps(shown))


def main(path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(pathlib.Path(path).parent)}}  # as Jupyter does
    client = NotebookClient(
        notebook, timeout=900, record_timing=False, coalesce_streams=True, resources=where
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            # Pillow gives each picture twice.
            if "image/png" in output.get("data", ()):
                output["data"].pop("image/jpeg", None)
    notebook.metadata.language_info = {"name": "python"}  # without the version of this one
    pathlib.Path(path).write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
