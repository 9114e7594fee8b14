"""The NC-SSD mixer after its input projection, put together from the other operations."""

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.nc_ssd import nc_ssd_gated
from vssd_jax.kernels.residual import add_branch


def nc_ssd_mixer(
    x, xbc, token_weights, z, branch_weights, conv_kernel, conv_bias, d, scale, bias, out_kernel,
    *, groups, epsilon, implementation,
):  # fmt: skip
    """See `vssd_jax.kernels.mixer.api.nc_ssd_mixer`; `implementation` is NC-SSD's."""
    other = dispatch.of_other_kernels(implementation)
    # NC-SSD's Pallas kernels apply SiLU while they read; elsewhere it goes with the convolution.
    late = dispatch.target().platform == "gpu" and implementation in (None, "pallas")
    activation = None if late else "silu"
    xbc = depthwise_conv(xbc, conv_kernel, conv_bias, activation=activation, implementation=other)
    xbc, token_weights, z = (t.reshape(len(t), -1, t.shape[-1]) for t in (xbc, token_weights, z))
    y = nc_ssd_gated(
        xbc,
        token_weights,
        d,
        z,
        scale,
        bias,
        inner=z.shape[-1],
        groups=groups,
        epsilon=epsilon,
        silu=late,
        implementation=implementation,
    )
    y = y.reshape(*x.shape[:-1], -1)
    return add_branch(x, linear(y, out_kernel), branch_weights)
