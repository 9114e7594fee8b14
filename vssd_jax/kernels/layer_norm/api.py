"""LayerNorm over the channels, with an optional gate."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "layer_norm",
    {
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.layer_norm.pallas", dispatch.pallas_triton, forward=False
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.layer_norm.onednn"),
        "cpu": dispatch.plain("vssd_jax.kernels.layer_norm.cpu", dispatch.cpu),
        "xla": dispatch.plain("vssd_jax.kernels.layer_norm.xla"),
    },
)


def layer_norm(
    x: Float[Array, "*batch C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    gate: Float[Array, "*batch C"] | None = None,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "*batch C"]:
    """Normalises the last axis in two passes, in float32 at least.

    Args:
      x: (..., C).
      scale, bias: (C,).
      gate: (..., C) or None; the result is multiplied by it.
      epsilon: added to the variance.
      implementation: "xla" (on a CPU with a gradient of its own), "pallas" (on an NVIDIA GPU; a
        kernel for the gradient, which cannot be differentiated again), "onednn" (on a CPU with
        AMX, for inference without a gate), or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (..., C) in the dtype of `x`.

    Raises:
      UserError: see `choose`.
    """
    shared = {"scale": scale, "bias": bias}
    return OPERATION.run(implementation, {"x": x, "gate": gate}, shared, epsilon=epsilon)
