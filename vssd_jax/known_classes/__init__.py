"""The names of classes: those of well-known datasets, and those that a config gives."""

import functools
import importlib.resources
import pathlib
from collections.abc import Sequence

from vssd_jax.errors import UserError


@functools.cache
def read(dataset: str) -> tuple[str, ...]:
    """By label: of "imagenet" (ILSVRC 2012), "coco" (2017), "ade20k", "cityscapes" or "voc"."""
    lines = _lines(dataset)
    return tuple(line.split(" ", 1)[1] for line in lines) if dataset == "imagenet" else lines


def readable(names: Sequence[str]) -> list[str]:
    """The names with words in place of ImageNet's ids ("n01440764"), if all of them are such."""
    words: dict[str, str] = dict(line.split(" ", 1) for line in _lines("imagenet"))
    return [words[name] for name in names] if all(name in words for name in names) else list(names)


def _lines(dataset: str) -> tuple[str, ...]:
    file = importlib.resources.files(__name__) / f"{dataset}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def parse(text: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in `class_names`: separated by commas, or the lines of a text file.

    Empty for None. Raises a UserError for a file that cannot be read, and a name that occurs twice.
    """
    if text is None:
        return ()
    if not isinstance(text, str):
        names = tuple(text)
    elif text.endswith(".txt") or pathlib.Path(text).is_file():
        try:
            lines = pathlib.Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"class_names={text} cannot be read: {error}") from error
        names = tuple(line.strip() for line in lines if line.strip())
    else:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"class_names={text} has no names")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"class_names: {twice[0]!r} occurs twice")
    return names
