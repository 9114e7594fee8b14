"""Small arguments for every operation."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels import (
    add_branch,
    attention,
    batch_norm,
    conv,
    depthwise_conv,
    expand_depthwise,
    gelu,
    layer_norm,
    linear,
    mlp,
    nc_ssd,
    nc_ssd_mixer,
    norm_linear,
    relu,
    roi_align,
    silu,
)
from vssd_jax.kernels.nc_ssd.specs import Spec

SPEC = Spec("small", 20, 2, 16, 16)
FUNCTIONS = {
    "add_branch": add_branch.add_branch,
    "attention": attention.attention,
    "batch_norm": batch_norm.batch_norm,
    "conv": conv.conv,
    "depthwise_conv": depthwise_conv.depthwise_conv,
    "expand_depthwise": expand_depthwise.expand_depthwise,
    "gelu": gelu.gelu,
    "layer_norm": layer_norm.layer_norm,
    "linear": linear.linear,
    "mlp": mlp.mlp,
    "nc_ssd": nc_ssd.nc_ssd,
    "nc_ssd_gated": nc_ssd.nc_ssd_gated,
    "nc_ssd_mixer": nc_ssd_mixer.nc_ssd_mixer,
    "norm_linear": norm_linear.norm_linear,
    "relu": relu.relu,
    "roi_align": roi_align.roi_align,
    "silu": silu.silu,
}


def arguments(operation, dtype=jnp.float32, batch=2):
    """Arrays and options of the operation, by name: activations (`batch`, ...) in `dtype`."""
    rng = np.random.default_rng(0)

    def narrow(*shape):
        return jnp.asarray(rng.standard_normal((batch, *shape)), dtype)

    def wide(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.promote_types(dtype, jnp.float32))

    def norm(channels):
        return {"scale": 1 + 0.1 * wide(channels), "bias": 0.1 * wide(channels)}

    spec = SPEC
    a = spec.arguments(batch, dtype)
    match operation:
        case "add_branch":
            scale = jnp.arange(batch, dtype=jnp.float32)
            return {"x": narrow(3, 5), "branch": narrow(3, 5), "branch_scale": scale}, {}
        case "attention":
            return {"qkv": narrow(17, 3 * 2 * 16)}, {"heads": 2}
        case "batch_norm":
            return {"x": narrow(3, 4, 5), **norm(5)}, {"epsilon": 1e-5, "dtype": dtype}
        case "conv":
            arrays = {"x": narrow(6, 5, 3), "kernel": wide(3, 3, 3, 4), "bias": wide(4)}
            return arrays, {"stride": 2, "padding": 1}
        case "depthwise_conv":
            arrays = {"x": narrow(5, 4, 6), "kernel": wide(3, 3, 6), "bias": wide(6)}
            options = {"stride": 1, "activation": "silu", "residual": False, "relu_input": False}
            return arrays, options
        case "expand_depthwise":
            taps = {"kernel": wide(3, 3, 24) / 3, "bias": 0.1 * wide(24)}
            return {"x": narrow(5, 4, 6), "w1": wide(6, 24), "b1": 0.1 * wide(24), **taps}, {}
        case "gelu" | "relu" | "silu":
            return {"x": narrow(3, 5)}, {}
        case "layer_norm":
            return {"x": narrow(5, 12), "gate": narrow(5, 12), **norm(12)}, {"epsilon": 1e-5}
        case "linear":
            return {"x": narrow(3, 5), "kernel": wide(5, 4), "bias": wide(4)}, {}
        case "mlp":
            branch = (wide(20, 80) / 20**0.5, wide(80), wide(80, 20) / 80**0.5, wide(20))
            params = mlp.MLPParams(*norm(20).values(), *branch)
            scale = 0.5 + jnp.arange(batch, dtype=jnp.float32)
            return {"x": narrow(3, 20), "branch_scale": scale, "params": params}, {"epsilon": 1e-5}
        case "norm_linear":
            options = {"widths": (33, 5), "dtypes": (dtype, jnp.float32), "epsilon": 1e-5}
            return {"x": narrow(7, 20), **norm(20), "kernel": wide(20, 38)}, options
        case "nc_ssd":
            arrays = {name: a[name] for name in ("xbc", "token_weights", "d")}
            return arrays, {"inner": spec.inner, "groups": 1}
        case "nc_ssd_gated":
            return a, {"inner": spec.inner, "groups": 1, "epsilon": 1e-5, "silu": True}
        case "nc_ssd_mixer":
            params = nc_ssd_mixer.MixerParams(
                conv_kernel=wide(3, 3, spec.width) / 3,
                conv_bias=wide(spec.width),
                d=a["d"],
                scale=a["scale"],
                bias=a["bias"],
                out_kernel=wide(spec.inner, 24) / spec.inner**0.5,
            )
            pictures = {
                name: a[name].reshape(batch, 5, 4, -1) for name in ("xbc", "token_weights", "z")
            }
            arrays = {"x": narrow(5, 4, 24), **pictures, "params": params}
            return arrays, {"branch_scale": None, "groups": 1, "epsilon": 1e-5}
        case "roi_align":
            boxes = [[-3, 1, 9, 17], [2.5, 3, 11, 8], [0, 0, 120, 90], [5, 5, 5, 4]]
            maps = narrow(9, 8, 6), narrow(5, 4, 6)
            boxes = jnp.tile(jnp.array(boxes, jnp.float32), (batch, 1, 1))
            return {"maps": maps, "boxes": boxes}, {"strides": (4, 8), "bins": 3}
    raise KeyError(operation)


def call(operation, implementation=None, dtype=jnp.float32, batch=2):
    """The operation as a function of a dictionary of arrays, and its arrays."""
    arrays, options = arguments(operation, dtype, batch)

    def f(arrays):
        return FUNCTIONS[operation](**arrays, **options, implementation=implementation)

    return f, arrays
