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

from benchmarks import common
from vssd_jax.errors import UserError
from vssd_jax.host import compiler_options
from vssd_jax.kernels import dispatch
from vssd_jax.kernels.attention import attention
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.mlp import MLPParams, mlp
from vssd_jax.kernels.nc_ssd import nc_ssd, nc_ssd_gated, specs
from vssd_jax.kernels.nc_ssd_mixer import MixerParams, nc_ssd_mixer
from vssd_jax.kernels.norm_linear import norm_linear
from vssd_jax.models.vssd import VSSDConfig


def operations(model: str, batch: int, dtype):
    """Yields (operation, size, function that takes `implementation`, arguments)."""
    config = getattr(VSSDConfig, model)()
    for spec in (s for s in specs.NETWORK if s.name.startswith(model)):
        a = spec.arguments(batch, dtype)
        options = {"inner": spec.inner, "groups": spec.groups}
        bare = [a[name] for name in ("xbc", "token_weights", "d")]
        yield "nc_ssd", spec.name, functools.partial(nc_ssd, **options), bare
        gated = [*bare, a["z"], a["scale"], a["bias"]]
        gated_op = functools.partial(nc_ssd_gated, silu=True, **options)
        yield "nc_ssd_gated", spec.name, gated_op, gated
        side = int(spec.length**0.5)
        x = a["xbc"].reshape(batch, side, side, -1)
        kernel = jnp.ones((3, 3, spec.width), jnp.float32) / 9
        yield "depthwise_conv", spec.name, depthwise_conv, [x, kernel, jnp.zeros(spec.width)]
        yield "layer_norm", spec.name, layer_norm, [a["z"], a["scale"], a["bias"], a["z"]]

        # The other operations of a block in inference.
        channels = spec.inner // config.expand
        columns = spec.inner + spec.width

        def ones(*shape):
            return jnp.ones(shape, jnp.float32)

        def projection(*arguments, implementation, columns=columns):
            options = {"widths": (columns,), "dtypes": (dtype,)}
            return norm_linear(*arguments, **options, implementation=implementation)[0]

        def mixer(x, xbc, token_weights, z, *params, implementation):
            params = MixerParams(*params)
            return nc_ssd_mixer(
                x, xbc, token_weights, z, None, params, implementation=implementation
            )

        def branch(x, *params, implementation):
            return mlp(x, None, MLPParams(*params), implementation=implementation)

        residual = x[..., :channels]
        pictures = [
            t.reshape(batch, side, side, -1) for t in (a["xbc"], a["token_weights"], a["z"])
        ]
        norm, wide = [ones(channels), ones(channels)], 4 * channels
        yield "norm_linear", spec.name, projection, [
            residual, *norm, ones(channels, columns) / channels
        ]
        yield "nc_ssd_mixer", spec.name, mixer, [
            residual, *pictures, kernel, ones(spec.width), a["d"], a["scale"], a["bias"],
            ones(spec.inner, channels) / spec.inner,
        ]  # fmt: skip
        yield "mlp", spec.name, branch, [
            residual, *norm, ones(channels, wide) / channels, ones(wide),
            ones(wide, channels) / wide, ones(channels),
        ]  # fmt: skip
    width = 8 * config.embed_dim
    qkv = jax.random.normal(jax.random.key(0), (batch, 49, 3 * width), dtype)
    yield "attention", "stage 4", functools.partial(attention, heads=config.num_heads[3]), [qkv]


def implementations(name: str, direction: str) -> list[str]:
    """Those of the operation that this device can run, and that differ in this direction."""
    table, device = dispatch.operations()[name].table, dispatch.target()
    return [
        implementation
        for implementation, row in table.items()
        if row.runs_on(device) is None
        and (row.plain or (row.forward if direction == "forward" else row.backward))
    ]


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
    times = common.measure({"copy": call}, rounds=options.rounds, seconds=options.seconds)
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
    for name, f, arguments in operations(options.model, options.batch, jnp.dtype(options.dtype)):
        result = jax.eval_shape(functools.partial(f, implementation="xla"), *arguments)
        dy = jnp.ones(result.shape, result.dtype)
        for direction in options.directions:
            calls = {}
            for implementation in IMPLEMENTATIONS:
                g = functools.partial(f, implementation=implementation)
                if direction == "forward":
                    call = repeated(jit(g), arguments, options.depth)
                else:
                    def gradient(dy, *arguments, g=g):
                        return jax.vjp(g, *arguments)[1](dy)

                    call = repeated(jit(gradient), [dy, *arguments], options.depth)
                try:
                    call()
                except UserError:  # not on this device, or not for this operation
                    continue
                calls[implementation] = call
            moved = size(arguments) + size(result)
            if direction == "gradient":
                moved += size(arguments)
            times = common.measure(calls, rounds=options.rounds, seconds=options.seconds)
            for implementation, values in times.items():
                seconds = statistics.median(values) / options.depth
                common.add(rows, {
                    "operation": name,
                    "direction": direction,
                    "implementation": implementation,
                    "ms": 1e3 * seconds,
                    "times xla": common.median_ratio(times["xla"], values),
                    "share of copy bandwidth": moved / seconds / roofline,
                })
    common.report(options, rows, copy_bytes_per_second=roofline)


if __name__ == "__main__":
    main()
