"""Trains a model, or goes on with what lies in the workdir.

python train.py --config configs/digits.py [--workdir runs/digits] [--config.batch_size=64 ...]
"""

from absl import flags

from vssd_jax import cli

cli.define_config()
cli.define_processes()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config's name>.")


def main() -> None:
    config = cli.load_config()
    cli.join_processes()
    from vssd_jax.host import keep_compiled_programs, prepare_cpu
    from vssd_jax.tasks import make_task
    from vssd_jax.training.loop import train

    prepare_cpu()
    keep_compiled_programs()
    workdir = WORKDIR.value or f"runs/{cli.config_name()}"
    commands = [
        ("Train", cli.command_line()),
        (
            "Evaluate, with a report",
            cli.other_command("eval", "--weights", workdir, "--report", "report.html"),
        ),
        (
            "Predict",
            cli.other_command(
                "predict", "--weights", workdir, "--input", "PICTURES", "--output", "predictions",
                config=False,
            ),
        ),
    ]  # fmt: skip
    train(make_task(config), config, workdir, commands=commands)


def run() -> None:
    """The command."""
    cli.run(main, __name__)
