"""Fields of COCO's JSON as other tools write them; and whatever else may stand there."""

import copy
import functools
import json
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.coco_files import CATEGORIES, SIZE, annotation, rectangle, rle, write
from vssd_jax.data import coco_json
from vssd_jax.data.coco_json import BadField, Instances
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import eval_transform, train_transform
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.errors import UserError
from vssd_jax.tasks import coco_metrics

IMAGE = {"id": 1, "file_name": "1.png", "height": SIZE[0], "width": SIZE[1]}


def instances(tmp_path, images=(IMAGE,), annotations=(), categories=CATEGORIES):
    path = tmp_path / "a.json"
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))
    found = Instances(path)
    read = [annotation for annotation, _, _ in found.annotations()]
    return types.SimpleNamespace(
        images=found.images, annotations=read, categories=found.categories, problems=found.problems
    )


def test_what_is_unambiguous_is_converted(tmp_path):
    box = {"bbox": ["10", 8.0, "2e1", 16], "area": None, "iscrowd": None, "category_id": "7"}
    found = instances(
        tmp_path,
        images=[{"id": 1.0, "file_name": "1.png", "height": "48", "width": 64.0}],
        annotations=[
            annotation(1) | box,
            annotation(2, image="1", iscrowd=True, category=7.0),
            annotation(3, segmentation=annotation(1)["segmentation"][0]),
            {k: v for k, v in annotation(4).items() if k not in ("id", "area", "iscrowd")},
        ],
        categories=[{"id": "7", "name": 5}, {"id": 1.0, "name": None}],
    )
    assert not found.problems
    assert found.images == {1: coco_json.Image(1, "1.png", SIZE)}
    assert found.categories == {1: "1", 7: "5"}
    first, second, third, fourth = found.annotations
    assert (first.category_id, first.bbox, first.area) == (7, (10, 8, 20, 16), 320)
    assert [a.crowd for a in found.annotations] == [False, True, False, False]
    assert first.segmentation == third.segmentation == fourth.segmentation
    assert second.image_id == 1


def test_ids_may_be_strings(tmp_path):
    images = [IMAGE | {"id": "b"}, IMAGE | {"id": 3}]
    found = instances(tmp_path, images, [annotation(1, image=3), annotation(2, image="b")])
    assert list(found.images) == ["b", "3"]  # of one type: pycocotools sorts them
    assert [a.image_id for a in found.annotations] == ["3", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": None}, "images[0]: id is missing"),
        ({"id": True}, "images[0]: id is no id: True"),
        ({"id": 1.5}, "images[0]: id is no whole number: 1.5"),
        ({"id": 2**70}, "images[0]: id is too large"),
        ({"id": "\ud800"}, "images[0]: id is no text"),
        ({"height": None}, "image 1: height is no number: None"),
        ({"height": 0}, "image 1: height or width is no picture's: 0x64"),
        ({"file_name": ""}, "image 1: file_name is no name"),
        ({"file_name": "a\0b"}, "image 1: file_name is no name"),
        ({"file_name": "\ud800"}, "image 1: file_name is no text"),
    ],
)
def test_a_bad_image_is_left_out_with_its_annotations(tmp_path, fields, message):
    other = IMAGE | {"id": 2}
    found = instances(tmp_path, [IMAGE | fields, other], [annotation(1), annotation(2, image=2)])
    assert list(found.images) == [2]
    assert [a.image_id for a in found.annotations] == [2]
    assert str(found.problems[0]).startswith(message)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "has no categories"),
        ([*CATEGORIES, {"id": 7, "name": "x"}], "the category id 7 occurs twice"),
        ([*CATEGORIES, {"id": 8, "name": "train"}], "the category 'train' occurs twice"),
        ([{"id": 1}, {"name": "x"}], r"categories\[1\]: id is missing"),
        ([{"id": "x"}], r"categories\[0\]: id is no number: 'x'"),
        ([None], r"categories\[0\]: an entry that is no object"),
    ],
)
def test_categories_must_be_in_order(tmp_path, categories, message):
    with pytest.raises(UserError, match=message):
        instances(tmp_path, categories=categories)


