"""SiLU in plain JAX, as one division.

XLA's CPU compiler takes a product for cheap, and would compute it, with all that leads to it, once
in each of its consumers.
"""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def silu(x: Array) -> Array:
    """See `vssd_jax.kernels.silu.api.silu`."""
    return x / (1 + jnp.exp(-x))


silu.defjvp(lambda primals, tangents: jax.jvp(jax.nn.silu, primals, tangents))
