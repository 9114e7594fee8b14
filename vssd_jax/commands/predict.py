"""Predicts for pictures without labels, with any weights.

    python predict.py --weights weights/vssd_tiny --input photos/ --output predictions/

`--weights` takes a weights folder, a .pth file, hf://owner/repo or the workdir of a training run;
`--input` a picture, a folder with its sub-folders, or a pattern such as 'photos/**/*.jpg'. What is
written follows from the task of the weights: the five most probable classes, objects with boxes
and masks, or label maps. A run that was ended goes on with --skip-existing.
"""

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", None, "What to predict with, see above.")
INPUT = flags.DEFINE_string("input", None, "A picture, a folder or a pattern.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write to.")
SKIP_EXISTING = flags.DEFINE_bool("skip_existing", False, "Go on with what lies in --output.")
PICTURES = flags.DEFINE_bool("pictures", True, "Draw pictures of the results.")
TOP = flags.DEFINE_integer("top", 5, "How many classes a classification has.")
MIN_SCORE = flags.DEFINE_float("min_score", 0.05, "Least score of an object in the results.")
DRAW_SCORE = flags.DEFINE_float("draw_score", 0.3, "Least score of an object that is drawn.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "The most pictures at a time.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the activations.")
IMPLEMENTATION = flags.DEFINE_string("implementation", None, "xla, pallas or triton.")
MAX_PIXELS = flags.DEFINE_integer("max_pixels", 89_478_485, "A picture with more is unreadable.")


def main() -> None:
    weights, source, output = WEIGHTS.value, INPUT.value, OUTPUT.value
    if weights is None or source is None or output is None:
        raise UserError("--weights, --input and --output are needed; see --help")
    for name, score in (("min_score", MIN_SCORE.value), ("draw_score", DRAW_SCORE.value)):
        if not 0 <= score <= 1:
            raise UserError(f"--{name}={score} must be from 0 to 1")
    from vssd_jax.host import keep_compiled_programs, prepare_cpu
    from vssd_jax.inference.predict_files import predict_files

    prepare_cpu()
    keep_compiled_programs()
    predict_files(
        weights,
        source,
        output,
        skip_existing=SKIP_EXISTING.value,
        pictures=PICTURES.value,
        draw_score=DRAW_SCORE.value,
        top=TOP.value,
        min_score=MIN_SCORE.value,
        batch_size=BATCH_SIZE.value,
        dtype=DTYPE.value,
        implementation=IMPLEMENTATION.value,
        max_pixels=MAX_PIXELS.value,
    )


def run() -> None:
    """The command."""
    cli.run(main, __name__)
