"""Images per second of the training transforms, against the same in plain Pillow, in one run.

    python benchmarks/input_pipeline.py --output input_pipeline.json

All pipelines decode the same ImageNet-like JPEGs and apply the same draws of crop, flip,
RandAugment and erasing:

- "pillow" is the plain pipeline: Pillow, then NumPy normalises and erases, all on the host;
- "pillow, uint8" stops before normalisation, for a comparison of the pixel work alone;
- "vssd_jax" is what this project's hosts do: the device normalises and erases;
- "vssd_jax, cache_decoded" is the same from a cache of decoded pictures.

Per core means per second of processor time, the pipelines taking turns picture by picture, so that
other work on the machine touches all alike; ratios are medians over repetitions. Then `--workers`
processes, one a core, run the pipeline at once: the scaling is their joint rate by the clock over
the number of workers times the rate of one, and wants a machine with nothing else to do.
"""

import argparse
import io
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vssd_jax.data import classification_transforms as transforms
from vssd_jax.data.cached import CachedSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.image_folder import ImageFolder
from vssd_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from vssd_jax.data.randaugment import FILL, sample_operations

BICUBIC = Image.Resampling.BICUBIC
IMAGE_SIZE = 224
MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)


def write_pictures(root: pathlib.Path, count: int) -> None:
    """500x375 JPEGs of about 110 kB, as ImageNet's are: colours, edges and some noise."""
    folder = root / "train" / "n00000001"
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = rng.normal(0, 9, (375, 500, 1))
        for cells, weight in ((4, 0.5), (16, 0.3), (64, 0.2)):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels = pixels + weight * np.asarray(small.resize((500, 375), BICUBIC), float)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.JPEG", quality=92)


def _affine(image, matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL
    )


def _solarize_add(image, amount):
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


PILLOW_OPERATIONS = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageOps.invert,
    "Rotate": lambda i, degrees: i.rotate(degrees, resample=BICUBIC, fillcolor=FILL),
    "PosterizeIncreasing": lambda i, bits: i.point([v & (0xFF00 >> bits) for v in range(256)] * 3),
    "SolarizeIncreasing": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda i, f: ImageEnhance.Color(i).enhance(f),
    "ContrastIncreasing": lambda i, f: ImageEnhance.Contrast(i).enhance(f),
    "BrightnessIncreasing": lambda i, f: ImageEnhance.Brightness(i).enhance(f),
    "SharpnessIncreasing": lambda i, f: ImageEnhance.Sharpness(i).enhance(f),
    "ShearX": lambda i, f: _affine(i, (1, f, 0, 0, 1, 0)),
    "ShearY": lambda i, f: _affine(i, (1, 0, 0, f, 1, 0)),
    "TranslateXRel": lambda i, f: _affine(i, (1, 0, f * i.width, 0, 1, 0)),
    "TranslateYRel": lambda i, f: _affine(i, (1, 0, 0, 0, 1, f * i.height)),
}


