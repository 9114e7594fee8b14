"""Seconds and memory to open a detection data set of COCO's size.

    python -m benchmarks.coco_index [--small] [--folder FOLDER] [--json FILE]

Writes a JSON file like instances_train2017.json (118,287 images, 860,001 annotations, 448 MB) and a
folder of as many empty files, and opens them in a process of its own. The pictures are empty, so
that only the index is measured, and elements without their pixels.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

IMAGES, ANNOTATIONS, CROWDS, CATEGORIES = 118_287, 860_001, 10_000, 80
SMALL = 200  # times fewer of all
EMPTY = 1021 / IMAGES  # share of the images without annotations


def write(folder: pathlib.Path, *, images: int, annotations: int, crowds: int) -> pathlib.Path:
    """Writes `train2017/` and `annotations/instances_train2017.json`, and gives the JSON's path.

    The annotations are in no order of the images, and the categories come last, as in COCO's file.
    """
    rng = np.random.default_rng(0)
    pictures = folder / "train2017"
    pictures.mkdir(parents=True)
    path = folder / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    ids = np.sort(rng.choice(581_929, images, replace=False)) + 1
    sizes = np.array([(480, 640), (427, 640), (640, 480), (640, 427)])[rng.integers(0, 4, images)]
    # One object in each image that is not empty, and the others with a long tail.
    full = np.flatnonzero(rng.random(images) >= EMPTY)
    share = rng.gamma(1.0, 1.0, len(full))
    others = rng.choice(full, annotations - len(full), p=share / share.sum())
    owner = rng.permutation(np.concatenate([full, others]))
    crowd = np.zeros(annotations, bool)
    crowd[rng.choice(annotations, crowds, replace=False)] = True
    category_share = 1 / np.arange(1, CATEGORIES + 1)
    category = rng.choice(CATEGORIES, annotations, p=category_share / category_share.sum()) + 1
    with open(path, "w") as file:
        file.write('{"info": {"description": "made up"},"licenses": [{"id": 1}],"images": [')
        for place, (number, (height, width)) in enumerate(zip(ids, sizes, strict=True)):
            name = f"{number:012d}.jpg"
            (pictures / name).touch()
            url = f"http://images.example.org/train2017/{name}"
            file.write(
                f'{"," if place else ""}{{"license": 3,"file_name": "{name}","coco_url": "{url}",'
                f'"height": {height},"width": {width},"date_captured": "2013-11-14 11:18:45",'
                f'"flickr_url": "http://farm9.example.org/8186/8119368305_4e622c8349_z.jpg",'
                f'"id": {number}}}'
            )
        file.write('],"annotations": [')
        for place in range(annotations):
            size = sizes[owner[place]]
            box, area, mask = _object(rng, size, crowd=crowd[place])
            file.write(
                f'{"," if place else ""}{{"segmentation": {mask},"area": {area},'
                f'"iscrowd": {int(crowd[place])},"image_id": {ids[owner[place]]},"bbox": {box},'
                f'"category_id": {category[place]},"id": {place + 1}}}'
            )
        names = [
            {"supercategory": "thing", "id": i + 1, "name": f"thing {i}"} for i in range(CATEGORIES)
        ]
        file.write(f'],"categories": {json.dumps(names)}}}')
    return path


def _object(rng: np.random.Generator, size: np.ndarray, *, crowd: bool) -> tuple[str, str, str]:
    """The box, area and mask of an object, as JSON."""
    height, width = map(int, size)
    w, h = (np.exp(rng.uniform(np.log(8), np.log(size[::-1] - 8)))).tolist()
    x, y = rng.random() * (width - w), rng.random() * (height - h)
    if crowd:
        runs = np.diff(np.sort(rng.choice(height * width, 400, replace=False)), prepend=0)
        runs = [*runs.tolist(), height * width - int(runs.sum())]
        mask = json.dumps({"counts": runs, "size": [height, width]})
    else:
        count = 1 + rng.poisson(0.15)
        polygons = []
        for _ in range(count):
            angle = np.sort(rng.random(3 + rng.geometric(1 / 18)))[:, None] * 2 * np.pi
            radius, centre = np.array((w, h)) / 2, np.array((x + w / 2, y + h / 2))
            points = centre + radius * np.hstack((np.cos(angle), np.sin(angle)))
            polygons.append("[" + ",".join(f"{v:.2f}" for v in points.ravel().tolist()) + "]")
        mask = f"[{','.join(polygons)}]"
    return f"[{x:.2f},{y:.2f},{w:.2f},{h:.2f}]", repr(w * h * 0.6), mask


OPEN = """
import pathlib, pickle, resource, sys, time
import numpy as np
from vssd_jax.data.datasets.coco import CocoSource

path = pathlib.Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, used = time.perf_counter(), time.process_time()
source = CocoSource(path.parents[1] / "train2017", path, training=True)
seconds, used = time.perf_counter() - start, time.process_time() - used
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pickled = len(pickle.dumps(source))
chosen = np.random.default_rng(0).integers(0, len(source), 2000)
start = time.perf_counter()
for index in chosen:
    source[index]
element = (time.perf_counter() - start) / len(chosen)
print(len(source), seconds, used, before, peak, pickled, element)
"""


def measure(path: pathlib.Path) -> dict:
    """Opens the data set in a process of its own."""
    root = pathlib.Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", OPEN, str(path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    images, seconds, used, before, peak, pickled, element = map(float, run.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "file MB": path.stat().st_size / 1e6,
        "images": int(images),
        "seconds": seconds,
        "seconds of a core": used,
        "peak MB": peak * unit / 1e6,
        "imports alone MB": before * unit / 1e6,
        "pickled MB": pickled / 1e6,
        "us/element": 1e6 * element,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help=f"{SMALL} times fewer of all")
    parser.add_argument("--folder", type=pathlib.Path, help="where to keep the data set")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    options = parser.parse_args()
    less = SMALL if options.small else 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary) / "coco"
        path = folder / "annotations" / "instances_train2017.json"
        if not path.exists():
            counts = {"images": IMAGES, "annotations": ANNOTATIONS, "crowds": CROWDS}
            write(folder, **{name: count // less for name, count in counts.items()})
        row = measure(path)
    from benchmarks import common  # not before: a process starts with its parent's peak of memory

    common.report(options, [row])


if __name__ == "__main__":
    main()
