"""docs/your_own_pictures.md, command by command, on data that is made here."""

import csv
import json
import os
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests import pages
from tests.pages import run
from tests.weights import loopback_hub
from vssd_jax.data.splits import set_aside

SHAPES = ("circle", "cross", "square", "stripes", "triangle")
PAGE = "docs/your_own_pictures.md"


def shape(kind, rng, size=None):
    """A picture of a bright shape on dark noise, and the shape's (H, W) mask."""
    height, width = rng.integers(60, 110, 2) if size is None else size
    noise = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
    mask = Image.new("1", (width, height))
    pen = ImageDraw.Draw(mask)
    s = int(min(height, width) * rng.uniform(0.28, 0.4))
    x = width // 2 + int(rng.integers(-8, 9))
    y = height // 2 + int(rng.integers(-8, 9))
    if kind == "circle":
        pen.ellipse((x - s, y - s, x + s, y + s), fill=1)
    elif kind == "square":
        pen.rectangle((x - s, y - s, x + s, y + s), fill=1)
    elif kind == "triangle":
        pen.polygon([(x, y - s), (x - s, y + s), (x + s, y + s)], fill=1)
    elif kind == "cross":
        for end in (s, -s):
            pen.line((x - s, y - end, x + s, y + end), fill=1, width=8)
    else:
        for line in range(-s, s, 12):
            pen.line((x - s, y + line, x + s, y + line), fill=1, width=5)
    inside = np.array(mask)
    noise[inside] = rng.integers(150, 255, 3)
    return Image.fromarray(noise), inside


def write_pictures(root):
    rng = np.random.default_rng(0)
    for kind in SHAPES:
        for number in range(40):
            path = root / "pictures" / kind / f"batch{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape(kind, rng)[0].save(path, quality=90)
    (root / "photos/more").mkdir(parents=True)
    for number in range(24):
        picture, _ = shape(SHAPES[number % 5], rng)
        picture.save(root / "photos" / ("more" if number % 3 == 2 else "") / f"photo_{number}.jpg")


