"""examples/tour.ipynb: its cells run, and what is stored is what they give."""

import base64
import io
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.notebook import code_cells

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
TRAINING = "steps = 200"
RUN = f"""
from tests.notebook import run_plainly
run_plainly({str(NOTEBOOK)!r}, "shown.json", replaced={{{TRAINING!r}: "steps = 20"}})
"""


def stored(cell):
    """What a cell printed, and the pictures that it showed, as they are in the file."""
    texts, pictures = [], []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            assert output["name"] == "stdout"  # neither errors nor warnings
            texts.append("".join(output["text"]))
        else:
            assert output["output_type"] == "execute_result"
            pictures.append(base64.b64decode(output["data"]["image/png"]))
    return "".join(texts), pictures


def test_what_is_stored():
    assert NOTEBOOK.stat().st_size <= 1_000_000
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    count = 0
    for cell in cells:
        text, pictures = stored(cell)
        assert bool(text) == ("print(" in "".join(cell["source"]))
        assert not re.search(r"(?<![\w.])[/~]\w|\w:\\", text)  # no path of a computer
        for picture in pictures:
            assert min(Image.open(io.BytesIO(picture)).convert("RGB").size) > 100
            count += 1
    assert count == 5
    accuracy = re.search(r"([\d.]+)% of the held-out digits", json.dumps(cells))
    assert float(accuracy[1]) > 95


@pytest.mark.parametrize("source", ["".join(cell["source"]) for cell in code_cells(NOTEBOOK)])
def test_needs_no_ipython(source):
    compile(source, "cell", "exec")


def test_cells_run(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", RUN]
    subprocess.run(command, cwd=tmp_path / "work", env=environment, check=True, timeout=500)
    shown = json.loads((tmp_path / "work" / "shown.json").read_text())

    cells = code_cells(NOTEBOOK)
    training = [TRAINING in "".join(cell["source"]) for cell in cells].index(True)
    for number, (cell, now) in enumerate(zip(cells, shown, strict=True)):
        text, pictures = stored(cell)
        assert bool(now["picture"]) == bool(pictures)
        if number < training:
            assert now["text"] == text
        else:
            assert now["text"].count("\n") == text.count("\n")
    difference, largest = re.findall(r"logits?: ([\d.e+-]+)", shown[-1]["text"])
    assert float(difference) < 1e-5 * float(largest)
    assert not list((tmp_path / "work").glob("runs"))
