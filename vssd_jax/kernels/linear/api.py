"""A linear layer."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "linear",
    {
        "onednn": dispatch.by_onednn("vssd_jax.kernels.linear.onednn"),
        "xla": dispatch.plain("vssd_jax.kernels.linear.xla"),
    },
)


def linear(
    x: Float[Array, "*batch C"],
    kernel: Float[Array, "C D"],
    bias: Float[Array, " D"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch D"]:
    """`x kernel + bias`.

    Args:
      x: (..., C).
      kernel: (C, D); rounded to the dtype of `x`.
      bias: (D,) or None.
      implementation: "xla", "onednn" (on a CPU with AMX), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (..., D) in the dtype of `x`; accumulated, and the bias added, in float32 at least.
    """
    return OPERATION.run(implementation, {"x": x}, {"kernel": kernel, "bias": bias})
