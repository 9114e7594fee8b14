"""Converts PyTorch checkpoints and runs to weights folders, and to PyTorch with --reverse.

python convert_torch_weights.py --input vssd_tiny_best_ema.pth --output weights/vssd_tiny
python convert_torch_weights.py --input hf://YuhengSSS/VSSD/vssd_micro_best.pth --output weights/m
python convert_torch_weights.py --input runs/digits --output weights/digits
python convert_torch_weights.py --input weights/vssd_tiny --output weights/half --dtype bfloat16
python convert_torch_weights.py --reverse --input weights/vssd_tiny --output vssd_tiny.pth
"""

import json

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

INPUT = flags.DEFINE_string(
    "input",
    None,
    "A .pth or .safetensors file, a weights folder, a workdir, or hf://owner/repo[@revision][/file].",
)
OUTPUT = flags.DEFINE_string("output", None, "The weights folder (with --reverse: .pth) to write.")
MODEL = flags.DEFINE_string(
    "model", None, "The model's name, for example vssd_tiny; recognised if left out."
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "Which of a file's models: 'model', 'ema', or the name of an entry such as 'teacher'; "
    "default: the EMA where it has one. Of a workdir 'best'; default: its latest checkpoint.",
)
ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "Let NaN and infinity pass.")
CLASS_NAMES = flags.DEFINE_string(
    "class_names", None, "Names of the classes, separated by commas, or a text file."
)
OVERRIDES = flags.DEFINE_string(
    "overrides", "{}", "Fields of the model's config as JSON, e.g. '{\"token_weight_sign\": -1}'."
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of matrices and kernels, whose cost is measured; left out, that of the input.",
)
REVERSE = flags.DEFINE_bool("reverse", False, "Write a .pth file with PyTorch's names.")


def main() -> None:
    if INPUT.value is None or OUTPUT.value is None:
        raise UserError("--input and --output are needed; see --help")
    try:
        overrides = json.loads(OVERRIDES.value)
    except ValueError as error:
        raise UserError(f"--overrides is no JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise UserError("--overrides is no JSON object")

    from vssd_jax.known_classes import parse
    from vssd_jax.weights.convert import convert

    print(
        convert(
            INPUT.value,
            OUTPUT.value,
            model=MODEL.value,
            which=WEIGHTS.value,
            overrides=overrides,
            class_names=parse(CLASS_NAMES.value) or None,
            allow_nonfinite=ALLOW_NONFINITE.value,
            reverse=REVERSE.value,
            dtype=DTYPE.value,
        )
    )


def run() -> None:
    """The command."""
    cli.run(main, __name__)
