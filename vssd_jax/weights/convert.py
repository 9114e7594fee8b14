"""From a PyTorch checkpoint to a weights folder, and back."""

import os
from collections.abc import Mapping
from typing import Any

from vssd_jax.errors import UserError
from vssd_jax.weights.folder import write_folder
from vssd_jax.weights.load import load, to_torch
from vssd_jax.weights.torch_file import write_torch_file


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    model: str | None = None,
    which: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    reverse: bool = False,
) -> str:
    """Writes the weights of `source` to `output`, whole or not at all.

    Args:
      source, model, which, overrides, allow_nonfinite: see `vssd_jax.weights.load.load`.
      output: the folder, or with `reverse` the `.pth` file; it must not exist.
      reverse: write a bare state dict with PyTorch's names.

    Returns:
      A line that says what was taken.

    Raises:
      UserError: what `load` raises, and an output that exists or cannot be written.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; choose another name or remove it")
    weights = load(
        source, model=model, which=which, overrides=overrides, allow_nonfinite=allow_nonfinite
    )
    count, size = len(weights.params), sum(array.size for array in weights.params.values())
    if reverse:
        write_torch_file(output, to_torch(weights))
    else:
        write_folder(output, weights)
    part = weights.provenance.get("state_dict", "")
    taken = {"ema": "its EMA, ", "model": "its model, "}.get(part, "")
    head = f"with {weights.num_classes} classes" if weights.num_classes else "without a head"
    return (
        f"{weights.model} {head} from {os.fspath(source)}: "
        f"{taken}{count} tensors with {size:,} parameters and statistics -> {output}"
    )
