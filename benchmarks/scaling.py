"""Time and memory against the image size: the NC-SSD stages must grow linearly with the tokens.

The last stage's attention grows with the square; `--mixers ncssd` leaves it out.

    python -m benchmarks.scaling --model tiny --dtype bfloat16               # GPU
    python -m benchmarks.scaling                      # CPU: nano, 64 to 256 pixels, float32
"""

import dataclasses
import math
import statistics

import jax
from flax import nnx

from benchmarks import common, timing
from benchmarks.model import program_memory
from vssd_jax.models.vssd import VSSD, VSSDConfig


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 512, 768, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation")
    parser.add_argument("--mixers", nargs="+", default=["paper", "ncssd"],
                        choices=["paper", "ncssd", "attention"],
                        help="the paper's, or one mixer in all stages")
    options = common.parse(
        parser, model="nano", sizes=[64, 128, 256], dtype="float32", mixers=["ncssd"]
    )

    rows = []
    for mixers in options.mixers:
        config = getattr(VSSDConfig, options.model)()
        if mixers != "paper":
            config = dataclasses.replace(config, mixers=(mixers,) * 4)
        last = None
        for size in options.sizes:
            model = VSSD(
                config, dtype=options.dtype, implementation=options.implementation,
                rngs=nnx.Rngs(0),
            )  # fmt: skip
            step, weights = common.inference_step(model)
            images, _ = common.batch(options.batch, size, dtype=options.dtype)
            compiled = step.lower(weights, images).compile()

            def call(compiled=compiled, weights=weights, images=images):
                jax.block_until_ready(compiled(weights, images))

            times = timing.measure({"x": call}, rounds=options.rounds, seconds=options.seconds)
            tokens, seconds = (size / 4) ** 2, statistics.median(times["x"])
            growth = ""
            if last:
                growth = math.log(seconds / last[1]) / math.log(tokens / last[0])
            last = tokens, seconds
            common.add(rows, {
                "mixers": mixers,
                "image size": size,
                "tokens of stage 1": int(tokens),
                "ms": 1e3 * seconds,
                "memory MB": program_memory(compiled) / 1e6,
                "exponent of time": growth,  # 1: linear in the tokens since the row above
            }, options)
    common.report(options, rows)


if __name__ == "__main__":
    main()
