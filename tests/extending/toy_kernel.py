"""A second implementation of an operation, in one file: NC-SSD by way of all pairs of tokens.

python train.py --config tests/extending/toy_kernel.py

`y = (C B^T) (m * x)`, quadratic in the number of tokens, as attention without its softmax.
"""

import jax
import jax.numpy as jnp

from vssd_jax.config import classification_config
from vssd_jax.kernels.dispatch import Implementation
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.nc_ssd import GATED_OPERATION


def supports(*, groups, **arguments):
    return None if groups == 1 else f"{groups} groups (it has one)"


def nc_ssd_gated(*, xbc, token_weights, d, z, scale, bias, inner, groups, epsilon, silu):
    print("NC-SSD by all pairs of tokens")  # at each compilation
    xbc = jax.nn.silu(xbc) if silu else xbc
    head_dim = inner // token_weights.shape[-1]
    x, b, c = jnp.split(xbc, (inner, (inner + xbc.shape[-1]) // 2), axis=-1)
    weighted = (x * jnp.repeat(token_weights, head_dim, axis=-1)).astype(x.dtype)
    y = jnp.einsum("bln,bmn->blm", c, b) @ weighted
    y = (y + jnp.repeat(d, head_dim) * x).astype(x.dtype)
    return layer_norm(y, scale, bias, z, epsilon)


GATED_OPERATION.register("all_pairs", Implementation("tests.extending.toy_kernel"))


def get_config(arg=None):
    config = classification_config()
    config.update(
        model="vssd_nano", dataset="digits", image_size=32, batch_size=8, eval_batch_size=60,
        steps=3, log_every_steps=1, implementation=arg or "all_pairs",
    )  # fmt: skip
    config.model_options = {
        "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 4,
        "stem": "patch", "downsample": "patch",  # compile fast
    }  # fmt: skip
    return config
