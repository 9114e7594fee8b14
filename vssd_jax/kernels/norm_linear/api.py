"""LayerNorm, and linear layers of its result."""

import jax

from vssd_jax.kernels import dispatch, layer_norm
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "norm_linear",
    {
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.norm_linear.pallas", dispatch.pallas_triton
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.norm_linear.onednn"),
        "xla": dispatch.plain("vssd_jax.kernels.norm_linear.xla"),
    },
    parts=(layer_norm.OPERATION,),
)


def norm_linear(
    x: Float[Array, "B *tokens C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    kernel: Float[Array, "C columns"],
    *,
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Float[Array, "B *tokens _"], ...]:
    """`LayerNorm(x) kernel`, in parts of `widths` columns.

    Parts instead of one array: a row of z|x|B|C|dt is not aligned for a GPU.

    Args:
      x: (B, ..., C).
      scale, bias: (C,), of the LayerNorm.
      kernel: (C, sum(widths)).
      widths: columns of each result.
      dtypes: of each result; the products are accumulated in float32 at least.
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas" (on an NVIDIA GPU, in 16 bits with few channels; its gradient
        cannot be differentiated again), "onednn" (on a CPU with AMX), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      For each width an array (B, ..., width).

    Raises:
      UserError: see `choose`.
    """
    return OPERATION.run(
        implementation,
        {"x": x},
        {"scale": scale, "bias": bias, "kernel": kernel},
        widths=tuple(widths),
        dtypes=tuple(dtypes),
        epsilon=epsilon,
    )
