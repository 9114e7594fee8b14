"""Multi-head self-attention of the last stage."""

import functools

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.attention import xla


def attention(qkv: jax.Array, *, heads: int, implementation: str | None = None) -> jax.Array:
    """`softmax(q k^T / sqrt(P)) v` for each head, over all tokens.

    Args:
      qkv: (B, L, 3 * heads * P), the columns of q, k and v side by side, heads inside each.
      heads: number of heads.
      implementation: "xla", "pallas", or None for the device's best: on a GPU a kernel for few
        tokens, cuDNN's for many in 16 bits, else XLA.

    Returns:
      (B, L, heads * P) in the dtype of `qkv`; the softmax is in float32 at least.

    Raises:
      UserError: if a forced implementation cannot run here.
    """

    def reason(here):
        from vssd_jax.kernels.attention import pallas

        return here.lacks_triton() or pallas.supports(qkv, heads=heads)

    if implementation is None and _cudnn_is_best(qkv, heads):
        q, k, v = xla.split(qkv, heads)
        y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return y.reshape(*qkv.shape[:2], -1)
    reasons = {"pallas": reason, "triton": lambda here: "there is no such kernel"}
    chosen = dispatch.choose("attention", implementation, reasons, automatic="pallas")
    if chosen == "xla":
        return xla.attention(qkv, heads=heads)
    from vssd_jax.kernels.attention import pallas

    return dispatch.over_batch(functools.partial(pallas.attention, heads=heads), (qkv,), ())


def _cudnn_is_best(qkv, heads):
    _, length, width = qkv.shape
    return (
        dispatch.target().platform == "gpu"
        and length > 128
        and qkv.dtype in (jnp.bfloat16, jnp.float16)
        and (width // (3 * heads)) % 8 == 0
    )
