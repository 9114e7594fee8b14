"""Shows in interpret mode what a GPU would do with an index that no mask covers."""

import types

import jax.numpy as jnp


def poisoned(plgpu):
    """`plgpu`, whose loads and stores give NaN wherever an index within the mask is too large.

    Interpret mode clamps such an index and so hides the mistake; a GPU reads, or overwrites,
    another array.
    """

    def beyond(view, mask):
        index = view.transforms[-1].indices
        outside = jnp.bool_(False)
        for position, size in zip(index, view.ref.shape, strict=True):
            outside = outside | (jnp.asarray(position) >= size) | (jnp.asarray(position) < 0)
        return outside if mask is None else outside & mask

    def load(view, *, mask=None, other=None):
        value = plgpu.load(view, mask=mask, other=other)
        return jnp.where(beyond(view, mask), jnp.nan, value).astype(value.dtype)

    def store(view, value, *, mask=None):
        value = jnp.where(beyond(view, mask).any(), jnp.nan, value).astype(value.dtype)
        plgpu.store(view, value, mask=mask)

    return types.SimpleNamespace(load=load, store=store, CompilerParams=plgpu.CompilerParams)