def test_problems_are_counted_by_kind(tmp_path):
    bad = [annotation(i, segmentation="x" if i % 3 else [[1, i]]) for i in range(60)]
    text = coco_json.describe(instances(tmp_path, annotations=bad).problems)
    assert text.count("annotation") == 20
    assert text.endswith(
        "and 40 more. In all: 40 x the mask is neither polygons nor a run-length code, "
        "20 x a polygon is not three or more pairs of numbers"
    )  # fmt: skip


def test_a_broken_mask_says_why():
    for value, reason in (
        ({"size": list(SIZE), "counts": [1.5]}, "no whole number"),
        ({"size": "48x64", "counts": []}, "its size is no list of numbers"),
        ({"size": list(SIZE), "counts": None}, "is no list of numbers"),
        ("mask", "neither polygons nor"),
        ([["a"] * 6], "a polygon is no number"),
    ):
        with pytest.raises(BadField, match=reason):
            coco_json.read_segmentation(value, SIZE)


# --- Whatever comes in ---------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 120),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["1", " 1 ", "1.0", "-7", "90", "nan", "a\\b.png", "../1.png", "x" * 300, "\0"]
    ),
    st.lists(st.one_of(st.integers(-100, 200), st.floats(), st.text(max_size=3)), max_size=8),
    st.lists(st.lists(st.floats(-50, 150), max_size=9), max_size=3),
    st.dictionaries(st.sampled_from(["size", "counts"]), st.text(max_size=4), max_size=2),
)
PLACE = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 4),
    st.sampled_from(
        [
            "id", "file_name", "height", "width", "image_id", "category_id", "bbox", "area",
            "iscrowd", "segmentation", "name", None,
        ]
    ),
)  # fmt: skip
GOOD = [
    annotation(1),
    annotation(2, category=90, segmentation=rle(rectangle(8, 10, 24, 30))),
    annotation(3, category=7, segmentation=rle(rectangle(8, 10, 24, 30), compressed=False)),
    annotation(4, iscrowd=1, segmentation=rle(rectangle(0, 0, 20, 20))),
    annotation(5, image=3, box=(-4, 40, 20, 20)),
]


def use(images, path):
    """Everything that training and evaluation do with a file, but for the model."""
    truth = CocoSource(images, path)
    source = CocoSource(images, path, training=True)
    text = truth.describe_problems() + source.describe_problems()
    assert "\n" not in text
    text.encode()
    results = []
    for index, element in enumerate(map(DecodedSource(truth).__getitem__, range(len(truth)))):
        batch = eval_transform(element, short_side=64, shapes=((64, 96), (96, 64)))
        assert batch["index"] == index
        results.append(
            {
                "image_id": truth.image_ids[index],
                "category_id": int(truth.category_ids[0]),
                "bbox": [10.0, 8.0, 20.0, 16.0],
                "score": 0.5,
                "segmentation": rle(rectangle(8, 10, 24, 30)),
            }
        )
    decoded = DecodedSource(source)
    for index in range(len(source)):
        size = np.array([decoded[index]["image"].shape[:2]])
        draw = functools.partial(draw_geometry, short_sides=(64,))
        plan = {"geometry": draw(size, np.random.default_rng(0)).row(0), "shape": (64, 96)}
        sample = train_transform(decoded[index] | plan, np.random.default_rng(0), draw=draw)
        assert np.isfinite(sample["boxes"]).all()
        assert len(truth.class_names) > sample["labels"].max()
    for numbers in coco_metrics.evaluate(truth, results).values():
        assert np.isfinite(list(numbers.values())).all()


@given(changes=st.lists(st.tuples(PLACE, JUNK), min_size=1, max_size=3))
def test_whatever_comes_in_works_or_is_one_line(pictures, changes):
    images, path, good = pictures
    data = copy.deepcopy(good)
    for (key, number, field), value in changes:
        entries = data[key]
        if field is None:
            entries[number % len(entries)] = value
        elif isinstance(entry := entries[number % len(entries)], dict):
            entry[field] = value
    path.write_text(json.dumps(data))
    message = ""
    try:
        use(images, path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    images, path = write(tmp_path_factory.mktemp("coco"), GOOD)
    data = json.loads(path.read_text())
    use(images, path)
    return images, path, data
