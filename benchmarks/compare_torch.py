"""VSSD here against the plain PyTorch reference, in one run.

PyTorch runs channels-last and with automatic mixed precision, in eager mode and under
torch.compile, which on a CPU needs a C++ compiler and minutes (`--torch eager` leaves it out).

    python -m benchmarks.compare_torch --batch 8 --dtype float32             # CPU
    python -m benchmarks.compare_torch --batch 128 --dtype bfloat16          # GPU
"""

import contextlib
import functools
import statistics

import jax
import numpy as np
import optax
import torch
from flax import nnx

from benchmarks import common
from torch_reference import vssd as reference
from vssd_jax.host import compiler_options
from vssd_jax.models.vssd import VSSD, VSSDConfig


def training_step(model: nnx.Module):
    """A jitted `(state, images, labels, key) -> state`: gradients, clipping, AdamW.

    What PyTorch does beside it, and no more; `benchmarks.model` times the step of `train.py`.

    Returns the step and its first state. The state is donated.
    """
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(1e-4, weight_decay=0.05)
    )

    def step(state, images, labels, key):
        params, rest, opt_state = state

        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(images, rngs=nnx.Rngs(dropout=key))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    return step, (params, rest, optimizer.init(params))


def torch_calls(options, images, labels, device, compiled):
    """Functions that run one inference and one training step of the PyTorch reference."""
    create = functools.partial(
        reference.create_model, f"vssd_{options.model}", num_classes=1000  # as VSSD has
    )
    inference = create().to(device).eval()
    training = create().to(device)
    x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(np.array(labels)).to(device).long()
    optimizer = torch.optim.AdamW(
        training.parameters(), lr=1e-4, weight_decay=0.05, fused=device == "cuda"
    )
    if compiled:
        inference, training = torch.compile(inference), torch.compile(training)
    dtype = getattr(torch, options.dtype)

    def mixed():
        return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def infer():
        with torch.no_grad(), mixed():
            for _ in range(options.depth):
                inference(x)
        wait()

    def train():
        for _ in range(options.depth):
            optimizer.zero_grad(set_to_none=True)
            with mixed():
                loss = torch.nn.functional.cross_entropy(training(x).float(), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(training.parameters(), 5.0)
            optimizer.step()
        wait()

    return {"inference": infer, "training": train}


def jax_calls(options, images, labels):
    """The same for this project."""
    config = getattr(VSSDConfig, options.model)()

    def model():
        return VSSD(
            config,
            dtype=options.dtype,
            implementation=options.implementation,
            rngs=nnx.Rngs(0),
        )

    infer, weights = common.inference_step(model())
    train, state = training_step(model())
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
    except Exception as error:
        if name != "torch compile":
            raise
        print(f"torch.compile does not work here: {(str(error) or repr(error)).splitlines()[0]}")
        return False
    return True


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny, small or base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", help="of our kernels; the default is the device's best")
    parser.add_argument("--tasks", nargs="+", default=["inference", "training"])
    parser.add_argument("--torch", nargs="+", choices=["eager", "compile"],
                        default=["eager", "compile"], help="modes of PyTorch")
    parser.add_argument("--depth", type=int, default=None,
                        help="steps between two waits (default: 1, on a GPU 10)")
    options = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    device = "cuda" if gpu else "cpu"
    options.depth = options.depth or (10 if gpu else 1)

    images, labels = common.batch(options.batch, options.image_size)
    ours = jax_calls(options, images, labels)
    theirs = {
        f"torch {mode}": torch_calls(options, images, labels, device, mode == "compile")
        for mode in options.torch
    }
    rows = []
    for task in options.tasks:
        calls = {"vssd_jax": ours[task]} | {name: calls[task] for name, calls in theirs.items()}
        calls = {name: call for name, call in calls.items() if works(name, call)}
        times = common.measure(calls, rounds=options.rounds, seconds=options.seconds)
        for name, values in times.items():
            common.add(rows, {
                "task": task,
                "implementation": name,
                "images/s": options.batch * options.depth / statistics.median(values),
                "vssd_jax is faster by": common.median_ratio(values, times["vssd_jax"]),
            }, options)
    common.report(
        options, rows, torch=torch.__version__, torch_threads=torch.get_num_threads()
    )


if __name__ == "__main__":
    main()
