"""The first two convolutions of a downsampling put together from other operations."""

from jax import Array

from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.linear import linear


def expand_depthwise(
    x: Array,
    w1: Array,
    b1: Array,
    kernel: Array,
    bias: Array,
    *,
    implementation: str | None = None,
) -> Array:
    """See `vssd_jax.kernels.expand_depthwise.api.expand_depthwise`.

    `implementation` is that of the parts.
    """
    return depthwise_conv(
        linear(x, w1, b1, implementation=implementation),
        kernel,
        bias,
        stride=2,
        activation="relu",
        relu_input=True,
        implementation=implementation,
    )
