"""A whole prediction of Mask R-CNN beside its backbone, pyramid and heads alone, in one run.

    python -m benchmarks.detector_parts                         # CPU: two minutes
    python -m benchmarks.detector_parts --model nano --picture 128 160

What the whole takes longer is for anchors, suppression, RoIAlign and the choice of masks. The heads
alone get as many regions as in the whole. Weights are random: their scores leave more to suppress
than those of a trained detector.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common, timing
from vssd_jax.host import compiler_options
from vssd_jax.models import family
from vssd_jax.models.mask_rcnn import BOX_BINS, MASK_BINS


def programs(name: str, picture: tuple[int, int], dtype) -> dict:
    """Calls of the whole and of the parts, for one picture."""
    model = family.build(name, rngs=nnx.Rngs(0), dtype=dtype)
    model.eval()
    graph, arrays = nnx.split(model)
    config = model.config
    height, width = picture
    images = np.random.default_rng(0).standard_normal((1, height, width, 3), np.float32)
    shapes = jnp.array([[height, width]])

    def regions(count, bins):
        return jnp.ones((1, count, bins, bins, config.fpn_channels), dtype)

    def whole(arrays, images):
        return nnx.merge(graph, arrays).predict(images, shapes)

    def parts(arrays, images, boxes, masks):
        model = nnx.merge(graph, arrays)
        maps = model.feature_maps(images)
        return [model.rpn_head(x) for x in maps], model.box_head(boxes), model.mask_head(masks)

    options = {"compiler_options": compiler_options()}
    whole, parts = jax.jit(whole, **options), jax.jit(parts, **options)
    images = jnp.asarray(images)
    boxes = regions(config.rpn_proposals, BOX_BINS)
    masks = regions(config.max_detections, MASK_BINS)
    return {
        "whole": lambda: jax.block_until_ready(whole(arrays, images)),
        "parts": lambda: jax.block_until_ready(parts(arrays, images, boxes, masks)),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--picture", nargs=2, type=int, default=(800, 1344),
                        metavar=("HEIGHT", "WIDTH"))  # fmt: skip
    parser.add_argument("--dtype", default="float32")
    options = common.parse(parser)
    calls = programs(
        f"mask_rcnn_vssd_{options.model}", tuple(options.picture), jnp.dtype(options.dtype)
    )
    times = timing.measure(calls, rounds=options.rounds, seconds=options.seconds)
    ratio = timing.median_ratio(times["whole"], times["parts"])
    rows = []
    for name, seconds in times.items():
        row = {"program": name, "ms": 1000 * min(seconds)}
        row["times as long as the parts"] = ratio if name == "whole" else 1.0
        common.add(rows, row, options)
    common.report(options, rows)


if __name__ == "__main__":
    main()
