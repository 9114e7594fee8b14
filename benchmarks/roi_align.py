"""RoIAlign here against that of torchvision and mmcv, whichever are installed, in one run.

Regions are as COCO's objects: sides by a log-normal distribution about 70 pixels, each on the level
of the pyramid that fits its size. All take as many samples as a region needs, half-pixel aligned.

    python -m benchmarks.roi_align                    # CPU or GPU; needs PyTorch for the others
    python -m benchmarks.roi_align --dtype bfloat16
"""

import importlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, timing
from vssd_jax.host import compiler_options
from vssd_jax.kernels.roi_align import roi_align
from vssd_jax.kernels.roi_align.sampling import region_levels

STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def boxes_like_coco(images: int, regions: int, height: int, width: int) -> np.ndarray:
    """(images, regions, 4) float32 within a picture of this size, the same in every run."""
    rng = np.random.default_rng(0)
    shape = images, regions
    side, ratio = 70 * np.exp(rng.normal(0, 1, shape)), np.exp(rng.normal(0, 0.5, shape))
    w, h = (side * ratio**0.5).clip(4, width), (side / ratio**0.5).clip(4, height)
    x, y = rng.uniform(0, 1, shape) * (width - w), rng.uniform(0, 1, shape) * (height - h)
    return np.stack([x, y, x + w, y + h], -1).astype(np.float32)


def pyramid(images: int, picture: tuple[int, int], regions: int, dtype):
    """Four maps of noise, and boxes."""
    rng = np.random.default_rng(0)
    sizes = [[-(-side // stride) for side in picture] for stride in STRIDES]
    maps = tuple(
        jnp.asarray(rng.standard_normal((images, *size, CHANNELS), np.float32), dtype)
        for size in sizes
    )
    return maps, jnp.asarray(boxes_like_coco(images, regions, *picture))


def torch_functions() -> dict:
    """By package: a function of a map (B, C, H, W), image and box (N, 5), bins, cells a pixel."""
    found = {}
    for name, module in {"torchvision": "torchvision.ops", "mmcv": "mmcv.ops"}.items():
        try:
            align = importlib.import_module(module).roi_align
        except (ImportError, RuntimeError) as error:  # one built for another PyTorch
            print(f"without {name}: {error}")
            continue
        if name == "torchvision":
            found[name] = lambda x, rows, bins, scale, f=align: f(x, rows, bins, scale, -1, True)
        else:
            found[name] = lambda x, rows, bins, scale, f=align: f(
                x, rows, bins, scale, 0, "avg", True
            )
    return found


def torch_calls(maps, boxes, bins: int) -> dict:
    """By package: a call that gives a tensor (B * R, C, bins, bins)."""
    functions = torch_functions()
    if not functions:
        return {}
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, maps[0].dtype.name)
    maps = [
        torch.from_numpy(np.array(x.transpose(0, 3, 1, 2), np.float32)).to(device, dtype)
        for x in maps
    ]
    level = torch.from_numpy(np.array(region_levels(boxes, len(STRIDES))).ravel()).to(device)
    image = np.repeat(np.arange(len(boxes), dtype=np.float32), boxes.shape[1])
    rows = np.concatenate([image[:, None], np.reshape(boxes, (-1, 4))], axis=1)
    rows = torch.from_numpy(rows).to(device, dtype if device == "cuda" else torch.float32)

    def call(align):
        result = torch.empty((len(rows), CHANNELS, bins, bins), dtype=dtype, device=device)
        for i, (x, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            of_level = torch.nonzero(level == i)[:, 0]
            if len(of_level):
                result[of_level] = align(x, rows[of_level], bins, 1 / stride)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return {name: lambda align=align: call(align) for name, align in functions.items()}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--picture", type=int, nargs=2, default=(800, 1344),
                        metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dtype", default="float32")
    options = common.parse(parser)
    dtype, rows = jnp.dtype(options.dtype), []
    for bins, regions in ((7, 1000), (14, 100)):
        maps, boxes = pyramid(options.images, tuple(options.picture), regions, dtype)

        def align(maps, boxes, bins=bins):
            return roi_align(maps, boxes, strides=STRIDES, bins=bins)

        compiled = jax.jit(align, compiler_options=compiler_options())
        others = torch_calls(maps, boxes, bins)
        calls = {
            "vssd_jax": lambda f=compiled, a=(maps, boxes): jax.block_until_ready(f(*a)), **others
        }
        ours = np.asarray(calls["vssd_jax"](), np.float32)
        times = timing.measure(calls, rounds=options.rounds, seconds=options.seconds)
        for name, values in times.items():
            result = ours
            if name != "vssd_jax":
                result = calls[name]().float().cpu().permute(0, 2, 3, 1).reshape(ours.shape).numpy()
            common.add(rows, {
                "regions": options.images * regions,
                "bins": bins,
                "implementation": name,
                "ms": 1e3 * statistics.median(values),
                "times as long as vssd_jax": timing.median_ratio(values, times["vssd_jax"]),
                "greatest difference": float(np.abs(result - ours).max()),
            }, options)
    common.report(options, rows)


if __name__ == "__main__":
    main()
