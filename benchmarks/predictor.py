"""Pictures a second of the predictor beside those of the evaluation loop, in one run.

    python -m benchmarks.predictor [--model=vssd_micro] [--pictures=256] [--batch=32]

Both read the same JPEGs (500x375) in a folder per class, decode, prepare and classify them.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import vssd_jax
from vssd_jax.config import classification_config
from vssd_jax.host import prepare_cpu
from vssd_jax.models.split import SplitModel
from vssd_jax.tasks import make_task
from vssd_jax.training.evaluator import Evaluator
from vssd_jax.training.sharding import make_mesh
from vssd_jax.weights.folder import Weights, write_folder


def write_pictures(root: pathlib.Path, count: int) -> None:
    """Smooth noise, which compresses as photographs do."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / "val" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 255, (47, 63, 3), np.uint8)
        picture = cv2.resize(small, (500, 375), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:05d}.jpg"), picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vssd_micro")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    flags.FLAGS(["benchmark"])  # Grain reads absl flags
    prepare_cpu()
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        write_pictures(root, args.pictures)
        config = classification_config()
        config.update(
            model=args.model, dataset="folder", data_dir=name, dtype=args.dtype,
            eval_batch_size=args.batch,
        )  # fmt: skip
        task = make_task(config)
        model = SplitModel(task.build)
        params, statistics_ = model.init(jax.random.key(0))
        arrays = {**params, **statistics_}
        held = {name: np.asarray(value) for name, value in arrays.items()}
        weights = Weights(args.model, 4, {}, held, list(task.class_names), task.preprocessing)
        write_folder(root / "weights", weights)
        evaluator = Evaluator(task, model, make_mesh({"data": -1}))
        dtype = jnp.dtype(args.dtype)
        predictor = vssd_jax.load_predictor(root / "weights", batch_size=args.batch, dtype=dtype)
        files = sorted((root / "val").rglob("*.jpg"))
        ways = {
            "evaluation": lambda: evaluator(arrays),
            "predictor": lambda: list(predictor.stream(files)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.rounds + 1):
            for way, call in ways.items():
                start = time.perf_counter()
                call()
                if number:  # the first compiles
                    seconds[way].append(time.perf_counter() - start)
    rates = {way: args.pictures / statistics.median(times) for way, times in seconds.items()}
    ratio = statistics.median(
        e / p for e, p in zip(seconds["evaluation"], seconds["predictor"], strict=True)
    )
    report = {"device": jax.devices()[0].device_kind, **vars(args), "pictures_per_second": rates}
    print(json.dumps(report | {"predictor / evaluation": ratio}))


if __name__ == "__main__":
    main()
