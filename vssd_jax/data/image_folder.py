"""Pictures in a folder per class: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`."""

import collections
import os
import pathlib
from typing import Any

import numpy as np

from vssd_jax.data.endings import ENDINGS, describe_endings
from vssd_jax.errors import UserError


class ImageFolder:
    """The pictures in `root/split/<class>/`, a `LabelledSource`.

    Labels number the classes in the order of their names. Where there is a `train` folder, its
    classes count for every split, so that a validation set that lacks a class keeps its labels.
    Pictures are ordered by class and file name; hidden files are ignored. Files of other endings
    and folders inside a class's are not read, and counted.

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
        self._other_endings: collections.Counter[str] = collections.Counter()
        self._inner: list[str] = []
        number = {name: label for label, name in enumerate(self.class_names)}
        for name in present:
            files = self._list(folder / name)
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

    def _list(self, folder: pathlib.Path) -> list[bytes]:
        """The names of the pictures in the folder of a class; notes what else is there."""
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(ENDINGS):
                    files.append(os.fsencode(entry.name))
                elif entry.is_dir():
                    self._inner.append(entry.path)
                else:
                    self._other_endings[pathlib.Path(entry.name).suffix.lower()] += 1
        return sorted(files)

    def describe_problems(self) -> str:
        """What is in the folders of the classes and not read; empty if nothing is."""
        parts = [describe_endings(self._other_endings)] if self._other_endings else []
        if self._inner:
            count = sum(
                file.lower().endswith(ENDINGS)
                for folder in self._inner
                for _, _, files in os.walk(folder)
                for file in files
            )
            parts.append(
                f"{count} pictures in {len(self._inner)} folders inside the classes' folders "
                f"({_shortened([os.path.basename(folder) for folder in self._inner])})"
            )
        return f"{self._folder}: {'; '.join(parts)}" if parts else ""

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        label = self._labels[index]
        name = os.fsdecode(self._names[index])
        path = os.path.join(self._folder, self.class_names[label], name)
        with open(path, "rb") as file:
            return {"image": file.read(), "name": path, "label": label}


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
