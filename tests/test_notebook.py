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
RUN = "import sys, tests.notebook as n; n.run_plainly(*sys.argv[1:3], replaced={%r: sys.argv[3]})"
ACCURACY = r"([\d.]+)% of the held-out digits are right"


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
    everything, count = "", 0
    for cell in cells:
        text, pictures = stored(cell)
        assert bool(text) == ("print(" in "".join(cell["source"]))
        everything += text
        for picture in pictures:
            assert min(Image.open(io.BytesIO(picture)).convert("RGB").size) > 100
            count += 1
    assert count == 5
    assert not re.search(r"(?<![\w.])[/~]\w|\w:\\", everything)  # no path of a computer
    assert float(re.search(ACCURACY, everything)[1]) > 95


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_cells_run(tmp_path, steps):
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    output = tmp_path / "shown.json"
    command = [sys.executable, "-c", RUN % TRAINING, NOTEBOOK, output, f"steps = {steps}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=500)
    shown = json.loads(output.read_text())

    cells = code_cells(NOTEBOOK)
    training = [TRAINING in "".join(cell["source"]) for cell in cells].index(True)
    for number, (cell, now) in enumerate(zip(cells, shown, strict=True)):
        text, pictures = stored(cell)
        assert bool(now["picture"]) == bool(pictures)
        if number < training:
            assert now["text"] == text
        else:
            assert now["text"].count("\n") == text.count("\n")
    if steps == 200:
        assert float(re.search(ACCURACY, shown[training]["text"])[1]) > 90
    difference, largest = re.findall(r"logits?: ([\d.e+-]+)", shown[-1]["text"])
    assert float(difference) < 1e-5 * float(largest)
    # It writes to its own folder alone, and removes that; TFDS leaves an empty one.
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "shown.json"}
    assert not [path for path in folder.rglob("*") if path.is_file()]
