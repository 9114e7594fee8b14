"""Pictures in a folder per class: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`."""

import os
import pathlib
from typing import Any

import numpy as np

from vssd_jax.errors import UserError

# Of the files that count as pictures; the format is read from the content.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """The pictures in `root/split/<class>/`, a `LabelledSource`.

    Labels number the classes in the order of their names. Where there is a `train` folder, its
    classes count for every split, so that a validation set that lacks a class keeps its labels.
    Pictures are ordered by class and file name; hidden files are ignored, and so are folders inside
    a class's.

    Args:
      root: the folder that holds the splits.
      split: the name of one of them.

    Raises:
      UserError: a missing folder, a class without pictures, a class unknown to `train`.
    """

    def __init__(self, root: str | os.PathLike, split: str):
        root = pathlib.Path(root)
        folder = root / split
        present = _class_names(folder)
        self.class_names = present
        if split != "train" and (root / "train").is_dir():
            self.class_names = _class_names(root / "train")
            unknown = sorted(set(present) - set(self.class_names))
            if unknown:
                raise UserError(
                    f"{folder} has classes that {root / 'train'} lacks: {_shortened(unknown)}. "
                    "Labels would not agree; the same folder names are needed in both."
                )
        names: list[bytes] = []
        labels: list[int] = []
        empty: list[str] = []
        number = {name: label for label, name in enumerate(self.class_names)}
        for name in present:
            with os.scandir(folder / name) as entries:
                files = sorted(
                    os.fsencode(entry.name)
                    for entry in entries
                    if entry.name.lower().endswith(ENDINGS) and not entry.name.startswith(".")
                )
            if not files:
                empty.append(name)
            names += files
            labels += [number[name]] * len(files)
        if empty:
            raise UserError(
                f"No pictures in {len(empty)} class folder(s) of {folder}: {_shortened(empty)}. "
                f"Expected files that end in {', '.join(ENDINGS)}; remove the folder of a class "
                "that is not to be used."
            )
        self._folder = folder
        # Fixed-width arrays: a list of a million strings would weigh hundreds of megabytes in
        # every worker.
        self._names = np.array(names)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        label = self._labels[index]
        name = os.fsdecode(self._names[index])
        with open(os.path.join(self._folder, self.class_names[label], name), "rb") as file:
            return {"image": file.read(), "label": label}


def _class_names(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}. Expected {folder}/<class>/<picture>.")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"No class folders in {folder}. Expected {folder}/<class>/<picture>.")
    return names


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
