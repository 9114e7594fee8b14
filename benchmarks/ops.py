"""Each operation: implementation against implementation against the memory's roofline.

The roofline is the bandwidth of a copy measured in the same run; an operation's bytes are those
of its arguments and results, read or written once.

    python -m benchmarks.ops --model tiny --batch 128 --dtype bfloat16       # GPU
    python -m benchmarks.ops                          # CPU: nano, 2 images, float32
"""

import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks import common, timing
from benchmarks.roi_align import STRIDES, pyramid
from vssd_jax.host import compiler_options
from vssd_jax.kernels import dispatch
from vssd_jax.kernels.attention import attention
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.expand_depthwise import expand_depthwise
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.mlp import MLPParams, mlp
from vssd_jax.kernels.nc_ssd import nc_ssd, nc_ssd_gated, specs
from vssd_jax.kernels.nc_ssd_mixer import MixerParams, nc_ssd_mixer
from vssd_jax.kernels.norm_linear import norm_linear
from vssd_jax.kernels.roi_align import roi_align
from vssd_jax.models.vssd import VSSDConfig

FUNCTIONS = {
    f.__name__: f
    for f in (
        attention, depthwise_conv, expand_depthwise, layer_norm, mlp, nc_ssd, nc_ssd_gated,
        nc_ssd_mixer, norm_linear, roi_align,
    )
}  # fmt: skip


