"""Images a second of inference and of a whole training step, with the peak of memory.

    python -m benchmarks.model --model tiny --batch 128 --dtype bfloat16     # GPU
    python -m benchmarks.model                        # CPU: nano, 64 pixels, 4 images, float32
"""

import statistics

import jax
from flax import nnx

from benchmarks import common
from vssd_jax.models.vssd import VSSD, VSSDConfig


def call_of(task, model, *, batch, image_size, dtype, implementation, depth, remat=False):
    """A timed call of "inference" or "training", and the compiled program behind it."""
    config = getattr(VSSDConfig, model)()
    images, labels = common.batch(batch, image_size, dtype=dtype)

    model = VSSD(
        config, dtype=dtype, implementation=implementation, remat=remat, rngs=nnx.Rngs(0)
    )
    if task == "inference":
        infer, weights = common.inference_step(model)
        infer = infer.lower(weights, images).compile()

        def inference():
            for _ in range(depth):
                logits = infer(weights, images)
            logits.block_until_ready()

        return inference, infer

    train, state = common.training_step(model)
    key = jax.random.key(0)
    train = train.lower(state, images, labels, key).compile()
    return common.pipelined(lambda s: train(s, images, labels, key), state, depth=depth), train


def program_memory(compiled) -> int:
    """Bytes that the program needs for arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["tiny"])
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--image-size", type=int, nargs="+", default=[224])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation")
    parser.add_argument("--tasks", nargs="+", default=["inference", "training"],
                        choices=["inference", "training"])
    parser.add_argument("--remat", action="store_true", help="recompute blocks in training")
    parser.add_argument("--depth", type=int, help="steps between two waits (1, on a GPU 10)")
    options = common.parse(
        parser, model=["nano"], batch=[4], image_size=[64], dtype="float32"
    )
    depth = options.depth or (10 if jax.default_backend() == "gpu" else 1)
    # Copy bandwidth: bytes decide, so that the share of it says how near the end is.
    from benchmarks.ops import bandwidth

    options.depth = depth
    roofline = bandwidth(options)

    rows = []
    for model in options.model:
        for image_size in options.image_size:
            for batch in options.batch:
                for task in options.tasks:
                    call, compiled = call_of(
                        task, model, batch=batch, image_size=image_size, dtype=options.dtype,
                        implementation=options.implementation, depth=depth, remat=options.remat,
                    )  # fmt: skip
                    times = common.measure(
                        {task: call}, rounds=options.rounds, seconds=options.seconds
                    )[task]
                    seconds = statistics.median(times) / depth
                    cost = compiled.cost_analysis() or {}
                    moved = cost.get("bytes accessed", float("nan"))
                    common.add(rows, {
                        "model": model,
                        "image size": image_size,
                        "batch": batch,
                        "task": task,
                        "images/s": batch / seconds,
                        "memory MB": program_memory(compiled) / 1e6,
                        "MB accessed an image": moved / batch / 1e6,
                        "share of copy bandwidth": moved / seconds / roofline,
                    })
    common.report(options, rows, copy_bytes_per_second=roofline)


if __name__ == "__main__":
    main()
