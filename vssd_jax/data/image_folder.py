"""Pictures in a folder per class: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`."""

import collections
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vssd_jax.data.endings import ENDINGS, describe_endings
from vssd_jax.errors import UserError


def class_folders(folder: str | os.PathLike) -> list[str]:
    """The names of the classes' folders in a folder, sorted; hidden ones are left out.

    Raises:
      UserError: there is no such folder, or none in it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}. Expected {folder}/<class>/<picture>.")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"No class folders in {folder}. Expected {folder}/<class>/<picture>.")
    return names


class ImageFolder:
    """The pictures in `folder/<class>/`, however deep, a `LabelledSource`.

    Pictures are ordered by class and path; hidden files and folders are ignored, files of other
    endings counted.

    Args:
      folder: holds a folder for each class.
      class_names: of the labels 0, 1, ...; None takes those of the folders, sorted. Classes without
        a folder are allowed: a validation part may lack some.
      subset: leave out the folders of other classes, and count them; otherwise they are an error.
      oriented: whether the pictures' EXIF orientation counts.

    Raises:
      UserError: a missing folder, a class without pictures, a class that is not in `class_names`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        *,
        subset: bool = False,
        oriented: bool = False,
    ):
        self._oriented = oriented
        folder = pathlib.Path(folder)
        present = class_folders(folder)
        self.class_names = present if class_names is None else list(class_names)
        number = {name: label for label, name in enumerate(self.class_names)}
        unknown = [name for name in present if name not in number]
        if unknown and not subset:
            raise UserError(
                f"{folder} has classes that are not among those for training: "
                f"{_shortened(unknown)}. Labels would not agree; the same folder names are needed "
                "in both."
            )
        self._unknown, self._other_endings = unknown, collections.Counter[str]()
        names: list[bytes] = []
        labels: list[int] = []
        empty: list[str] = []
        for name in present:
            if name in number:
                files = sorted(self._list(folder / name, ""))
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
        if not names:
            raise UserError(f"No folder in {folder} is of one of the classes")
        self._folder = folder
        # Fixed-width arrays: a list of a million strings would weigh hundreds of megabytes in
        # every worker.
        self._names = np.array(names)
        self.labels = np.array(labels, np.int32)

    def _list(self, folder: pathlib.Path, prefix: str) -> Iterator[bytes]:
        """The paths of the pictures below the folder of a class; counts what else is there."""
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self._list(folder / entry.name, f"{prefix}{entry.name}/")
                elif entry.name.lower().endswith(ENDINGS):
                    yield os.fsencode(prefix + entry.name)
                else:
                    self._other_endings[pathlib.Path(entry.name).suffix.lower()] += 1

    def keep(self, chosen: np.ndarray) -> None:
        """Leaves out all samples but the chosen ones, (samples,) bool."""
        self._names, self.labels = self._names[chosen], self.labels[chosen]

    @property
    def names(self) -> list[bytes]:
        """The path of each sample inside the folder."""
        return [
            os.fsencode(self.class_names[label]) + b"/" + bytes(name)
            for label, name in zip(self.labels, self._names, strict=True)
        ]

    def describe_problems(self) -> str:
        """What is in the folders and not read; empty if nothing is."""
        parts = [describe_endings(self._other_endings)] if self._other_endings else []
        if self._unknown:
            parts.append(f"{len(self._unknown)} other classes ({_shortened(self._unknown)})")
        return f"{self._folder}: {'; '.join(parts)}" if parts else ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        label = self.labels[index]
        name = os.fsdecode(self._names[index])
        path = os.path.join(self._folder, self.class_names[label], name)
        with open(path, "rb") as file:
            sample = {"image": file.read(), "name": path, "label": label}
        return sample | {"oriented": True} if self._oriented else sample


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
