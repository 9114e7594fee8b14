"""3x3 depthwise convolution with bias, fused with the operations around it."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "depthwise_conv",
    {
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.depthwise_conv.pallas", dispatch.pallas_triton, forward=False
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.depthwise_conv.onednn"),
        "xla": dispatch.plain("vssd_jax.kernels.depthwise_conv.xla"),
    },
)


def depthwise_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C"],
    bias: Float[Array, " C"],
    *,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B out_H out_W C"]:
    """Convolves each channel with its own 3x3 kernel, padded by one pixel of zeros.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, C).
      bias: (C,).
      stride: 1 or 2; the output has ceil(H / stride) x ceil(W / stride) pixels.
      activation: None, "silu" or "relu", applied to convolution and bias.
      residual: whether `x` is added at the end; needs stride 1.
      relu_input: whether max(x, 0) is convolved; not with a residual.
      implementation: "xla", "onednn" (on a CPU with AMX), "pallas" (on an NVIDIA GPU; a kernel
        for the gradient, which cannot be differentiated again), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), C) in the dtype of `x`, accumulated in float32 at
      least.

    Raises:
      ValueError: for an unknown activation or stride, or a residual with stride 2 or a ReLU.
      UserError: see `choose`.
    """
    if stride not in (1, 2) or (residual and stride != 1):
        raise ValueError(f"stride {stride} is not 1, or 2 without a residual")
    if residual and relu_input:
        raise ValueError("residual and relu_input exclude each other")
    if activation not in (None, "silu", "relu"):
        raise ValueError(f"unknown activation {activation!r}: None, 'silu' or 'relu'")
    return OPERATION.run(
        implementation,
        {"x": x},
        {"kernel": kernel, "bias": bias},
        stride=stride,
        activation=activation,
        residual=residual,
        relu_input=relu_input,
    )
