"""Times the steps of one implementation in a process of its own, for `compare_torch`.

    python -m benchmarks.steps '{"name": "torch eager", "model": "tiny", "batch": 8, ...}'

Prints one line of JSON: `{"times": {"inference": [seconds], ...}, ...}` or `{"error": "why"}`.
"""

import contextlib
import functools
import json
import sys
from types import SimpleNamespace

import numpy as np

from benchmarks import timing


def torch_calls(options):
    """Functions that run inference and training steps of the PyTorch reference, and wait."""
    import torch

    from torch_reference import vssd as reference
    from vssd_jax.host import keep_freed_memory

    if options.name == "torch eager, memory kept":
        keep_freed_memory()
    create = functools.partial(
        reference.create_model, f"vssd_{options.model}", num_classes=1000  # as VSSD has
    )
    device = "cuda" if options.gpu else "cpu"
    inference = create().to(device).eval()
    training = create().to(device)
    size = options.image_size
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((options.batch, 3, size, size), np.float32))
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(rng.integers(0, 1000, options.batch)).to(device)
    optimizer = torch.optim.AdamW(
        training.parameters(), lr=1e-4, weight_decay=0.05, fused=options.gpu
    )
    if options.name == "torch compile":
        inference, training = torch.compile(inference), torch.compile(training)
    dtype = getattr(torch, options.dtype)

    def mixed():
        return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def wait():
        if options.gpu:
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

    about = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    return {"inference": infer, "training": train}, about


def training_step(build):
    """A jitted `(state, images, labels, key) -> state`: gradients, clipping, AdamW.

    What PyTorch does beside it, and no more; `benchmarks.model` times the step of `train.py`. As
    there, the state is arrays by name: JAX takes the tree of a module apart in Python, which costs
    some 15 ms a step.

    Args:
      build: makes the model from an `nnx.Rngs`.

    Returns the step and its first state. The state is donated.
    """
    import jax
    import optax
    from flax import nnx

    from vssd_jax.host import compiler_options
    from vssd_jax.models.split import SplitModel
    from vssd_jax.training.optimizer import clip_by_global_norm

    split = SplitModel(build)
    params, batch_stats = split.init(jax.random.key(0))
    optimizer = optax.chain(clip_by_global_norm(5.0), optax.adamw(1e-4, weight_decay=0.05))

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


def jax_calls(options):
    """Those of this project, as `torch_calls`."""
    import jax
    from flax import nnx

    from benchmarks import common
    from vssd_jax.models.vssd import VSSD, VSSDConfig

    images, labels = common.batch(options.batch, options.image_size)
    images = images.astype(options.dtype)
    config = getattr(VSSDConfig, options.model)()

    def build(rngs):
        return VSSD(
            config, dtype=options.dtype, implementation=options.implementation, rngs=rngs
        )

    infer, weights = common.inference_step(build(nnx.Rngs(0)))
    train, state = training_step(build)

    def inference():
        for _ in range(options.depth):
            logits = infer(weights, images)
        logits.block_until_ready()

    key = jax.random.key(0)
    step = common.pipelined(
        lambda state: train(state, images, labels, key), state, depth=options.depth
    )
    return {"inference": inference, "training": step}, {}


def main():
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever is printed is no answer
    try:
        calls, about = (jax_calls if options.name == "vssd_jax" else torch_calls)(options)
        times = {}
        for task in options.tasks:
            chosen = {task: calls[task]}
            times |= timing.measure(chosen, rounds=options.rounds, seconds=options.seconds)
        result = {"times": times, **about}
    except Exception as error:
        if options.name == "vssd_jax":
            raise
        result = {"error": (str(error) or repr(error)).splitlines()[0]}
    print(json.dumps(result), file=answer)


if __name__ == "__main__":
    main()