def pillow_example(data: bytes, rng: np.random.Generator) -> dict:
    """`TrainTransform` with Pillow doing all the pixel work: the same draws in the same order."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = transforms.sample_crop(image.height, image.width, rng)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, arguments in sample_operations(rng):
        image = PILLOW_OPERATIONS[name](image, *arguments)
    erase = transforms.sample_erasing(IMAGE_SIZE, IMAGE_SIZE, rng)
    return {"image": np.array(image), "erase": np.array(erase, np.int32)}


def pillow_complete(data: bytes, rng: np.random.Generator) -> dict:
    """`pillow_example` through normalisation and random erasing: (224, 224, 3) float32."""
    example = pillow_example(data, rng)
    image = example["image"].astype(np.float32)
    image /= 255
    image -= MEAN
    image /= STD
    top, left, height, width = example["erase"]
    noise = rng.standard_normal((height, width, 3), np.float32)
    image[top : top + height, left : left + width] = noise
    return {"image": image}


def pipelines(root: pathlib.Path) -> dict:
    """name -> (index, generator) -> example."""
    source = ImageFolder(root / "train")
    decoded = DecodedSource(source)
    cache = CachedSource(decoded, root / "cache", shorter_side=256)
    # A long run soon knows the resizing matrix of every crop; these few pictures would not.
    for size in range(1, 501):
        transforms.resize(np.zeros((size, size, 3), np.uint8), IMAGE_SIZE, IMAGE_SIZE)
    transform = transforms.TrainTransform(image_size=IMAGE_SIZE)
    return {
        "pillow": lambda i, rng: pillow_complete(source[i]["image"], rng),
        "pillow, uint8": lambda i, rng: pillow_example(source[i]["image"], rng),
        "vssd_jax": lambda i, rng: transform(decoded[i], rng),
        "vssd_jax, cache_decoded": lambda i, rng: transform(cache[i], rng),
    }


def check_agreement(functions: dict, count: int) -> None:
    """The comparison means nothing unless both do the same work."""
    for i in range(count):
        one = functions["pillow, uint8"](i, np.random.default_rng(i))
        other = functions["vssd_jax"](i, np.random.default_rng(i))
        difference = np.abs(one["image"].astype(int) - other["image"])
        # A grey level of the resized picture can grow in what follows, as where it is equalised
        # or sharpened; that is rare.
        if (difference > 1).mean() > 0.01 or (one["erase"] != other["erase"]).any():
            raise AssertionError(f"Pillow and vssd_jax differ on picture {i}")


def core_seconds(functions: dict, count: int, epoch: int) -> dict:
    """Processor time that each pipeline needs for `count` pictures, taken in turns."""
    total = dict.fromkeys(functions, 0.0)
    for i in range(count):
        for name, function in functions.items():
            rng = np.random.default_rng((epoch, i))
            start = time.process_time()
            function(i, rng)
            total[name] += time.process_time() - start
    return total


def ratios(times: dict, baseline: str) -> dict:
    return {
        name: statistics.median(a / b for a, b in zip(times[baseline], t, strict=True))
        for name, t in times.items()
    }


def run(function, count: int, epoch: int) -> None:
    for i in range(count):
        function(i, np.random.default_rng((epoch, i)))


def work(pipelines, root: pathlib.Path, count: int, epochs: int, barrier, spans) -> None:
    function = pipelines(root)["vssd_jax"]
    run(function, count // 10, 0)
    for epoch in range(epochs):
        barrier.wait()
        start = time.monotonic()
        run(function, count, epoch)
        spans.put((epoch, start, time.monotonic()))


def joint_rate(pipelines, root: pathlib.Path, count: int, epochs: int, workers: int) -> float:
    """Images per second of `workers` processes, from the first's start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(workers), context.Queue()
    arguments = (pipelines, root, count, epochs, barrier, queue)
    processes = [context.Process(target=work, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    spans = [queue.get() for _ in range(workers * epochs)]
    for process in processes:
        process.join()
    rates = []
    for epoch in range(epochs):
        _, starts, ends = zip(*(span for span in spans if span[0] == epoch), strict=True)
        rates.append(workers * count / (max(ends) - min(starts)))
    return statistics.median(rates)


def nbytes(example: dict) -> int:
    return sum(np.asarray(value).nbytes for value in example.values())


def compare(
    description: str,
    *,
    write_pictures,
    pipelines,
    check_agreement,
    baselines: tuple[str, ...],
    about: dict,
    pictures: int = 200,
) -> None:
    """The command line of a comparison.

    Args:
      description: of the script.
      write_pictures: (folder, number) -> None.
      pipelines: folder -> name -> (index, generator) -> example; "vssd_jax" is this project's. A
        function of a module, for worker processes.
      check_agreement: (pipelines, number of pictures) -> None.
      baselines: names of pipelines to which all are compared.
      about: further fields of the report.
      pictures: how many, unless the user says otherwise.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=pictures)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    count, repetitions = arguments.pictures, arguments.repetitions
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_pictures(root, count)
        functions = pipelines(root)
        check_agreement(functions, min(count, 100))
        repeated = [core_seconds(functions, count, epoch) for epoch in range(repetitions)]
        times = {name: [t[name] for t in repeated] for name in functions}
        sizes = {name: nbytes(f(0, np.random.default_rng(0))) for name, f in functions.items()}
        rates = {
            workers: joint_rate(pipelines, root, count, repetitions, workers)
            for workers in sorted({1, arguments.workers})
        }
    keys = {name: "ratio_to_" + "_".join(name.replace(",", "").split()) for name in baselines}
    from benchmarks import common  # not at the top: each worker reads this file

    report = {
        "machine": common.machine(),
        **about,
        "images_per_second_per_core": {
            name: count / statistics.median(t) for name, t in times.items()
        },
        "bytes_per_image": sizes,
        **{key: ratios(times, name) for name, key in keys.items()},
        "images_per_second_by_workers": rates,
        "scaling_per_worker": rates[arguments.workers] / (arguments.workers * rates[1]),
    }
    print(f"{'pipeline':<26}{'images/s per core':>18}{'bytes':>10}", end="")
    print("".join(f"{f'to {name}':>20}" for name in baselines))
    for name, rate in report["images_per_second_per_core"].items():
        print(f"{name:<26}{rate:>18.0f}{sizes[name]:>10}", end="")
        print("".join(f"{report[key][name]:>20.2f}" for key in keys.values()))
    for workers, rate in rates.items():
        print(f"{workers} worker(s): {rate:.0f} images/s")
    print(f"scaling per worker: {report['scaling_per_worker']:.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    compare(
        __doc__,
        write_pictures=write_pictures,
        pipelines=pipelines,
        check_agreement=check_agreement,
        baselines=("pillow", "pillow, uint8"),
        about={"picture": "500x375 JPEG, quality 92", "image_size": IMAGE_SIZE},
    )
