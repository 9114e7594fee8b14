"""Fine-tuning against training from scratch, at equal steps, on scikit-learn's digits.

A model is trained on the digits 0 to 4. Then ten-class models are trained on 20 pictures of each
digit, from its weights (once with layer decay, once as a linear probe) and from nothing.

    python -m benchmarks.finetune [--seeds=3] [--steps=80]
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import cv2
import numpy as np
from sklearn.datasets import load_digits


def write_digits(root: pathlib.Path, classes: range, train: int | None, val: int = 36) -> None:
    """Folders of digits, 32 pixels wide: the last `val` of each for evaluation."""
    images, labels = load_digits(return_X_y=True)
    for digit in classes:
        chosen = images[labels == digit].reshape(-1, 8, 8)
        parts = {"val": chosen[-val:], "train": chosen[:-val][:train]}
        for part, pictures in parts.items():
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            for number, picture in enumerate(pictures):
                grey = (picture * (255 / 16)).round().astype(np.uint8)
                grey = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_CUBIC)
                cv2.imwrite(str(folder / f"{number:03d}.png"), grey)


def run(workdir: pathlib.Path, data: pathlib.Path, *options: str) -> float:
    """The accuracy in the end."""
    command = (
        sys.executable, "train.py", "--config=configs/finetune.py:classification,nano",
        f"--workdir={workdir}", f"--config.data_dir={data}", "--config.image_size=32",
        "--config.eval_crop=1.0", "--config.augmentation.flip_probability=0.0",
        "--config.augmentation.randaugment_num_ops=1", "--config.augmentation.crop_area=(0.6, 1.0)",
        "--config.augmentation.erase_probability=0.0", "--config.patience=0", *options,
    )  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(line["val/top1"] for line in reversed(lines) if "val/top1" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        write_digits(root / "half", range(5), None)
        write_digits(root / "all", range(10), 20)
        half = run(root / "pretrained", root / "half", "--config.epochs=15")
        results: dict[str, list[float]] = {}
        start = f"--config.init_from={root / 'pretrained'}"
        kinds = {
            "scratch": (),
            "fine-tuned": (start, "--config.layer_decay=0.9"),
            "linear probe": (start, "--config.linear_probe=True"),
        }
        for kind, options in kinds.items():
            for seed in range(args.seeds):
                workdir = root / f"{kind}{seed}"
                steps = (f"--config.steps={args.steps}", "--config.eval_every_epochs=1000")
                top1 = run(workdir, root / "all", *steps, f"--config.seed={seed}", *options)
                results.setdefault(kind, []).append(top1)
    print(json.dumps({"pretrained on 0 to 4": half, "steps": args.steps, "top1": results}))


if __name__ == "__main__":
    main()
