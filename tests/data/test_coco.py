import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from vssd_jax import UserError
from vssd_jax.data import coco, pipeline
from vssd_jax.data.coco import CocoSource

SIZE = (48, 64)
# COCO's ids have gaps; the order in the file does not matter.
CATEGORIES = [{"id": 7, "name": "train"}, {"id": 1, "name": "person"}, {"id": 90, "name": "brush"}]


def rle(mask, compressed=True):
    if not compressed:
        flat = mask.flatten(order="F").astype(int)
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *ends, len(flat)]).tolist()
        return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def rectangle(y1, x1, y2, x2):
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def annotation(number, image=1, category=1, box=(10, 8, 20, 16), **fields):
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(box),
        "area": w * h, "iscrowd": 0, "segmentation": polygon,
    } | fields  # fmt: skip


GOOD = [
    annotation(1),
    annotation(2, category=90, segmentation=rle(rectangle(8, 10, 24, 30))),
    annotation(3, category=7, segmentation=rle(rectangle(8, 10, 24, 30), compressed=False)),
    annotation(4, iscrowd=1, segmentation=rle(rectangle(0, 0, 20, 20))),
    annotation(5, image=3, box=(-4, 40, 20, 20)),  # reaches outside
]


def write(folder, annotations, images=(1, 2, 3), files=(1, 2, 3)):
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    for number in files:
        pixels = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    dataset = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in images
        ],
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    (folder / "a.json").write_text(json.dumps(dataset))
    return folder / "images", folder / "a.json"


def test_elements_of_every_kind_of_mask(tmp_path):
    source = CocoSource(*write(tmp_path, GOOD))
    assert not source.problems
    assert len(source) == 3
    assert source.names == ["person", "train", "brush"]
    np.testing.assert_array_equal(source.category_ids, [1, 7, 90])
    element = source[0]
    assert element["image_id"] == 1
    np.testing.assert_array_equal(element["labels"], [0, 2, 1])  # no crowd
    np.testing.assert_array_equal(element["boxes"], [[10, 8, 30, 24]] * 3)
    for segmentation in element["segmentations"]:
        mask = coco.rasterise(segmentation, SIZE)
        np.testing.assert_array_equal(mask, rectangle(8, 10, 24, 30))
    assert source[1]["boxes"].shape == (0, 4)
    again = pickle.loads(pickle.dumps(source))  # workers get it so
    np.testing.assert_array_equal(again[2]["boxes"], source[2]["boxes"])


def test_training_leaves_out_images_without_objects(tmp_path):
    source = CocoSource(*write(tmp_path, GOOD), training=True)
    assert source.image_ids == [1, 3]


BAD = {
    "outside": annotation(50, box=(70, 8, 20, 16)),
    "zero area": annotation(50, box=(10, 8, 0, 16)),
    "area 0": annotation(50, area=0),
    "unknown category 99": annotation(50, category=99),
    "not four numbers": annotation(50) | {"bbox": [1, 2, 3]},
    "not four numbers: [1, 2, nan, 4]": annotation(50) | {"bbox": [1, 2, float("nan"), 4]},
    "no mask": annotation(50, segmentation=[]),
    "polygon": annotation(50, segmentation=[[1, 2, 3, 4]]),
    "its runs": annotation(50, segmentation={"size": list(SIZE), "counts": [10, 20]}),
    "broken RLE": annotation(50, segmentation={"size": list(SIZE), "counts": "2^o`"}),
    "its size": annotation(50, segmentation=rle(np.ones((5, 5)))),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_annotations_are_named_and_left_out_or_refused(tmp_path, problem):
    paths = write(tmp_path, [*GOOD, BAD[problem]])
    source = CocoSource(*paths)
    assert len(source.problems) == 1
    assert source.problems[0].startswith("image 1, annotation 50: ")
    assert problem in source.problems[0]
    assert "annotation 50" in source.describe_problems()
    assert len(source[0]["labels"]) == 3
    with pytest.raises(UserError, match="image 1, annotation 50: "):
        CocoSource(*paths, bad_annotations="refuse")


def test_missing_files_and_images_are_named(tmp_path):
    paths = write(tmp_path, [*GOOD, annotation(50, image=77)], files=(1, 2))
    source = CocoSource(*paths)
    assert source.image_ids == [1, 2]
    assert source.problems == [
        "image 3: the file 3.png is missing",
        "image 77, annotation 50: the image is not in the list of images",
    ]
    with pytest.raises(UserError, match=r"3\.png is missing"):
        CocoSource(*paths, bad_annotations="refuse")


def test_broken_files(tmp_path):
    images, path = write(tmp_path, GOOD)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "lacks file_name"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            CocoSource(images, path)
    with pytest.raises(UserError, match="cannot read"):
        CocoSource(images, tmp_path / "missing.json")
    _, path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match="is no folder"):
        CocoSource(tmp_path / "missing", path)
    (images / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="image 1 cannot be decoded"):
        coco.eval_transform(CocoSource(images, path)[0])


def test_run_lengths_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(rng.integers(1, 80, 2))
        mask = rng.random(shape) < rng.choice([0, 0.01, 0.5, 1])
        coco.check_segmentation(rle(mask), shape)
        coco.check_segmentation(rle(mask, compressed=False), shape)
        np.testing.assert_array_equal(coco.rasterise(rle(mask), shape), mask)


