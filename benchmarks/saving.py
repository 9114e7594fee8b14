"""What saving costs a run, and whether its memory stays flat: a long run of small steps.

    python -m benchmarks.saving [--steps 2000] [--every 50] [--json FILE]

Blocks of steps with one asynchronous save alternate with blocks without one, in one process. The
time of a block includes what goes on in the background while it lasts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.common import report
from configs.digits import get_config
from vssd_jax.tasks import make_task
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.clock import Clock
from vssd_jax.training.plan import make_plan
from vssd_jax.training.state import to_parts
from vssd_jax.training.step import Trainer


def resident_bytes() -> int:
    """Memory of this process, from the kernel (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps of a block")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags.FLAGS(["benchmark"])  # Grain reads absl flags

    with tempfile.TemporaryDirectory() as folder:
        config = get_config()
        config.update(batch_size=options.batch, data_dir=f"{folder}/data")
        task = make_task(config)
        trainer, clock = Trainer(task, config, make_plan(config, task.train_size)), Clock()
        state = trainer.fresh_state()
        batches = trainer.device_batches(task.train_batches(0))
        seconds, memory = {True: [], False: []}, []
        with Checkpoints(folder, best_metric="") as checkpoints:
            for block in range(-2, options.steps // options.every):  # two blocks to warm up
                saving = block % 2 == 1
                begin = time.perf_counter()
                if saving or block == -2:
                    checkpoints.save(int(state.step), to_parts(state), {})
                for _ in range(options.every):
                    state, metrics = trainer.step(state, next(batches), clock)
                jax.block_until_ready(metrics)
                if block >= 0:
                    seconds[saving].append(time.perf_counter() - begin)
                    memory.append(resident_bytes())
        quarter = len(memory) // 4
        with_save, without = (float(np.median(seconds[saving])) for saving in (True, False))
        row = {
            "steps": options.steps,
            "saves": len(seconds[True]),
            "ms/step without": 1e3 * without / options.every,
            "ms/step with": 1e3 * with_save / options.every,
            "lost %": 100 * (1 - without / with_save),
            "MB, second quarter": np.median(memory[quarter : 2 * quarter]) / 1e6,
            "MB, last quarter": np.median(memory[-quarter:]) / 1e6,
        }
        report(options, [row])


if __name__ == "__main__":
    main()
