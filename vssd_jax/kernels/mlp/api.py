"""The MLP branch of a block: LayerNorm, linear, GELU, linear, residual sum."""

from typing import NamedTuple

from vssd_jax.kernels import add_branch, dispatch, gelu, layer_norm, linear
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "mlp",
    {
        # Beyond the sizes that it takes, XLA loses little: nothing to announce.
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.mlp.pallas", dispatch.pallas_triton, announced=False
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.mlp.onednn", backward=False),
        "xla": dispatch.plain("vssd_jax.kernels.mlp.xla"),
    },
    parts=(layer_norm.OPERATION, linear.OPERATION, gelu.OPERATION, add_branch.OPERATION),
)


class MLPParams(NamedTuple):
    """Scale and bias of the LayerNorm; kernels and biases of the linear layers, D hidden units."""

    scale: Float[Array, " C"]
    bias: Float[Array, " C"]
    w1: Float[Array, "C D"]
    b1: Float[Array, " D"]
    w2: Float[Array, "D C"]
    b2: Float[Array, " C"]


def mlp(
    x: Float[Array, "B *tokens C"],
    branch_scale: Float[Array, " B"] | None,
    params: MLPParams,
    *,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "B *tokens C"]:
    """`x + branch_scale * (GELU(LayerNorm(x) w1 + b1) w2 + b2)`.

    Args:
      x: (B, ..., C).
      branch_scale: (B,) or None, see `vssd_jax.kernels.add_branch.api.add_branch`.
      params: see `MLPParams`.
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas" (on an NVIDIA GPU in 16 bits; with more than 256 channels for
        the gradient alone, which cannot be differentiated again), "onednn" (on a CPU with
        AMX, for inference), or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      As `x`, in its dtype; accumulated in float32 at least.

    Raises:
      UserError: see `choose`.
    """
    batched = {"x": x, "branch_scale": branch_scale}
    return OPERATION.run(implementation, batched, {"params": params}, epsilon=epsilon)
