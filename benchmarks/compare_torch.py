"""VSSD here against the plain PyTorch reference, in one run, in turns.

PyTorch runs in processes of its own, channels-last and with automatic mixed precision: in eager
mode, on a CPU also with this project's use of memory (glibc keeps what is freed), and under
torch.compile, which on a CPU needs a C++ compiler and minutes (`--torch eager` leaves it out).

    python -m benchmarks.compare_torch --batch 8 --dtype float32             # CPU
    python -m benchmarks.compare_torch --batch 128 --dtype bfloat16          # GPU
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import optax
from flax import nnx

from benchmarks import common
from vssd_jax.host import compiler_options
from vssd_jax.models.split import SplitModel
from vssd_jax.models.vssd import VSSD, VSSDConfig


def training_step(build):
    """A jitted `(state, images, labels, key) -> state`: gradients, clipping, AdamW.

    What PyTorch does beside it, and no more; `benchmarks.model` times the step of `train.py`. As
    there, the state is arrays by name: JAX takes the tree of a module apart in Python, which costs
    some 15 ms a step.

    Args:
      build: makes the model from an `nnx.Rngs`.

    Returns the step and its first state. The state is donated.
    """
    split = SplitModel(build)
    params, batch_stats = split.init(jax.random.key(0))
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(1e-4, weight_decay=0.05)
    )

    def step(state, images, labels, key):
        params, batch_stats, opt_state = state

        def loss_fn(params):
            model = split.merge({**params, **batch_stats}, training=True)
            logits = model(images, rngs=nnx.Rngs(dropout=key))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, split.batch_stats(model)

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    return step, (params, batch_stats, optimizer.init(params))


class Torch:
    """A process of `benchmarks.pytorch`, and its steps as functions that return when they are done.

    Its own process, as people run PyTorch: in this one it would use the memory as this project does
    (`vssd_jax.host.prepare_cpu`), which takes a tenth off its training steps on a CPU.
    """

    def __init__(self, options, device, mode):
        names = "model", "batch", "image_size", "dtype", "depth"
        arguments = {name: getattr(options, name) for name in names}
        command = json.dumps(arguments | {"device": device, "mode": mode})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pytorch", command],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = json.loads(self._line())

    def _line(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("PyTorch's process has ended; its output says why")
        return line.rstrip("\n")

    def run(self, task):
        """Runs a task; raises RuntimeError where PyTorch failed."""
        self._process.stdin.write(f"{task}\n")
        self._process.stdin.flush()
        if answer := self._line():
            raise RuntimeError(answer)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def jax_calls(options, images, labels):
    """The same for this project."""
    config = getattr(VSSDConfig, options.model)()

    def build(rngs):
        return VSSD(
            config, dtype=options.dtype, implementation=options.implementation, rngs=rngs
        )

    infer, weights = common.inference_step(build(nnx.Rngs(0)))
    train, state = training_step(build)
    images = images.astype(options.dtype)

    def inference():
        for _ in range(options.depth):
            logits = infer(weights, images)
        logits.block_until_ready()

    key = jax.random.key(0)
    step = common.pipelined(
        lambda state: train(state, images, labels, key), state, depth=options.depth
    )
    return {"inference": inference, "training": step}


def works(name, call) -> bool:
    """Runs a call once; False, and a line that says why, where torch.compile cannot."""
    try:
        call()
    except RuntimeError as error:
        if name != "torch compile":
            raise
        print(f"torch.compile does not work here: {error}")
        return False
    return True


def main():
    gpu = jax.default_backend() == "gpu"
    modes = ["eager", "compile"] if gpu else ["eager", "eager, memory kept", "compile"]
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny, small or base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", help="of our kernels; the default is the device's best")
    parser.add_argument("--tasks", nargs="+", default=["inference", "training"])
    parser.add_argument("--torch", nargs="+", choices=modes, default=modes, help="modes of PyTorch")
    parser.add_argument("--depth", type=int, default=None,
                        help="steps between two waits (default: 1, on a GPU 10)")
    options = parser.parse_args()
    options.depth = options.depth or (10 if gpu else 1)

    images, labels = common.batch(options.batch, options.image_size)
    ours = jax_calls(options, images, labels)
    with contextlib.ExitStack() as stack:
        theirs = {}
        for mode in options.torch:
            theirs[f"torch {mode}"] = process = Torch(options, "cuda" if gpu else "cpu", mode)
            stack.callback(process.close)
        rows = []
        for task in options.tasks:
            calls = {"vssd_jax": ours[task]} | {
                name: functools.partial(process.run, task) for name, process in theirs.items()
            }
            calls = {name: call for name, call in calls.items() if works(name, call)}
            times = common.measure(calls, rounds=options.rounds, seconds=options.seconds)
            for name, values in times.items():
                common.add(rows, {
                    "task": task,
                    "implementation": name,
                    "images/s": options.batch * options.depth / statistics.median(values),
                    "vssd_jax is faster by": common.median_ratio(values, times["vssd_jax"]),
                }, options)
        about = next(iter(theirs.values())).about
    common.report(options, rows, **about)


if __name__ == "__main__":
    main()
