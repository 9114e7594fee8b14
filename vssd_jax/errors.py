"""The error for what a user can mend."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in the input: its message is one line that says what is wrong and what to do.

    The command-line scripts print it without a traceback and exit with status 2.
    """


# Modules that the package itself does not need -> the extra that brings them.
EXTRAS = {
    **dict.fromkeys(
        (
            "array_record", "grain", "matplotlib", "ml_collections", "sklearn", "tensorboardX",
            "tensorflow_datasets",
        ),
        "train",
    ),
    "tensorflow": "imagenet",
    "jax_triton": "cuda12",
    "jax2onnx": "onnx",
    "onnx": "onnx",
    "onnxruntime": "onnx",
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install, in a line, if a module of one of the extras is missing; else None."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"this needs the package {name}: pip install 'vssd_jax[{EXTRAS[name]}]'"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the nearest of `choices`, or all of them."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(choices)}"

def describe_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Where two lists of class names differ first, and by how much."""
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} classes"
    label, (a, b) = next(
        (i, pair) for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]
    )
    count = sum(x != y for x, y in zip(first, second, strict=True))
    return f"label {label} is {a!r} and {b!r} ({count} of {len(first)} names differ)"
