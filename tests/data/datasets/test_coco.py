"""COCO's instances: elements, and bad annotations and files."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.data.coco_files import SIZE, annotation, rectangle, rle, write
from vssd_jax import UserError
from vssd_jax.config import detection_config
from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.datasets import coco
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource

GOOD = [
    annotation(1),
    annotation(2, category=90, segmentation=rle(rectangle(8, 10, 24, 30))),
    annotation(3, category=7, segmentation=rle(rectangle(8, 10, 24, 30), compressed=False)),
    annotation(4, iscrowd=1, segmentation=rle(rectangle(0, 0, 20, 20))),
    annotation(5, image=3, box=(-4, 40, 20, 20)),  # reaches outside
]


def test_elements_of_every_kind_of_mask(tmp_path):
    source = CocoSource(*write(tmp_path, GOOD))
    assert not source.problems
    assert len(source) == 3
    assert source.class_names == ["person", "train", "brush"]
    np.testing.assert_array_equal(source.category_ids, [1, 7, 90])
    element = source[0]
    assert element["image_id"] == 1
    np.testing.assert_array_equal(element["labels"], [0, 2, 1])  # no crowd
    np.testing.assert_array_equal(element["boxes"], [[10, 8, 30, 24]] * 3)
    for segmentation in element["segmentations"]:
        mask = rasterise(segmentation, SIZE)
        np.testing.assert_array_equal(mask, rectangle(8, 10, 24, 30))
    assert source[1]["boxes"].shape == (0, 4)


def test_training_leaves_out_images_without_objects(tmp_path):
    source = CocoSource(*write(tmp_path, GOOD), training=True)
    assert source.image_ids == [1, 3]


def test_workers_share_the_annotations(tmp_path):
    small = CocoSource(*write(tmp_path, GOOD))
    before = len(pickle.dumps(small))
    polygon = np.linspace(1, 40, 2000).tolist()
    many = [annotation(i, image=1 + i % 3, segmentation=[polygon]) for i in range(6, 606)]
    source = CocoSource(*write(tmp_path, [*GOOD, *many]))
    data = pickle.dumps(source)
    assert source.annotations.stat().st_size > 600 * 20_000
    assert len(data) - before < 600 * 25  # places in the file, and labels
    program = "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
    program += "sys.stdout.buffer.write(pickle.dumps([s[i] for i in range(3)])); "
    program += "assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input=data, capture_output=True)
    assert not run.returncode, run.stderr
    for index, element in enumerate(pickle.loads(run.stdout)):
        assert element["segmentations"] == source[index]["segmentations"]
        np.testing.assert_array_equal(element["boxes"], source[index]["boxes"])
    assert element["segmentations"][-1] == [polygon]
    assert not [p for p in tmp_path.iterdir() if p.name not in ("images", "a.json")]


def test_the_json_must_stay(tmp_path):
    paths = write(tmp_path, GOOD)
    source = CocoSource(*paths)
    text = paths[1].read_text()
    paths[1].write_text(text.replace("20, 16", "16, 20"))
    os.utime(paths[1], ns=(0, 0))
    with pytest.raises(UserError, match=r"a\.json was changed after it was opened"):
        source[0]
    assert not len(source[1]["boxes"])  # the JSON has nothing of it
    paths[1].unlink()
    with pytest.raises(UserError, match=r"cannot read the annotations .*a\.json: No such file"):
        source[0]


BAD = {
    "the box is outside": annotation(50, box=(70, 8, 20, 16)),
    "zero area": annotation(50, box=(10, 8, 0, 16)),
    "zero area: box [10, 8, 20, 16], area 0": annotation(50, area=0),
    "unknown category: 99": annotation(50, category=99),
    "not four numbers": annotation(50) | {"bbox": [1, 2, 3]},
    "the box is not finite": annotation(50) | {"bbox": [1, 2, float("nan"), 4]},
    "the box is no list of numbers": annotation(50) | {"bbox": None},
    "a polygon is not three": annotation(50, segmentation=[[1, 2, 3, 4]]),
    "broken RLE: its runs": annotation(50, segmentation={"size": list(SIZE), "counts": [10, 20]}),
    "broken RLE": annotation(50, segmentation={"size": list(SIZE), "counts": "2^o`"}),
    "its size": annotation(50, segmentation=rle(np.ones((5, 5)))),
    "iscrowd is neither 0 nor 1": annotation(50, iscrowd=2),
    "the area is no number": annotation(50, area="large"),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_annotations_are_named_and_left_out_or_refused(tmp_path, problem):
    paths = write(tmp_path, [*GOOD, BAD[problem]])
    source = CocoSource(*paths)
    assert len(source.problems) == 1
    assert str(source.problems[0]).startswith("image 1, annotation 50: ")
    assert problem in str(source.problems[0])
    assert "annotation 50" in source.describe_problems()
    assert len(source[0]["labels"]) == 3
    with pytest.raises(UserError, match="image 1, annotation 50: "):
        CocoSource(*paths, bad_annotations="refuse")


def test_missing_files_and_images_are_named(tmp_path):
    paths = write(tmp_path, [*GOOD, annotation(50, image=77)], files=(1, 2))
    source = CocoSource(*paths)
    assert source.image_ids == [1, 2]
    assert list(map(str, source.problems)) == [
        "image 77, annotation 50: the image is not in the list of images",
        "image 3: the file 3.png is missing",
    ]
    with pytest.raises(UserError, match=r"3\.png is missing"):
        CocoSource(*paths, bad_annotations="refuse")


def test_broken_files(tmp_path):
    images, path = write(tmp_path, GOOD)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "has no categories"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            CocoSource(images, path)
    with pytest.raises(UserError, match="cannot read"):
        CocoSource(images, tmp_path / "missing.json")
    _, path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match="is no folder"):
        CocoSource(tmp_path / "missing", path)


def test_the_reasons_are_given_where_nothing_is_left(tmp_path):
    crowds = [annotation(i, iscrowd=1) for i in range(1, 4)]
    odd = [annotation(i, segmentation=3) for i in range(4, 40)]
    paths = write(tmp_path, crowds + odd)
    with pytest.raises(UserError) as error:
        CocoSource(*paths, training=True)
    for reason in (
        "has no usable images with objects",
        "3 crowds",
        "3 images without objects (config.filter_empty=False trains on them)",
        "image 1, annotation 4: the mask is neither",
        "and 16 more. In all: 36 x the mask is neither",
    ):
        assert reason in str(error.value)


def test_images_without_objects_can_be_trained_on(tmp_path):
    source = CocoSource(*write(tmp_path, GOOD), training=True, filter_empty=False)
    assert source.image_ids == [1, 2, 3]
    np.testing.assert_array_equal(source.object_counts, [3, 0, 1])
    assert "1 crowds" in source.describe_problems()
    some = CocoSource(*write(tmp_path, GOOD), training=True)
    assert "1 images without objects" in some.describe_problems()


def test_good_polygons_stay(tmp_path):
    polygon = annotation(1)["segmentation"][0]
    odd = annotation(50, segmentation=[polygon, [1, 2, 3], polygon])
    source = CocoSource(*write(tmp_path, [odd]))
    assert source[0]["segmentations"] == [[polygon, polygon]]
    assert "annotation 50: a polygon is not three" in source.describe_problems()
    assert source.ground_truth()["annotations"][0]["segmentation"] == [polygon, polygon]
    with pytest.raises(UserError, match="annotation 50"):
        CocoSource(*write(tmp_path, [odd]), bad_annotations="refuse")


def test_names_with_backslashes_and_upright_sizes(tmp_path):
    images, path = write(tmp_path, GOOD)
    (images / "inner").mkdir()
    (images / "1.png").rename(images / "inner" / "1.png")
    data = json.loads(path.read_text())
    data["images"][0]["file_name"] = "inner\\1.png"
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    source = CocoSource(images, path)
    assert not source.problems
    assert source[0]["image"][:4] == b"\x89PNG"


def test_an_unreadable_picture_is_replaced(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("vssd_jax.data.decode._named", 0)
    images, path = write(tmp_path, GOOD)
    (images / "1.png").write_bytes(b"no picture")
    (images / "2.png").unlink()
    (images / "2.png").symlink_to("nowhere")
    element = DecodedSource(CocoSource(images, path))[0]
    assert (element["replaced"], element["index"], element["image_id"]) == (1, 0, 3)
    said = capfd.readouterr().err
    assert "image 1 (" in said
    assert "2.png" in said


def test_objects_may_have_boxes_alone(tmp_path):
    boxes = [annotation(6, segmentation=[]), annotation(7, image=3, segmentation=None)]
    source = CocoSource(*write(tmp_path, [*GOOD, *boxes]), training=True)
    assert not source.problems
    assert [s is None for s in source[0]["segmentations"]] == [False] * 3 + [True]
    np.testing.assert_array_equal(source.object_counts, [4, 2])
    np.testing.assert_array_equal(source.mask_counts, [3, 1])


def test_classes_are_chosen_and_ordered_by_name(tmp_path):
    paths = write(tmp_path, GOOD)
    source = CocoSource(*paths, class_names=("brush", "person"))
    np.testing.assert_array_equal(source.category_ids, [90, 1])
    np.testing.assert_array_equal(source[0]["labels"], [1, 0])
    np.testing.assert_array_equal(source.class_counts, [[1, 1], [0, 0], [0, 1]])
    assert "1 objects of other categories" in source.describe_problems()
    truth = source.ground_truth()
    assert {a["category_id"] for a in truth["annotations"]} == {1, 90}
    with pytest.raises(UserError, match="no category 'persons'; did you mean 'person'"):
        CocoSource(*paths, class_names=("persons",))
    source.relabel(("sofa", "person", "brush"))
    np.testing.assert_array_equal(source[0]["labels"], [1, 2])
    np.testing.assert_array_equal(source.category_ids[1:], [1, 90])
    assert len(set(source.category_ids.tolist())) == 3
    np.testing.assert_array_equal(source.class_counts, [[0, 1, 1], [0, 0, 0], [0, 1, 0]])
    with pytest.raises(UserError, match="'brush', which is not among those for training"):
        source.relabel(("person", "sofa"))


def layout(root, places):
    """Writes `images` and JSON, a pair for each place, and gives what is read of them."""
    for number, (images, annotations) in enumerate(places):
        source, path = write(root, GOOD)
        (root / images).mkdir(parents=True, exist_ok=True)
        for name in ("1.png", "2.png", "3.png"):
            (source / name).rename(root / images / f"{number}{name}")
        data = json.loads(path.read_text())
        for image in data["images"]:
            image["file_name"] = f"{number}{image['file_name']}"
        path.unlink()
        (root / annotations).parent.mkdir(parents=True, exist_ok=True)
        (root / annotations).write_text(json.dumps(data))
    config = detection_config()
    config.data_dir = str(root)
    return config


@pytest.mark.parametrize(
    "places",
    [
        [(f"{s}2017", f"annotations/instances_{s}2017.json") for s in ("train", "val")],
        [(s, f"{s}/_annotations.coco.json") for s in ("train", "valid")],
        [(f"images/{s}", f"annotations/instances_{s}.json") for s in ("Train", "Validation")],
        [("images", f"annotations/instances_{s}.json") for s in ("train", "val")],
    ],
)
def test_layouts_are_recognised(tmp_path, places):
    config = layout(tmp_path, places)
    train, val = (coco.open_split(config, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 3)
    assert pathlib.Path(train[0]["name"].split("(")[1][:-1]).name == "01.png"
    assert pathlib.Path(val[0]["name"].split("(")[1][:-1]).name == "11.png"


@pytest.mark.parametrize("annotations", ["annotations/instances_default.json", "labels.json"])
def test_a_share_is_set_aside_where_there_is_no_validation_part(tmp_path, annotations, capfd):
    config = layout(tmp_path, [("images", annotations)])
    config.filter_empty = False
    train, val = (coco.open_split(config, split) for split in ("train", "val"))
    assert sorted(train.image_ids + val.image_ids) == [1, 2, 3]
    assert len(val) == 1
    assert "1 of 3 pictures are set aside" in capfd.readouterr().out


def test_files_are_given_by_fields(tmp_path):
    config = layout(tmp_path, [("a/pictures", "one.json"), ("b", "two.json")])
    config.train_images, config.train_annotations = "a/pictures", "one.json"
    config.val_images, config.val_annotations = "b", str(tmp_path / "two.json")
    assert len(coco.open_split(config, "train")) == 2
    assert len(coco.open_split(config, "val")) == 3
    config.val_images = None
    with pytest.raises(UserError, match=r"val_images and config\.val_annotations belong together"):
        coco.open_split(config, "val")
    config = layout(tmp_path / "c", [])
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"no known layout .*\(there: nothing; 0 JSON files\)"):
        coco.open_split(config, "val")


def test_a_category_that_only_groups_others_is_none(tmp_path):
    paths = write(tmp_path, GOOD)
    data = json.loads(paths[1].read_text())
    for category in data["categories"]:
        category["supercategory"] = "things"
    data["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    paths[1].write_text(json.dumps(data))
    assert CocoSource(*paths).class_names == ["person", "train", "brush"]
    data["annotations"][0]["category_id"] = 0
    paths[1].write_text(json.dumps(data))
    assert CocoSource(*paths).class_names == ["things", "person", "train", "brush"]
