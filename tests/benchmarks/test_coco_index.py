"""The made-up data set, and what is measured on it."""

import json
import subprocess
import sys

from benchmarks.coco_index import ANNOTATIONS, IMAGES, SMALL
from tests.conftest import ROOT


def test_a_small_data_set(tmp_path):
    command = [sys.executable, "-m", "benchmarks.coco_index", "--small"]
    command += [f"--folder={tmp_path / 'coco'}", f"--json={tmp_path / 'a.json'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [row] = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert 0.95 * IMAGES < row["images"] * SMALL < IMAGES
    assert 0.4 < row["file MB"] * SMALL / 448 < 1.3
    assert row["pickled MB"] * 1e6 < 40 * ANNOTATIONS / SMALL
    assert row["peak MB"] > row["imports alone MB"] > 0
