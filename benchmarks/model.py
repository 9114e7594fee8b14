"""Images a second of inference and of the training step of `train.py`, with the peak of memory.

    python -m benchmarks.model --model tiny --batch 128 --dtype bfloat16     # GPU
    python -m benchmarks.model --config mask_rcnn:tiny,1x --batch 2          # GPU
    python -m benchmarks.model                        # CPU: nano, 64 pixels, 4 images, float32

A training step is all that a run does with a batch on the device: augmentation, loss, gradients,
clipping, AdamW, moving average, guard. Inference is a classifier's logits, or what `eval.py`
computes with a detector or segmentor. The pictures are made up, see `benchmarks.real_step`.
"""

import statistics

import jax
from flax import nnx

from benchmarks import common, real_step, timing
from vssd_jax.host import compiler_options
from vssd_jax.models.vssd import VSSD, VSSDConfig


def inference(config):
    """The compiled program, and its arguments."""
    if config.task == "classification":
        architecture = getattr(VSSDConfig, config.model.removeprefix("vssd_"))()
        infer, weights = common.inference_step(
            VSSD(
                architecture,
                dtype=config.dtype,
                implementation=config.implementation,
                rngs=nnx.Rngs(0),
            )
        )
        images, _ = common.batch(config.eval_batch_size, config.image_size, dtype=config.dtype)
        return infer.lower(weights, images).compile(), (weights, images)
    predict, trainer, batch = real_step.prediction(config)
    arguments = trainer.fresh_state().ema, jax.device_put(batch)
    step = jax.jit(predict, compiler_options=compiler_options())
    return step.lower(*arguments).compile(), arguments


def call_of(task, config, depth):
    """A timed call of "inference" or "training", and the compiled program behind it."""
    if task == "inference":
        infer, arguments = inference(config)

        def call():
            for _ in range(depth):
                outputs = infer(*arguments)
            jax.block_until_ready(outputs)

        return call, infer

    trainer, batch = real_step.training(config)
    state, key = trainer.fresh_state(), jax.random.key(0)
    batch = next(trainer.device_batches(iter([batch])))
    train = trainer.program(state, batch)
    return common.pipelined(lambda state: train(state, batch, key)[0], state, depth=depth), train


def program_memory(compiled) -> int:
    """Bytes that the program needs for arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def configs(options):
    """Names, configs and batch sizes of what is to be measured."""
    fields = {"implementation": options.implementation, "remat": options.remat}
    for batch in options.batch:
        sizes = {"batch_size": batch, "eval_batch_size": batch}
        for name in options.config or []:
            yield name, real_step.config_of(name, **fields, **sizes), batch
        for model in () if options.config else options.model:
            for size in options.image_size:
                of_model = {"model": f"vssd_{model}", "image_size": size, "dtype": options.dtype}
                yield model, real_step.config_of("tiny", **of_model, **fields, **sizes), batch


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["tiny"])
    parser.add_argument("--config", nargs="+", help="of configs/, such as upernet:tiny, in place "
                        "of models; with its own model, image size and dtype")
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
    options.depth = options.depth or (10 if jax.default_backend() == "gpu" else 1)
    # Copy bandwidth: bytes decide, so that the share of it says how near the end is.
    from benchmarks.ops import bandwidth

    roofline = bandwidth(options)

    rows = []
    for name, config, batch in configs(options):
        for task in options.tasks:
            call, compiled = call_of(task, config, options.depth)
            times = timing.measure(
                {task: call}, rounds=options.rounds, seconds=options.seconds
            )[task]
            seconds = statistics.median(times) / options.depth
            cost = compiled.cost_analysis() or {}
            moved = cost.get("bytes accessed", float("nan"))
            common.add(rows, {
                "model": name,
                "image size": image_size(config),
                "batch": batch,
                "dtype": config.dtype,
                "task": task,
                "images/s": batch / seconds,
                "ms": 1e3 * seconds,
                "memory MB": program_memory(compiled) / 1e6,
                "MB accessed an image": moved / batch / 1e6,
                "share of copy bandwidth": moved / seconds / roofline,
            }, options)
    common.report(options, rows, copy_bytes_per_second=roofline)


def image_size(config) -> str:
    """Height and width of the pictures of a batch."""
    if config.task == "detection":
        return "x".join(map(str, config.padded_shapes[0]))
    return f"{config.image_size}x{config.image_size}"


if __name__ == "__main__":
    main()
