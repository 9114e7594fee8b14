"""COCO's numbers category by category: those of one evaluation by pycocotools, bit for bit."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.coco_evaluation import MadeUp
from tests.conftest import ROOT
from vssd_jax.tasks import average_precision
from vssd_jax.tasks.average_precision import NUMBERS


@pytest.fixture(scope="module")
def case():
    """Ground truth with crowds, objects without a mask and without detections; and detections."""
    source = MadeUp(20)
    data = source.ground_truth()
    images = [image["id"] for image in data["images"]]
    for annotation in data["annotations"][::7]:
        annotation["segmentation"] = None
    for annotation in data["annotations"][::10]:
        annotation["iscrowd"] = 1
    frequent = max(
        range(1, 81), key=lambda c: sum(a["category_id"] == c for a in data["annotations"])
    )
    results = [
        r for r in source.results if r["image_id"] != images[3] and r["category_id"] != frequent
    ]
    detected = {r["category_id"] for r in results}
    annotated = {a["category_id"] for a in data["annotations"]}
    assert frequent in annotated
    assert detected - annotated
    assert detected & annotated
    return data, results


def whole(dataset, results, kind, without):
    """The twelve numbers and the precision of one evaluation."""
    truth = COCO()
    truth.dataset = dataset | {"annotations": [dict(a) for a in dataset["annotations"]]}
    for annotation in truth.dataset["annotations"]:
        if kind == "segm" and annotation["segmentation"] is None:
            x, y, w, h = annotation["bbox"]
            annotation["iscrowd"] = 1
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    truth.createIndex()
    other = "segmentation" if kind == "bbox" else "bbox"
    results = [{k: v for k, v in r.items() if k != other} for r in results]
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.params.imgIds = [i for i in truth.imgs if i not in without]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = dict(zip(NUMBERS, map(float, evaluation.stats), strict=True))
    return numbers, evaluation.eval["precision"]


def assert_same(scores, expected):
    assert scores.numbers == expected[0]
    np.testing.assert_array_equal(scores.precision, expected[1])


def named(dataset, results):
    """The same with ids of images that are strings."""

    def rename(entries, key):
        return [entry | {key: f"picture {entry[key]}"} for entry in entries]

    renamed = dataset | {
        "images": rename(dataset["images"], "id"),
        "annotations": rename(dataset["annotations"], "image_id"),
    }
    return renamed, rename(results, "image_id")


@pytest.mark.parametrize(("processes", "strings"), [(1, False), (2, True)])
def test_the_numbers_are_those_of_one_evaluation(case, processes, strings):
    dataset, results = named(*case) if strings else case
    images = [image["id"] for image in dataset["images"]]
    for without in ((), {images[0], images[5]}):
        scores = average_precision.evaluate(dataset, results, without=without, processes=processes)
        assert_same(scores["box"], whole(dataset, results, "bbox", without))
        assert_same(scores["mask"], whole(dataset, results, "segm", without))
        assert 0.05 < scores["mask"].numbers["map"] < scores["box"].numbers["map"] < 0.9


def test_boxes_alone_and_an_untouched_input(case):
    dataset, results = case
    before = repr(dataset), repr(results)
    scores = average_precision.evaluate(dataset, results, masks=False)
    assert list(scores) == ["box"]
    assert_same(scores["box"], whole(dataset, results, "bbox", ()))
    assert (repr(dataset), repr(results)) == before


def test_what_is_not_there_has_no_number(case):
    dataset, results = case
    without = dataset | {"annotations": []}
    scores = average_precision.evaluate(without, results)
    assert set(scores["box"].numbers.values()) == {-1}
    # No detection of what is there.
    number = results[0]["image_id"]
    scores = average_precision.evaluate(dataset, [r for r in results if r["image_id"] != number])
    assert scores["box"].numbers["map"] > 0
    with pytest.raises(KeyError):
        average_precision.evaluate(dataset, [results[0] | {"image_id": -1}])


def end(*_):
    os._exit(3)


def test_a_process_that_ends_is_replaced_by_this_one(case, monkeypatch, capfd):
    here = average_precision.curves_of
    submit = average_precision.ProcessPoolExecutor.submit
    monkeypatch.setattr(
        average_precision.ProcessPoolExecutor,
        "submit",
        lambda pool, function, *args: submit(pool, end if function is here else function, *args),
    )
    dataset, results = case
    scores = average_precision.evaluate(dataset, results, masks=False, processes=2)
    assert_same(scores["box"], whole(dataset, results, "bbox", ()))
    assert "going on in this one" in capfd.readouterr().err


SCRIPT = """
import pickle, sys
from vssd_jax.tasks import average_precision
print("once", flush=True)
with open(sys.argv[1], "rb") as file:
    dataset, results = pickle.load(file)
scores = average_precision.evaluate(dataset, results, masks=False, processes=2)
print(scores["box"].numbers["map"], __file__ == sys.argv[0], __spec__)
"""


def test_the_processes_do_not_run_the_script_again(case, tmp_path):
    (tmp_path / "case").write_bytes(pickle.dumps(case))
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "case"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    expected = average_precision.evaluate(*case, masks=False)["box"].numbers["map"]
    assert run.stdout.splitlines() == ["once", f"{expected} True None"], run.stderr
    assert "going on in this one" not in run.stderr


def test_the_processes_do_without_jax():
    program = "import sys, vssd_jax.tasks.average_precision; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False"], run.stderr