def operations(model: str, batch: int, dtype):
    """Yields (operation, size, arrays and options by name)."""
    config = getattr(VSSDConfig, model)()

    def ones(*shape):
        return jnp.ones(shape, jnp.float32)

    for spec in (s for s in specs.NETWORK if s.name.startswith(model)):
        a = spec.arguments(batch, dtype)
        side, norm = int(spec.length**0.5), {"scale": a["scale"], "bias": a["bias"]}
        pictures = {
            name: a[name].reshape(batch, side, side, -1) for name in ("xbc", "token_weights", "z")
        }
        kernel, bias = ones(3, 3, spec.width) / 9, jnp.zeros(spec.width)
        sizes = {"inner": spec.inner, "groups": spec.groups}
        bare = {name: a[name] for name in ("xbc", "token_weights", "d")}
        yield "nc_ssd", spec.name, bare, sizes
        yield "nc_ssd_gated", spec.name, a, sizes | {"silu": True}
        conv = {"x": pictures["xbc"], "kernel": kernel, "bias": bias}
        yield "depthwise_conv", spec.name, conv, {}
        yield "layer_norm", spec.name, {"x": a["z"], "gate": a["z"], **norm}, {}

        # The other operations of a block; most of these kernels are for inference.
        channels = spec.inner // config.expand
        x = pictures["xbc"][..., :channels]
        columns, wide = spec.inner + spec.width, 4 * channels
        norm = {"scale": ones(channels), "bias": ones(channels)}
        projection = {"x": x, **norm, "kernel": ones(channels, columns) / channels}
        yield "norm_linear", spec.name, projection, {"widths": (columns,), "dtypes": (dtype,)}
        params = MixerParams(
            kernel, bias, a["d"], a["scale"], a["bias"], ones(spec.inner, channels) / spec.inner
        )
        options = {"branch_scale": None, "groups": spec.groups}
        yield "nc_ssd_mixer", spec.name, {"x": x, **pictures, "params": params}, options
        params = MLPParams(
            **norm,
            w1=ones(channels, wide) / channels,
            b1=ones(wide),
            w2=ones(wide, channels) / wide,
            b2=ones(channels),
        )
        yield "mlp", spec.name, {"x": x, "params": params}, {"branch_scale": None}

        # At the end of the stage.
        wide = 8 * channels
        layers = {"w1": ones(channels, wide) / channels, "b1": ones(wide)}
        conv = {"kernel": ones(3, 3, wide) / 9, "bias": ones(wide)}
        yield "expand_depthwise", spec.name, {"x": x, **layers, **conv}, {}
    qkv = jax.random.normal(jax.random.key(0), (batch, 49, 3 * 8 * config.embed_dim), dtype)
    yield "attention", "stage 4", {"qkv": qkv}, {"heads": config.num_heads[3]}
    # Of a detector, whose pictures are larger and fewer.
    picture, regions = ((200, 336), 100) if model == "nano" else ((800, 1344), 1000)
    maps, boxes = pyramid(max(1, batch // 16), picture, regions, dtype)
    for bins, count in ((7, regions), (14, regions // 10)):
        arrays = {"maps": maps, "boxes": boxes[:, :count]}
        yield "roi_align", f"{count} of {bins}x{bins}", arrays, {"strides": STRIDES, "bins": bins}


def implementations(name: str, direction: str, arguments: dict) -> list[str]:
    """"xla", and the kernels that this device can run and that have something for `direction`."""
    operation, device = dispatch.operations()[name], dispatch.target()
    kernels = [
        implementation
        for implementation, row in operation.table.items()
        if not row.plain
        and row.runs_on(device) is None
        and (row.forward if direction == "forward" else row.backward)
        and operation.choose(implementation, **arguments) == implementation
    ]
    return ["xla", *kernels]


def size(arrays) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def jit(f):
    return jax.jit(f, compiler_options=compiler_options())


def repeated(f, arguments, depth):
    def call():
        for _ in range(depth):
            result = f(*arguments)
        jax.block_until_ready(result)

    return call


def bandwidth(options) -> float:
    """Bytes a second of `x + 1` on an array far larger than the caches."""
    x = jnp.zeros(2**28 if jax.default_backend() == "gpu" else 2**25, jnp.float32)
    call = repeated(jit(lambda x: x + 1), [x], options.depth)
    times = timing.measure({"copy": call}, rounds=options.rounds, seconds=options.seconds)
    return 2 * size(x) * options.depth / statistics.median(times["copy"])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny or base")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--directions", nargs="+", default=["forward", "gradient"])
    parser.add_argument("--depth", type=int, help="calls between two waits (1, on a GPU 20)")
    options = common.parse(parser, model="nano", batch=2, dtype="float32")
    options.depth = options.depth or (20 if jax.default_backend() == "gpu" else 1)
    roofline = bandwidth(options)
    print(f"copy: {roofline / 1e9:.0f} GB/s")

    rows = []
    sizes = operations(options.model, options.batch, jnp.dtype(options.dtype))
    for name, place, arrays, settings in sizes:
        f = functools.partial(FUNCTIONS[name], **settings)
        result = jax.eval_shape(functools.partial(f, implementation="xla"), **arrays)
        dy = jax.tree.map(lambda t: jnp.ones(t.shape, t.dtype), result)
        for direction in options.directions:
            calls = {}
            for implementation in implementations(name, direction, arrays | settings):
                def forward(arrays, f=f, implementation=implementation):
                    return f(**arrays, implementation=implementation)

                def gradient(arrays, dy, forward=forward):
                    return jax.vjp(forward, arrays)[1](dy)

                if direction == "forward":
                    call = repeated(jit(forward), [arrays], options.depth)
                else:
                    call = repeated(jit(gradient), [arrays, dy], options.depth)
                calls[implementation] = call
            moved = size(arrays) + size(result)
            if direction == "gradient":
                moved += size(arrays)
            times = timing.measure(calls, rounds=options.rounds, seconds=options.seconds)
            for implementation, values in times.items():
                seconds = statistics.median(values) / options.depth
                common.add(rows, {
                    "operation": f"{name} {place}",
                    "direction": direction,
                    "implementation": implementation,
                    "ms": 1e3 * seconds,
                    "times xla": timing.median_ratio(times["xla"], values),
                    "share of copy bandwidth": moved / seconds / roofline,
                }, options)
    common.report(options, rows, copy_bytes_per_second=roofline)


if __name__ == "__main__":
    main()
