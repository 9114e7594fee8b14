"""The causal and bidirectional state space duality scans that the paper compares NC-SSD with.

h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t^T,  y_t = C_t h_t + D x_t  (Mamba2, arXiv 2405.21060,
section 6), computed in chunks: within a chunk as masked attention, between chunks by a scan.
"""

import jax
import jax.numpy as jnp

from vssd_jax.types import Array, Float

CHUNK = 64


def causal_ssd(
    x: Float[Array, "B L inner"],
    dt: Float[Array, "B L heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "B L groups N"],
    c: Float[Array, "B L groups N"],
    d: Float[Array, " heads"],
) -> Float[Array, "B L inner"]:
    """The scan along L.

    Args:
      x: (B, L, heads * P).
      dt: (B, L, heads) float32 step sizes.
      a: (heads,) negative decay rates.
      b, c: (B, L, groups, N); head i takes group i // (heads / groups).
      d: (heads,) skip weights.

    Returns:
      (B, L, heads * P) in the dtype of `x`.
    """
    batch, length, inner = x.shape
    heads, groups = dt.shape[-1], b.shape[-2]
    acc = jnp.promote_types(x.dtype, jnp.float32)
    chunk = min(CHUNK, length)
    chunks = -(-length // chunk)

    def to_chunks(t: Float[Array, "B L *rest"]) -> Float[Array, "chunks B chunk *rest"]:
        # Padded tokens have dt = 0.
        t = jnp.pad(t, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (t.ndim - 2))
        return jnp.moveaxis(t.reshape(batch, chunks, chunk, *t.shape[2:]), 1, 0)

    xh = x.reshape(batch, length, groups, heads // groups, -1).astype(acc)
    dth = dt.reshape(batch, length, groups, heads // groups).astype(acc)
    decay = a.reshape(groups, heads // groups).astype(acc)
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def step(
        state: jax.Array, inputs: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        xc, dtc, bc, cc = inputs
        log_decay = jnp.cumsum(dtc * decay, axis=1)  # (B, chunk, g, h)
        xdt = xc * dtc[..., None]
        # Decay between two tokens; masked before exp, which would overflow above the diagonal.
        between = log_decay[:, :, None] - log_decay[:, None]
        between = jnp.exp(jnp.where(causal[None, :, :, None, None], between, -jnp.inf))
        scores = jnp.einsum("blgn,bmgn->blmg", cc, bc)[..., None] * between
        y = jnp.einsum("blmgh,bmghp->blghp", scores, xdt)
        y += jnp.einsum("blgn,bghnp->blghp", cc, state) * jnp.exp(log_decay)[..., None]
        to_end = jnp.exp(log_decay[:, -1:] - log_decay)
        state = state * jnp.exp(log_decay[:, -1])[..., None, None]
        state += jnp.einsum("blgn,blghp->bghnp", bc, xdt * to_end[..., None])
        return state, y

    state = jnp.zeros((batch, groups, heads // groups, b.shape[-1], inner // heads), acc)
    inputs = tuple(to_chunks(t) for t in (xh, dth, b.astype(acc), c.astype(acc)))
    _, y = jax.lax.scan(step, state, inputs)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * chunk, *xh.shape[2:])[:, :length]
    y = y + d.reshape(groups, heads // groups, 1).astype(acc) * xh
    return y.reshape(x.shape).astype(x.dtype)


def bidirectional_ssd(
    x: Float[Array, "B L inner"],
    dt: Float[Array, "B L heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "B L groups N"],
    c: Float[Array, "B L groups N"],
    d: Float[Array, " heads"],
) -> Float[Array, "B L inner"]:
    """Half of the heads and groups scan forward, the other half backward; see `causal_ssd`."""
    axes = ((x, 2), (dt, 2), (a, 0), (b, 2), (c, 2), (d, 0))
    halves = [jnp.split(t, 2, axis) for t, axis in axes]
    forward, backward = zip(*halves, strict=True)
    x, dt, a, b, c, d = backward
    x, dt, b, c = (jnp.flip(t, 1) for t in (x, dt, b, c))
    return jnp.concatenate(
        [causal_ssd(*forward), jnp.flip(causal_ssd(x, dt, a, b, c, d), 1)], axis=-1
    )
