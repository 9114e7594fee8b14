"""Converts PyTorch checkpoints to weights folders, and back with --reverse.

python convert_torch_weights.py --input vssd_tiny_best_ema.pth --output weights/vssd_tiny
python convert_torch_weights.py --input hf://YuhengSSS/VSSD/vssd_micro_best.pth --output weights/m
python convert_torch_weights.py --reverse --input weights/vssd_tiny --output vssd_tiny.pth
"""

import json
import os

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

INPUT = flags.DEFINE_string(
    "input", None, "A .pth or .safetensors file, hf://owner/repo/file, or a weights folder."
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    "The model's name, for example vssd_tiny; recognised from the tensors if left out.",
)
OUTPUT = flags.DEFINE_string("output", None, "The weights folder (with --reverse: .pth) to write.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["model", "ema"], "Which of a file's two; default: the EMA where it has one."
)
OVERRIDES = flags.DEFINE_string(
    "overrides", "{}", "Fields of the model's config as JSON, e.g. '{\"token_weight_sign\": -1}'."
)
REVERSE = flags.DEFINE_bool("reverse", False, "From a weights folder to a .pth file.")


def main():
    if INPUT.value is None or OUTPUT.value is None:
        raise UserError("--input and --output are needed; see --help")
    if os.path.lexists(OUTPUT.value):
        raise UserError(f"{OUTPUT.value} exists already; choose another name or remove it")
    try:
        overrides = json.loads(OVERRIDES.value)
    except ValueError as error:
        raise UserError(f"--overrides is no JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise UserError("--overrides is no JSON object")

    from vssd_jax.weights.folder import write_folder
    from vssd_jax.weights.load import load, to_torch
    from vssd_jax.weights.torch_file import write_torch_file

    weights = load(INPUT.value, model=MODEL.value, which=WEIGHTS.value, overrides=overrides)
    if REVERSE.value:
        tensors = to_torch(weights)
        write_torch_file(OUTPUT.value, tensors)
    else:
        tensors = weights.params
        write_folder(OUTPUT.value, weights)
    taken = {"ema": "the EMA", "model": "the model"}.get(
        weights.provenance.get("state_dict"), "all"
    )
    size = sum(array.size for array in weights.params.values())
    print(
        f"{weights.model} with {weights.num_classes} classes: took {taken} of "
        f"{INPUT.value}, {len(tensors)} tensors with {size:,} values -> {OUTPUT.value}"
    )


if __name__ == "__main__":
    cli.run(main)
