"""The made-up detections, and that they can be evaluated."""

import json
import subprocess
import sys

from benchmarks.coco_evaluation import DETECTIONS, IMAGES, SMALL, MadeUp
from tests.conftest import ROOT


def test_a_small_evaluation(tmp_path):
    command = [sys.executable, "-m", "benchmarks.coco_evaluation", "--small"]
    subprocess.run([*command, f"--json={tmp_path / 'a.json'}"], cwd=ROOT, check=True)
    report = json.loads((tmp_path / "a.json").read_text())
    [row], scores = report["rows"], report["scores"]
    assert row["images"] == IMAGES // SMALL
    assert row["detections"] == row["images"] * DETECTIONS
    assert 0.1 < scores["mask"]["map"] < scores["box"]["map"] < 0.6


def test_objects_are_as_many_as_in_coco():
    data = MadeUp(100).ground_truth()
    assert 5 < len(data["annotations"]) / len(data["images"]) < 10
