"""Writes a model as a file of its own, that runs without this package.

python export.py --weights weights/vssd_tiny --output vssd_tiny.zip
python export.py --weights weights/vssd_tiny --output vssd_tiny.zip --dtype bfloat16 --input uint8
python export.py --weights weights/vssd_tiny --output features.zip --part features
python export.py --weights weights/upernet --output upernet.zip --size 512x512

`--weights` takes a weights folder, a .pth file, hf://owner/repo or the workdir of a training run.
A StableHLO file runs with JAX alone, on CPUs, GPUs and TPUs: docs/deploy.md has the lines.
"""

import importlib

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", None, "What to export, see above.")
OUTPUT = flags.DEFINE_string("output", None, "The file to write.")
FORMAT = flags.DEFINE_enum("format", "stablehlo", ["stablehlo", "onnx"], "Of the file.")
PART = flags.DEFINE_enum("part", "model", ["model", "features"], "All of it, or feature maps.")
SIZE = flags.DEFINE_string(
    "size",
    None,
    "HEIGHTxWIDTH of the images. Left out: any, of classifiers and feature maps as StableHLO; "
    "otherwise that of the preprocessing.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "Of the weights; activations are bfloat16 with bfloat16, otherwise float32.",
)
INPUT = flags.DEFINE_enum(
    "input", "float32", ["float32", "uint8"], "Normalised images, or grey levels."
)
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "Where StableHLO can run: cpu, cuda, rocm, tpu."
)


def main() -> None:
    if WEIGHTS.value is None or OUTPUT.value is None:
        raise UserError("--weights and --output are needed; see --help")
    from vssd_jax.inference.export import export_stablehlo, parse_size

    size = None if SIZE.value is None else parse_size(SIZE.value)
    if FORMAT.value == "onnx":
        for flag in (INPUT, PLATFORMS):
            if flag.present:
                raise UserError(f"--{flag.name} is for --format stablehlo")
        try:
            module = importlib.import_module("vssd_jax.inference.export_onnx")
        except ImportError as error:
            raise UserError(
                f"--format onnx needs the extra onnx: pip install -e '.[onnx]' ({error})"
            ) from error
        module.export_onnx(
            WEIGHTS.value, OUTPUT.value, part=PART.value, size=size, dtype=DTYPE.value
        )
        return
    print(
        export_stablehlo(
            WEIGHTS.value,
            OUTPUT.value,
            part=PART.value,
            size=size,
            dtype=DTYPE.value,
            input_dtype=INPUT.value,
            platforms=PLATFORMS.value,
        )
    )


def run() -> None:
    """The command."""
    cli.run(main, __name__)
