"""Shows what a model sees: token weights, receptive field, Grad-CAM, attention, features.

    python -m vssd_jax.look --weights weights/vssd_tiny --input dog.jpg --output looks/

`--weights` takes what predict.py takes: a weights folder, a .pth file, hf://owner/repo or the
workdir of a training run, of a classifier, a detector or a segmentor. `--input` is a picture, a
folder or a pattern. docs/looking_inside.md says what each drawing means; its numbers lie beside it.
"""

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", None, "What to look into, see above.")
INPUT = flags.DEFINE_string("input", None, "A picture, a folder or a pattern.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write to.")
WHAT = flags.DEFINE_list(
    "what", [], "Of token_weights, receptive_field, grad_cam, attention and features, with commas; "
    "default: all that the model has.",
)  # fmt: skip
STAGE = flags.DEFINE_integer("stage", None, "Number of a stage, from 1.")
TOKEN = flags.DEFINE_string("token", None, "X,Y of a pixel whose token attends; default: centre.")
CLASS = flags.DEFINE_string("class", None, "Name or number of Grad-CAM's class; default: the best.")
BOX = flags.DEFINE_integer("box", None, "Number of Grad-CAM's detected object, from 1, the best.")
COMPARE = flags.DEFINE_string("compare", None, "Other weights, for their receptive field.")
LIMIT = flags.DEFINE_integer("limit", 20, "The most pictures.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the activations.")
IMPLEMENTATION = flags.DEFINE_string("implementation", None, "xla, pallas or triton.")


def main() -> None:
    weights, source, output = WEIGHTS.value, INPUT.value, OUTPUT.value
    if weights is None or source is None or output is None:
        raise UserError("--weights, --input and --output are needed; see --help")
    token = _pixel(TOKEN.value)
    from vssd_jax.host import keep_compiled_programs, prepare_cpu
    from vssd_jax.inference.look import look

    prepare_cpu()
    keep_compiled_programs()
    look(
        weights,
        source,
        output,
        what=WHAT.value,
        stage=STAGE.value,
        token=token,
        label=CLASS.value,
        box=BOX.value,
        compare=COMPARE.value,
        limit=LIMIT.value,
        dtype=DTYPE.value,
        implementation=IMPLEMENTATION.value,
    )


def _pixel(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--token={text} must be X,Y, two whole numbers") from None
    return x, y


if __name__ == "__main__":
    cli.run(main, "__main__")
