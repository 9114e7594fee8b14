"""What a user waits for at first: import, a new model, the first calls, the first prediction.

    python -m benchmarks.first_call [--model vssd_tiny] [--size 224] [--only=import,fresh]
        [--json FILE]

Each figure is of a process of its own, `import` included where it is not said to be the import:
seconds of the wall clock and of the processor, and how many programs XLA compiled. On a machine
with other work the processor's seconds say more. The predictor runs twice, with an empty folder of
compiled programs and with the one that the first run left.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = ("import", "fresh", "weights", "eager", "jitted", "predictor cold", "predictor warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vssd_tiny")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure(options.step, options.model, options.size, Path(options.folder))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VSSD_JAX_CACHE": f"{folder}/cache"}
        for step in ("write", *options.only.split(",")):
            command = [sys.executable, "-m", "benchmarks.first_call", f"--step={step}",
                       f"--model={options.model}", f"--size={options.size}",
                       f"--folder={folder}"]  # fmt: skip
            lines = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()
            if step != "write":
                results[step] = json.loads(lines[-1])
                print(step, lines[-1], flush=True)
    from benchmarks.common import machine

    report = {
        "machine": machine(),
        "options": {"model": options.model, "size": options.size},
        "rows": results,
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text)


class Watch:
    """Seconds and compiled programs since the last look."""

    def __init__(self) -> None:
        self.compiled = self.hits = 0
        self.look()

    def listen(self) -> None:
        """To be called once jax is there."""
        import jax

        def duration(event: str, seconds: float, **_) -> None:
            # It comes for what is read from the folder of compiled programs, too.
            self.compiled += event == "/jax/core/compile/backend_compile_duration"

        def count(event: str, **_) -> None:
            self.hits += event == "/jax/compilation_cache/cache_hits"

        jax.monitoring.register_event_duration_secs_listener(duration)
        jax.monitoring.register_event_listener(count)

    def look(self) -> dict:
        now = time.perf_counter(), time.process_time(), self.compiled, self.hits
        before, self._last = getattr(self, "_last", now), now
        wall, processor, compiled, hits = (
            b - a for a, b in zip(before, now, strict=True)
        )
        return {
            "seconds": round(wall, 3),
            "processor_seconds": round(processor, 3),
            "compiled": compiled - hits,
            "read": hits,
        }


def measure(step: str, model: str, size: int, folder: Path) -> dict:
    """The figures of a step, by what is done in it."""
    watch = Watch()
    import jax
    import numpy as np

    import vssd_jax

    create_model = vssd_jax.create_model  # imports
    figures = {"import": watch.look()}
    watch.listen()
    if step == "import":
        return figures
    if step == "write":
        from PIL import Image

        from vssd_jax.weights.folder import Weights, write_folder
        from vssd_jax.weights.state import get_state

        state = get_state(create_model(model))
        names = [f"class {label}" for label in range(1000)]
        write_folder(folder / "weights", Weights(model, 1000, {}, state, names))
        pixels = np.random.default_rng(0).integers(0, 255, (375, 500, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "picture.png")
        return {}
    if step.startswith("predictor"):
        from vssd_jax.inference.predictor import load_predictor

        figures["import of the predictor"] = watch.look()
        predictor = load_predictor(folder / "weights")
        figures["load_predictor"] = watch.look()
        predictor(folder / "picture.png")
        figures["first call"] = watch.look()
        predictor(folder / "picture.png")
        figures["second call"] = watch.look()
        return figures
    weights = {"weights": folder / "weights"} if step == "weights" else {}
    made = create_model(model, **weights)
    figures["create_model"] = watch.look()
    if step in ("eager", "jitted"):
        from flax import nnx

        images = np.random.default_rng(0).standard_normal((1, size, size, 3), np.float32)
        call = nnx.jit(lambda model, images: model(images)) if step == "jitted" else type(made)
        run = call if step == "jitted" else call.__call__
        for name in ("first call", "second call"):
            jax.block_until_ready(run(made, images))
            figures[name] = watch.look()
    return figures


if __name__ == "__main__":
    main()
