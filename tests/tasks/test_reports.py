"""What the tasks give to a report, for evaluations whose numbers are known."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from tests.tasks.test_classification import LOGITS
from tests.tasks.test_coco_metrics import dataset, perfect, whole_batch
from vssd_jax.data.decode import DecodedSource
from vssd_jax.tasks import (
    coco_metrics,
    detection_report,
    report_parts,
    segmentation_metrics,
    segmentation_report,
)
from vssd_jax.tasks.classification import Classification


def by_title(sections):
    return {section.title: section for section in sections}


def png(value, size=(40, 30)):
    data = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(data, "png")
    return data.getvalue()


class Pictures:
    """Eight grey pictures; picture i has label i."""

    class_names = tuple(map(str, range(10)))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": png(10 * index), "label": index, "name": f"somewhere/{index}.png"}


def test_classification():
    config = get_config()
    config.update(num_classes=20, max_unreadable=0.5)
    task = Classification(config)
    task._sources["val"] = Pictures()
    assert list(by_title(task.report())) == ["Data"]  # nothing was evaluated yet
    outputs = []
    for start in (0, 4):  # two batches; number 3 is unreadable, 6 and 7 are padding
        rows = slice(start, start + 4)
        output = task.eval_step(
            lambda images, rows=rows: jnp.asarray(LOGITS[rows]),
            {
                "image": jnp.zeros((4, 4, 4, 3), jnp.uint8),
                "label": jnp.arange(8)[rows],
                "replaced": (jnp.arange(8) == 3)[rows],
                "valid": (jnp.arange(8) < 6)[rows],
            },
        )
        outputs.append({name: np.asarray(value) for name, value in output.items()})
    results = task.summarize(iter(outputs))
    parts = by_title(task.report())
    assert list(parts) == [
        "Data", "Classes", "Confusion matrix", "Worst mistakes", "A few predictions",
    ]  # fmt: skip
    assert ("pictures for evaluation", 8) in parts["Data"].rows
    confusion = parts["Confusion matrix"]
    # Of class 2 no class scores above all others: the last column.
    assert confusion.cells.tolist() == [[0, 0, 1], [1, 4, 1], [2, 20, 1], [4, 19, 1], [5, 19, 1]]
    assert confusion.columns[19:] == ["class 19", "no class"]
    right = confusion.cells[confusion.cells[:, 0] == confusion.cells[:, 1], 2].sum()
    assert results["val/top1"] == right / confusion.cells[:, 2].sum() == 1 / 5
    rows = parts["Classes"].rows
    assert rows[0] == ("1", 1, 0.0, "4 (1)")
    assert rows[4] == ("0", 1, 1.0, "")
    assert len(rows) == 20
    assert all(row[1] == 0 and np.isnan(row[2]) for row in rows[5:])
    probability = np.exp(LOGITS).max(1) / np.exp(LOGITS).sum(1)
    captions = [picture.caption for picture in parts["Worst mistakes"].pictures]
    assert captions == [
        [f"predicted: 4 ({probability[1]:.0%})", "class: 1", "1.png"],
        [f"predicted: class 19 ({probability[4]:.0%})", "class: 4", "4.png"],
        [f"predicted: class 19 ({probability[5]:.0%})", "class: 5", "5.png"],
        ["predicted: no class", "class: 2", "2.png"],
    ]
    for picture, number in zip(parts["Worst mistakes"].pictures, (1, 4, 5, 2), strict=True):
        assert (picture.views[0][1] == 10 * number).all()
    assert [picture.caption[-1] for picture in parts["A few predictions"].pictures] == [
        "0.png", "1.png", "2.png", "4.png", "5.png",
    ]  # fmt: skip


def test_a_detection_takes_the_free_object_that_it_overlaps_most():
    true_boxes = np.array([[0, 0, 10, 10], [20, 0, 10, 10], [0, 50, 40, 40], [60, 0, 10, 10]])
    boxes = np.array(
        [
            [0, 0, 10, 9],  # a second one on the first object, of less score
            [0, 1, 10, 9],
            [20, 0, 10, 10],  # of a wrong class
            [5, 55, 10, 10],  # in the crowd
            [80, 80, 5, 5],  # nowhere
        ]
    )
    matched = detection_report.match(
        boxes,
        np.array([2, 0, 0, 3, 1]),
        np.array([0.4, 0.9, 0.8, 0.7, 0.6]),
        true_boxes,
        np.array([0, 1, 3, 3]),
        np.array([False, False, True, False]),
    )
    assert matched.pairs.tolist() == [[0, 0], [1, 0]]
    assert matched.missed.tolist() == [3]
    assert matched.false.tolist() == [1, 2]
    assert matched.mistakes == 1 + 1 + 2


def test_detection(tmp_path):
    source = dataset(tmp_path)
    batch = whole_batch(source)
    results = coco_metrics.to_results(perfect(source, batch, wrong=1), batch, source)
    lost = next(r for r in reversed(results) if r["image_id"] == 3)  # its last object is missed
    results.remove(lost)
    results.append({**lost, "image_id": 0, "bbox": [150.0, 120.0, 4.0, 4.0]})  # a false one
    by_class = {}
    scores = coco_metrics.evaluate(source, results, by_class=by_class)
    for kind in ("box", "mask"):
        assert np.nanmean(by_class[kind][:, 0]) == pytest.approx(scores[kind]["map"], rel=1e-12)
        assert np.nanmean(by_class[kind][:, 1]) == pytest.approx(scores[kind]["ap50"], rel=1e-12)
    decoded = DecodedSource(source)
    parts = by_title(detection_report.sections(source, decoded, results, by_class))
    expected = np.zeros((11, 11), int)
    for i in range(4):
        for k, label in enumerate(source[i]["labels"]):
            # Scores fall; with the score of the false one it is the last object that is missed.
            expected[label, (label + 1) % 10 if k == 0 else label] += 1
    label = int(source[3]["labels"][-1])
    predicted = (label + 1) % 10 if len(source[3]["labels"]) == 1 else label
    expected[label, predicted] -= 1
    expected[label, 10] += 1
    expected[10, predicted] += 1
    confusion = parts["Confusion matrix"]
    np.testing.assert_array_equal(confusion.cells, report_parts.cells(expected))
    assert (confusion.rows[10], confusion.columns[10]) == ("(no object)", "(missed)")
    counts = {row[0]: row[1] for row in parts["Classes"].rows}
    assert [counts[str(i)] for i in range(10)] == source.class_counts.sum(0).tolist()
    ap = {row[0]: row[2:6] for row in parts["Classes"].rows}
    for i in range(10):
        np.testing.assert_array_equal(ap[str(i)], [*by_class["box"][i], *by_class["mask"][i]])
    assert {row[0]: row[6] for row in parts["Classes"].rows if row[6]} == {str(predicted): 1}
    worst = parts["Worst mistakes"].pictures
    assert worst[0].caption == ["0 missed, 1 false, 1 of a wrong class", "image 0"]
    assert len(worst) == 4
    for name, pixels in worst[0].views:
        assert name in ("found", "objects")
        assert pixels.shape[2] == 3
    # The numbers of a reordering of the classes are those of the same names.
    names = [*map(str, range(9, -1, -1))]
    source.relabel(names)
    again = by_title(detection_report.sections(source, decoded, results, by_class))
    ap_again = {row[0]: row[2:6] for row in again["Classes"].rows}
    np.testing.assert_array_equal([ap_again[n] for n in names], [ap[n] for n in names])
    nothing = by_title(detection_report.sections(source, decoded, [], {}))
    assert {row[2] for row in nothing["Classes"].rows if row[1]} == {0.0}
    assert (nothing["Confusion matrix"].cells[:, 1] == 10).all()


def test_iou_of_pictures():
    labels = np.array([[[0, 0], [1, 255]], [[2, 2], [2, 2]], [[255, 255], [255, 255]]])
    predicted = np.array([[[0, 1], [1, 1]], [[2, 2], [2, 255]], [[0, 0], [0, 0]]])
    confusions = segmentation_metrics.picture_confusions(jnp.array(predicted), jnp.array(labels), 3)
    iou = np.asarray(segmentation_metrics.picture_iou(confusions))
    # Of the first: class 0 has 1 of 2, class 1 has 1 of 2. Of the second: 3 of 4.
    np.testing.assert_allclose(iou, [0.5, 0.75, np.nan])
    whole = segmentation_metrics.confusion_matrix(jnp.array(predicted), jnp.array(labels), 3)
    np.testing.assert_array_equal(whole, confusions.sum(0))


class Maps:
    """Pictures of 6 x 4 pixels with labels."""

    image_names = tuple(f"picture {i}" for i in range(100))

    def __getitem__(self, index):
        image = np.full((6, 4, 3), index, np.uint8)
        return {"image": image, "label": np.eye(6, 4, dtype=np.uint8), "replaced": False}


def test_segmentation():
    rng = np.random.default_rng(0)
    iou = rng.permutation(100) / 100
    iou[7] = np.nan
    kept = segmentation_report.Kept(100)
    for start in range(0, 100, 20):
        rows = np.arange(start, start + 20)
        kept.add(
            {
                "index": rows,
                "size": np.tile([6, 4], (20, 1)),
                "valid": rows != 50,
                "picture_iou": iou[rows],
                "small": np.full((20, 4, 4), rows[:, None, None] % 2, np.uint8),
                "step": np.int32(2),
            }
        )
    counted = [i for i in range(100) if i not in (7, 50)]
    lowest = sorted(counted, key=lambda i: iou[i])[: report_parts.WORST]
    assert [one.number for one in kept.worst] == lowest
    assert [one.number for one in kept.few] == [i for i in report_parts.spread(100) if i != 50]
    assert kept.counted == 98
    assert kept.worst[0].labels.shape == (3, 2)
    confusion = np.array([[6, 2, 0], [1, 10, 1]])
    parts = by_title(
        segmentation_report.sections(Maps(), Maps(), confusion, kept, ["back", "front"])
    )
    assert parts["Classes"].rows == [
        ("back", 6 / 9, 6 / 8, 8 / 20, "front (2)"),
        ("front", 10 / 14, 10 / 12, 12 / 20, "back (1)"),
    ]  # fmt: skip
    assert parts["Confusion matrix"].cells.tolist() == [
        [0, 0, 6], [0, 1, 2], [1, 0, 1], [1, 1, 10], [1, 2, 1],
    ]  # fmt: skip
    assert parts["Confusion matrix"].columns == ["back", "front", "no class"]
    first = parts["Worst mistakes"].pictures[0]
    assert first.caption == [f"IoU {iou[lowest[0]]:.1%}", f"picture {lowest[0]}"]
    assert [name for name, _ in first.views] == ["predicted", "labels"]


def test_pictures_are_reduced():
    assert report_parts.reduced(np.zeros((1000, 500, 3), np.uint8)).shape == (400, 200, 3)
    assert report_parts.reduced(np.zeros((300, 400, 3), np.uint8)).shape == (300, 400, 3)
    assert segmentation_report.stride((400, 300)) == 1
    assert segmentation_report.stride((401, 300)) == 2
    assert report_parts.spread(3) == [0, 1, 2]
    assert report_parts.spread(0) == []
