"""3x3 depthwise convolution with bias, and what surrounds it in the network."""

import jax

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.depthwise_conv import xla


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    relu_input: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Convolves each channel with its own 3x3 kernel, padded by one pixel of zeros.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, C).
      bias: (C,).
      stride: 1 or 2; the output has ceil(H / stride) x ceil(W / stride) pixels.
      activation: None, "silu" or "relu", applied to convolution and bias.
      residual: whether `x` is added at the end; needs stride 1.
      relu_input: whether max(x, 0) is convolved; not beside a residual.
      implementation: of the gradient, "xla", "pallas", or None for the device's best: on a GPU a
        kernel, which has no derivative itself. The convolution is always XLA's.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), C) in the dtype of `x`, accumulated in float32 at
      least.

    Raises:
      ValueError: for an unknown activation or stride, or a residual with stride 2 or a ReLU.
      UserError: if a forced implementation cannot run here.
    """
    if stride not in (1, 2) or (residual and stride != 1):
        raise ValueError(f"stride {stride} is not 1, or 2 without a residual")
    if residual and relu_input:
        raise ValueError("a residual is added to no ReLU's result")
    if activation not in xla.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: None, 'silu' or 'relu'")

    def reason(here):
        # Imported late: Pallas takes a while, and a CPU has no use for it.
        from vssd_jax.kernels.depthwise_conv import pallas

        return here.lacks_triton() or pallas.supports(x)

    name = "the depthwise convolution's gradient"
    reasons = {"pallas": reason, "triton": lambda here: "there is no such kernel"}
    gradients = xla.gradients
    if dispatch.choose(name, implementation, reasons, automatic="pallas") == "pallas":
        from vssd_jax.kernels.depthwise_conv import pallas

        gradients = pallas.gradients
    return xla.depthwise_conv(x, kernel, bias, stride, activation, residual, relu_input, gradients)
