"""The first two convolutions of a downsampling: to more channels, then depthwise with stride 2."""

from vssd_jax.kernels import depthwise_conv, dispatch, linear
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "expand_depthwise",
    {
        # Beyond the sizes that it takes, XLA loses little: nothing to announce.
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.expand_depthwise.pallas", dispatch.pallas_triton, announced=False
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.expand_depthwise.onednn"),
        "xla": dispatch.plain("vssd_jax.kernels.expand_depthwise.xla"),
    },
    parts=(linear.OPERATION, depthwise_conv.OPERATION),
)


def expand_depthwise(
    x: Float[Array, "B H W C"],
    w1: Float[Array, "C D"],
    b1: Float[Array, " D"],
    kernel: Float[Array, "3 3 D"],
    bias: Float[Array, " D"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B out_H out_W D"]:
    """`relu(depthwise(relu(x w1 + b1)) + bias)`, 3x3 with stride 2 and padded by a pixel of zeros.

    Args:
      x: (B, H, W, C).
      w1, b1: (C, D) and (D,), of the linear layer; D is a multiple of C.
      kernel, bias: (3, 3, D) and (D,), of the depthwise convolution.
      implementation: "xla", "pallas" (on an NVIDIA GPU in 16 bits, up to 256 channels; up to 128
        with a gradient of its own, which cannot be differentiated again, and beyond for inference
        alone), "onednn" (on a CPU with AMX), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, ceil(H / 2), ceil(W / 2), D) in the dtype of `x`; accumulated in float32 at least, and
      the result of the linear layer rounded to the dtype of `x`.

    Raises:
      UserError: see `choose`.
    """
    arrays = {"w1": w1, "b1": b1, "kernel": kernel, "bias": bias}
    return OPERATION.run(implementation, {"x": x}, arrays)
