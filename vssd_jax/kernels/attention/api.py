"""Multi-head self-attention of the last stage."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "attention",
    {
        "cudnn": dispatch.Implementation(
            "vssd_jax.kernels.attention.cudnn", dispatch.nvidia_gpu, partitioned=True
        ),
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.attention.pallas", dispatch.pallas_triton
        ),
        "xla": dispatch.plain("vssd_jax.kernels.attention.xla"),
    },
)
# Up to so many tokens a single program of the Pallas kernel holds all of them; cuDNN is for more.
FEW_TOKENS = 128


def attention(
    qkv: Float[Array, "B L width"], *, heads: int, implementation: str | None = None
) -> Float[Array, "B L inner"]:
    """`softmax(q k^T / sqrt(P)) v` for each head, over all tokens.

    Args:
      qkv: (B, L, 3 * heads * P), the columns of q, k and v side by side, heads inside each.
      heads: number of heads.
      implementation: "xla", "pallas" (on an NVIDIA GPU, for few tokens), "cudnn" (on an NVIDIA
        GPU, for many in 16 bits), or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, L, heads * P) in the dtype of `qkv`; the softmax is in float32 at least.

    Raises:
      UserError: see `choose`.
    """
    return OPERATION.run(implementation, {"qkv": qkv}, heads=heads)
