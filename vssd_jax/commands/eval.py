"""Evaluates weights: parameters, multiply-adds and the metrics of the config's task.

    python eval.py --config configs/tiny.py --weights weights/vssd_tiny [--throughput]
        [--tta] [--save-predictions DIR] [--report FILE]

`--weights` takes a weights folder, a .pth file, hf://owner/repo[@revision][/file], or the workdir
of a training run, of which it takes the averaged weights of the latest checkpoint. The last line of
the output is JSON.
"""

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

cli.define_config()
cli.define_processes()
WEIGHTS = flags.DEFINE_string("weights", None, "What to evaluate, see above.")
THROUGHPUT = flags.DEFINE_bool("throughput", False, "Measure the images per second as well.")
ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "Evaluate NaN and infinity too.")
TTA = flags.DEFINE_bool("tta", False, "Segmentation: average over scaled and mirrored images.")
SAVE = flags.DEFINE_string(
    "save_predictions", None, "Detection, segmentation: a folder for predictions and pictures."
)
REPORT = flags.DEFINE_string("report", None, "A file for a report: HTML with tables and pictures.")


def main() -> None:
    config = cli.load_config()
    cli.join_processes()
    if WEIGHTS.value is None:
        raise UserError("--weights is missing; see --help")
    from vssd_jax.host import keep_compiled_programs, prepare_cpu
    from vssd_jax.inference.evaluation import evaluate_weights

    prepare_cpu()
    keep_compiled_programs()
    evaluate_weights(
        config,
        WEIGHTS.value,
        allow_nonfinite=ALLOW_NONFINITE.value,
        throughput=THROUGHPUT.value,
        tta=TTA.value,
        save_predictions=SAVE.value,
        report=REPORT.value,
        commands=[("Evaluate", cli.command_line())],
    )


def run() -> None:
    """The command."""
    cli.run(main, __name__)