def write_boxes(root):
    """As Roboflow exports them: a category that groups the others, and boxes without masks."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 24), ("valid", 8)):
        folder = root / "boxes" / part
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            label = int(rng.integers(2))
            picture, mask = shape(("circle", "square")[label], rng, (128, 160))
            picture.save(folder / f"{number}.jpg")
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            w, h = int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]] if number % 2 else []
            images.append({"id": number, "file_name": f"{number}.jpg", "height": 128, "width": 160})
            annotations.append(
                {
                    "id": number, "image_id": number, "category_id": label + 1, "area": w * h,
                    "bbox": [x, y, w, h], "iscrowd": 0, "segmentation": polygon,
                }
            )  # fmt: skip
        categories = [
            {"id": 0, "name": "shapes", "supercategory": "none"},
            {"id": 1, "name": "circle", "supercategory": "shapes"},
            {"id": 2, "name": "square", "supercategory": "shapes"},
        ]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "_annotations.coco.json").write_text(json.dumps(data))


def write_maps(root):
    """Four classes, of which 0 is one; the borders are ignored."""
    rng = np.random.default_rng(2)
    for folder in ("images", "labels"):
        (root / "maps" / folder / "a").mkdir(parents=True)
    for number in range(30):
        kind = 1 + number % 3
        picture, mask = shape(("circle", "square", "stripes")[kind - 1], rng, (72, 96))
        label = np.where(mask, kind, 0).astype(np.uint8)
        label[:2] = 255
        palette = Image.new("P", label.shape[::-1])
        palette.putdata(label.ravel().tolist())
        palette.putpalette([(53 * i) % 256 for i in range(768)])
        picture.save(root / f"maps/images/a/{number}.png")
        palette.save(root / f"maps/labels/a/{number}.png")
    (root / "names.txt").write_text("ground\ncircle\nsquare\nstripes\n")


@pytest.fixture
def place(tmp_path):
    return pages.clone(tmp_path)


def commands(heading):
    return [command.text for command in pages.commands(PAGE, heading)]


@pytest.mark.slow
def test_classes(place, monkeypatch):
    write_pictures(place)
    train, evaluate, predict, push, convert = commands("Classes")
    monkeypatch.setattr(loopback_hub, "OWNER", "you")
    run(place, train)
    metrics = json.loads(run(place, evaluate).splitlines()[-1])
    assert metrics["val/top1"] >= 0.8
    (report,) = commands("The report")
    run(place, report)
    assert "stripes" in (place / "report.html").read_text()
    run(place, predict)
    rows = table(place / "predictions/predictions.csv")
    number = [int(re.findall(r"\d+", row["file"])[-1]) for row in rows]
    right = [SHAPES[n % 5] == row["name1"] for n, row in zip(number, rows, strict=True)]
    assert len(rows) == 24
    assert np.mean(right) >= 0.7
    with Image.open(place / "predictions/contact_sheet.png") as sheet:
        sheet.load()

    (place / "use.py").write_text(pages.program(PAGE, "Classes"))
    with loopback_hub.serve() as hub:
        environment = hub.environment(place / "cache", token=loopback_hub.TOKEN)
        run(place, push, **environment)
        name, score = run(place, "python use.py", **environment).split()[-2:]
    first = next(row for row in rows if row["file"] == "photo_0.jpg")
    assert name == first["name1"]
    assert float(score) == pytest.approx(float(first["score1"]), abs=1e-5)

    # What is predicted for the pictures set aside is what the evaluation counts.
    run(place, convert)
    again = evaluate.replace("runs/pictures", "weights/pictures")
    top1 = json.loads(run(place, again).splitlines()[-1])["val/top1"]
    assert top1 >= metrics["val/top1"]  # the best
    run(place, "python predict.py --weights weights/pictures --input pictures --output all")
    found = {row["file"]: row["name1"] for row in table(place / "all/predictions.csv")}
    names = sorted(found)
    classes = [name.partition("/")[0] for name in names]
    aside = np.array(names)[set_aside(names, 0.2, 0, classes)]
    assert len(aside) == 40
    assert np.mean([found[name] == name.partition("/")[0] for name in aside]) == top1


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_boxes(place):
    write_boxes(place)
    train, evaluate, predict = commands("Boxes and masks")
    said = run(place, train)
    assert "12 of 24 objects of train have a box and no mask" in said
    metrics = json.loads(run(place, evaluate).splitlines()[-1])
    assert metrics["val/box_ap50"] > 0.3
    assert "val/mask_ap50" in metrics
    run(place, predict)
    images = json.loads((place / "found/coco_images.json").read_text())
    assert [category["name"] for category in images["categories"]] == ["circle", "square"]
    assert len(list((place / "found/pictures").iterdir())) == 8


@pytest.mark.slow
def test_maps(place):
    write_maps(place)
    train, evaluate, predict = commands("Label maps")
    run(place, train)
    said = run(place, f"{evaluate} --save-predictions saved")
    metrics = json.loads(said.splitlines()[-1])
    assert metrics["val/miou"] > 0.4
    names = (place / "names.txt").read_text().split()
    lines = [line.split() for line in said.splitlines()]
    printed = {words[0]: float(words[1]) for words in lines if words and words[0] in names}

    run(place, predict)
    every = pictures_of(place / "regions/labels")
    assert len(every) == 30
    aside = np.array(every)[set_aside(every, 0.2, 0)].tolist()
    assert aside == pictures_of(place / "saved/labels")
    inside, union = np.zeros(4), np.zeros(4)
    for name in aside:
        got, label, again = (
            np.asarray(Image.open(place / folder / f"{name}.png"))
            for folder in ("saved/labels", "maps/labels", "regions/labels")
        )
        assert (got != again).mean() < 1e-3
        for i in range(4):
            inside[i] += ((got == i) & (label == i)).sum()
            union[i] += (((got == i) | (label == i)) & (label != 255)).sum()
    for i, name in enumerate(names):
        assert printed[name] == pytest.approx(100 * inside[i] / union[i], abs=0.006), name


def pictures_of(folder):
    return sorted(os.path.relpath(path, folder)[:-4] for path in folder.rglob("*.png"))
