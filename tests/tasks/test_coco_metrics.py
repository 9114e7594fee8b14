import os

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.datasets import digits_detection
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import eval_transform
from vssd_jax.models.mask_rcnn import Detections
from vssd_jax.tasks import coco_metrics


def dataset(folder):
    folder = digits_detection.prepare(folder, train=2, test=4)
    return CocoSource(folder / "test", folder / "annotations/instances_test.json")


def perfect(source, batch, wrong=0):
    """Detections that are the ground truth, the first `wrong` of each image with another class."""
    count = 6
    fields = {
        "boxes": np.zeros((len(source), count, 4)),
        "scores": np.linspace(0.9, 0.5, count)[None].repeat(len(source), 0),
        "labels": np.zeros((len(source), count), np.int32),
        "valid": np.zeros((len(source), count), bool),
        "masks": np.full((len(source), count, 28, 28), -9.0),
    }
    for i in range(len(source)):
        element = source[i]
        # As if the network had seen the image at twice its size.
        for k, (box, label, code) in enumerate(
            zip(element["boxes"], element["labels"], element["segmentations"], strict=True)
        ):
            fields["boxes"][i, k] = 2 * box
            fields["labels"][i, k] = (label + (k < wrong)) % 10
            fields["valid"][i, k] = True
            x1, y1, x2, y2 = box.astype(int)
            mask = rasterise(code, element["size"])[y1:y2, x1:x2]
            small = Image.fromarray(mask * 255).resize((28, 28), Image.Resampling.BILINEAR)
            fields["masks"][i, k] = np.asarray(small) / 12.75 - 10
    batch["image_shape"] = 2 * batch["original_shape"]
    return Detections(**fields)


def whole_batch(source):
    decoded = DecodedSource(source)
    elements = [eval_transform(decoded[i], short_side=128, long_side=160,
                                    shapes=(digits_detection.SIZE,))
                for i in range(len(source))]  # fmt: skip
    return {name: np.stack([e[name] for e in elements]) for name in elements[0]}


def test_perfect_detections_score_one_in_original_coordinates(tmp_path):
    source = dataset(tmp_path)
    batch = whole_batch(source)
    results = coco_metrics.to_results(perfect(source, batch), batch, source)
    assert {r["category_id"] for r in results} <= set(range(1, 11))
    scores = coco_metrics.evaluate(source, results)
    assert set(scores["box"]) == set(coco_metrics.NUMBERS)
    assert scores["box"]["map"] > 0.999
    assert scores["mask"]["ap50"] > 0.999
    assert scores["mask"]["map"] > 0.7
    batch["valid"] = np.array([True, False, False, False])
    fewer = coco_metrics.to_results(perfect(source, batch), batch, source)
    assert {r["image_id"] for r in fewer} == {0}


def test_nothing_found_scores_zero(tmp_path):
    scores = coco_metrics.evaluate(dataset(tmp_path), [])
    assert scores["box"]["map"] == scores["mask"]["map"] == 0


def test_saved_predictions_give_the_same_numbers_to_pycocotools(tmp_path, capsys):
    source = dataset(tmp_path)
    batch = whole_batch(source)
    results = coco_metrics.to_results(perfect(source, batch, wrong=1), batch, source)
    scores = coco_metrics.evaluate(source, results)
    assert 0.1 < scores["box"]["map"] < 0.95
    folder = tmp_path / "predictions"
    coco_metrics.save_predictions(folder, source, DecodedSource(source), results)
    pictures = [f"{i}.png" for i in range(4)]
    assert sorted(os.listdir(folder)) == sorted(["bbox.json", "segm.json", *pictures])
    truth = COCO(str(source.annotations))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        evaluation = COCOeval(truth, truth.loadRes(str(folder / f"{name}.json")), name)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        np.testing.assert_allclose(evaluation.stats, list(scores[kind].values()))
    picture = np.asarray(Image.open(folder / "0.png"))
    original = np.asarray(Image.open(source.folder / "000000.png"))
    scale = picture.shape[1] // original.shape[1]  # small pictures are drawn larger
    original = original.repeat(scale, 0).repeat(scale, 1)
    changed = (picture[: len(original)] != original).any(-1)
    assert 0.02 < changed.mean() < 0.9


def test_pictures_that_could_not_be_read_are_left_out(tmp_path):
    source = dataset(tmp_path)
    batch = whole_batch(source)
    results = coco_metrics.to_results(perfect(source, batch), batch, source)
    some = [r for r in results if r["image_id"] != 2]
    assert coco_metrics.evaluate(source, some)["box"]["map"] < 0.9
    scores = coco_metrics.evaluate(source, some, without={2})
    assert scores["box"]["map"] > 0.999
    (source.folder / "000002.png").write_bytes(b"")
    source.image_ids = ["../0", 1, 2, "a/b"]
    folder = tmp_path / "predictions"
    coco_metrics.save_predictions(folder, source, DecodedSource(source), [])
    assert sorted(os.listdir(folder)) == [
        "..%2F0.png", "1.png", "a%2Fb.png", "bbox.json", "segm.json",
    ]  # fmt: skip
