"""Small data sets in COCO's format for the tests of the data modules."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

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