def scene(tmp_path):
    """An element whose box is the extent of its mask."""
    return CocoSource(*write(tmp_path, [annotation(1, segmentation=rle(rectangle(8, 10, 24, 30)))]))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_masks_stay_together(tmp_path, flip):
    element = scene(tmp_path)[0]
    result = coco.train_transform(
        element, np.random.default_rng(0), short_sides=(96,), long_side=1000,
        shapes=((104, 136), (136, 104)), max_objects=3, flip=flip,
    )  # fmt: skip
    assert result["image"].shape == (104, 136, 3)
    np.testing.assert_array_equal(result["image_shape"], [96, 128])
    np.testing.assert_array_equal(result["valid"], [True, False, False])
    expected = [2 * (64 - 30), 16, 2 * (64 - 10), 48] if flip else [20, 16, 60, 48]
    np.testing.assert_allclose(result["boxes"][0], expected)
    mask = np.unpackbits(result["masks"][0], axis=-1)
    x1, y1, x2, y2 = expected
    assert mask[y1:y2, x1:x2].all()
    assert mask.sum() == (y2 - y1) * (x2 - x1)
    assert not result["image"][96:].any()
    assert result["image"][:96, :128].std() > 0.5


def test_the_long_schedule_crops_and_keeps_to_the_shape(tmp_path):
    element = scene(tmp_path)[0]
    shapes, sizes, objects = ((800, 1344), (1344, 800)), set(), 0
    for seed in range(8):
        result = coco.train_transform(
            element, np.random.default_rng(seed), short_sides=tuple(range(480, 801, 32)),
            crop=True, shapes=shapes, max_objects=2,
        )  # fmt: skip
        assert result["image"].shape == (800, 1344, 3)
        height, width = result["image_shape"]
        assert height <= 800
        assert width <= 1333
        sizes.add((int(height), int(width)))
        objects += int(result["valid"].sum())
        for box, packed in zip(
            result["boxes"][result["valid"]], result["masks"][result["valid"]], strict=True
        ):
            ys, xs = np.nonzero(np.unpackbits(packed, axis=-1))
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(box, extent, atol=2)
    assert len(sizes) > 4
    assert objects >= 4


def test_equal_generators_make_equal_samples(tmp_path):
    element = scene(tmp_path)[0]
    options = {"short_sides": (64, 96), "shapes": ((96, 128),), "max_objects": 2, "crop": True}
    before = copy.deepcopy(element)
    a, b = (coco.train_transform(element, np.random.default_rng(5), **options) for _ in range(2))
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
    np.testing.assert_array_equal(element["boxes"], before["boxes"])


def test_evaluation_pads_to_a_shape_or_to_32(tmp_path):
    element = scene(tmp_path)[0]
    result = coco.eval_transform(element)
    np.testing.assert_array_equal(result["image_shape"], [800, 1067])
    assert result["image"].shape == (800, 1344, 3)
    np.testing.assert_array_equal(result["original_shape"], SIZE)
    assert result["index"] == 0
    assert coco.eval_transform(element, shapes=None)["image"].shape == (800, 1088, 3)
    portrait = ((1344, 800), (800, 1344))
    assert coco.padded_shape((640, 480), portrait) == (1344, 800)
    assert coco.padded_shape((480, 640), portrait) == (800, 1344)
    assert coco.rescaled_size((480, 640), 800, 1333) == (800, 1067)
    assert coco.rescaled_size((426, 640), 800, 1333) == (800, 1202)
    assert coco.rescaled_size((300, 640), 800, 1333) == (625, 1333)


class Sizes:
    def __init__(self, portrait):
        self.sizes = np.where(np.array(portrait)[:, None], [[4, 3]], [[3, 4]])

    def __getitem__(self, index):
        return {"index": index}


def test_batches_of_one_orientation():
    source = Sizes(np.arange(23) % 3 == 0)
    portrait = source.sizes[:, 0] > source.sizes[:, 1]
    shuffled = coco.GroupedByOrientation(source, 4, seed=1, steps=10)
    order = np.array([shuffled[i]["index"] for i in range(len(shuffled))]).reshape(-1, 4)
    for batch in order:
        assert len(set(portrait[batch])) == 1
    first, second = order.reshape(2, -1)
    assert len(set(first)) == len(first) == 20  # 15 landscapes: 12; 8 portraits: 8
    assert first.tolist() != second.tolist()
    again = coco.GroupedByOrientation(source, 4, seed=1, steps=10)
    assert [again[i]["index"] for i in range(40)] == order.ravel().tolist()

    every = coco.GroupedByOrientation(source, 4)
    elements = [every[i] for i in range(len(every))]
    assert sorted(e["index"] for e in elements if e["valid"]) == list(range(23))
    assert len(elements) == 24
    for i in range(0, 24, 4):
        assert len({portrait[e["index"]] for e in elements[i : i + 4]}) == 1
    with pytest.raises(UserError, match="there are 15 landscape and 8 portrait images"):
        coco.GroupedByOrientation(source, 16, seed=1, steps=1)


def test_a_source_that_shuffles_itself_keeps_its_order():
    source = Sizes(np.arange(23) % 3 == 0)
    grouped = coco.GroupedByOrientation(source, 4, seed=1, steps=7)

    def read(**options):
        batches = pipeline.train_batches(
            grouped, lambda x, rng: x, batch_size=4, seed=0, shuffle=False, **options
        )
        return [batch["index"].tolist() for batch in batches]

    order = [[grouped[i + j]["index"] for j in range(4)] for i in range(0, 28, 4)]
    assert read() == order
    assert read(start_step=3) == order[3:]
    halves = [read(process_index=i, process_count=2) for i in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == order


def test_evaluation_marks_the_padding_of_the_source():
    grouped = coco.GroupedByOrientation(Sizes(np.arange(23) % 3 == 0), 4)
    batches = list(pipeline.eval_batches(grouped, lambda element: element, batch_size=4))
    index, valid = (np.concatenate([b[name] for b in batches]) for name in ("index", "valid"))
    assert len(index) == 24
    assert sorted(index[valid]) == list(range(23))
