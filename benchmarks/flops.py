"""Flops of the compiled Mask R-CNN on a CPU beside its multiply-adds, and those of RoIAlign.

    python -m benchmarks.flops                        # a minute: it compiles, and runs nothing

XLA counts the body of a loop once, and of a conditional the branch of most flops. The loops over
regions are therefore counted by the window that each region takes, for regions as COCO's objects.
Loops whose length depends on the data (suppression, samples of a bin) stay counted once: their
bodies are comparisons, some thousandths of the whole. XLA sees no flops of a Pallas kernel: those
of RoIAlign on a GPU are by formula.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.roi_align import CHANNELS, STRIDES, boxes_like_coco
from vssd_jax.host import compiler_options
from vssd_jax.kernels.roi_align import xla
from vssd_jax.kernels.roi_align.sampling import bin_samples, on_levels
from vssd_jax.models.count import count_multiply_adds
from vssd_jax.models.family import abstract
from vssd_jax.models.mask_rcnn import BOX_BINS, MASK_BINS, MaskRCNN, MaskRCNNConfig

PICTURE = 800, 1344
SIZES = tuple(tuple(-(-side // stride) for side in PICTURE) for stride in STRIDES)


def compiled_flops(model: nnx.Module) -> float:
    """Of the program for one picture, every loop counted once."""
    model.eval()
    graph, arrays = nnx.split(model)

    def predict(arrays, images, shapes):
        return nnx.merge(graph, arrays).predict(images, shapes)

    images = jax.ShapeDtypeStruct((1, *PICTURE, 3), jnp.float32)
    shapes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    lowered = jax.jit(predict, compiler_options=compiler_options()).lower(arrays, images, shapes)
    return lowered.compile().cost_analysis()["flops"]


def window_flops(regions: int, bins: int) -> float:
    """Of the products of RoIAlign on a CPU: each region with a window of the canvas."""
    boxes = jnp.asarray(boxes_like_coco(1, regions, *PICTURE)[0])
    weights = xla.canvas_weights(SIZES, boxes, STRIDES, bins)
    canvas = [w.shape[-1] for w in weights]
    extents = np.maximum(*(np.asarray(xla.covered(w)[1]) for w in weights))
    sides = np.array(xla.window_sides(*canvas))
    sides = sides[np.searchsorted(sides, extents)]
    height, width = (np.minimum(sides, length) for length in canvas)
    return float(sum(2 * CHANNELS * bins * width * (height + bins)))


def kernel_flops(regions: int, bins: int) -> float:
    """Of the kernel on a GPU: means of rows, then products with the weights of the columns."""
    from vssd_jax.kernels.roi_align.pallas import CELLS, MAX_BINS

    level, corners = on_levels(jnp.asarray(boxes_like_coco(1, regions, *PICTURE)[0]), STRIDES)
    width = np.array(SIZES)[np.asarray(level), 1]
    _, samples = bin_samples(corners[:, 1], corners[:, 3], bins)
    size, across = bin_samples(corners[:, 0], corners[:, 2], bins)
    half = 0.5 * size / across
    first, last = (
        np.floor(np.clip(x, 0, width - 1)) for x in (corners[:, 0] + half, corners[:, 2] - half)
    )
    blocks = np.ceil((np.minimum(last + 1, width - 1) - first + 1) / CELLS)
    cell = 2 * 2 * np.asarray(samples) + 2 * MAX_BINS  # two rows a sample, and all bins of a row
    return float(sum(bins * blocks * CELLS * CHANNELS * cell))


def figures() -> dict[str, float]:
    """All counts, in flops; `ratio` is that of the compiled program to twice the multiply-adds."""
    config = MaskRCNNConfig.tiny()
    model = abstract(lambda rngs: MaskRCNN(config, num_classes=80, rngs=rngs))
    calls = (config.rpn_proposals, BOX_BINS), (config.max_detections, MASK_BINS)
    counts = {
        "twice the multiply-adds": 2.0 * count_multiply_adds(model, PICTURE),
        "compiled, loops once": compiled_flops(model),
        "RoIAlign on a CPU": sum(window_flops(*call) for call in calls),
        "RoIAlign on a GPU, by formula": sum(kernel_flops(*call) for call in calls),
    }
    whole = counts["compiled, loops once"] + counts["RoIAlign on a CPU"]
    return counts | {"ratio": whole / counts["twice the multiply-adds"]}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(json.dumps(figures(), indent=2))
