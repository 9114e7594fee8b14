"""The NC-SSD mixer after its input projection, put together from other operations."""

from jax import Array

from vssd_jax.kernels.add_branch import add_branch
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.nc_ssd import applies_silu_on_load, nc_ssd_gated
from vssd_jax.kernels.nc_ssd_mixer.api import MixerParams


def nc_ssd_mixer(
    x: Array,
    xbc: Array,
    token_weights: Array,
    z: Array,
    branch_scale: Array | None,
    params: MixerParams,
    *,
    groups: int,
    epsilon: float,
    implementation: str | None = None,
) -> Array:
    """See `vssd_jax.kernels.nc_ssd_mixer.api.nc_ssd_mixer`; `implementation` is the parts'."""
    y = before_projection(
        xbc,
        token_weights,
        z,
        params,
        groups=groups,
        epsilon=epsilon,
        implementation=implementation,
    )
    branch = linear(
        y.reshape(*x.shape[:-1], -1), params.out_kernel, implementation=implementation
    )
    return add_branch(x, branch, branch_scale, implementation=implementation)


def before_projection(
    xbc: Array,
    token_weights: Array,
    z: Array,
    params: MixerParams,
    *,
    groups: int,
    epsilon: float,
    implementation: str | None = None,
) -> Array:
    """(B, tokens, inner), what `nc_ssd_mixer` projects and adds."""
    inner = z.shape[-1]
    silu_on_load = applies_silu_on_load(
        xbc, token_weights, inner=inner, groups=groups, implementation=implementation
    )
    xbc = depthwise_conv(
        xbc,
        params.conv_kernel,
        params.conv_bias,
        activation=None if silu_on_load else "silu",
        implementation=implementation,
    )
    xbc, token_weights, z = (
        t.reshape(t.shape[0], -1, t.shape[-1]) for t in (xbc, token_weights, z)
    )
    return nc_ssd_gated(
        xbc,
        token_weights,
        params.d,
        z,
        params.scale,
        params.bias,
        inner=inner,
        groups=groups,
        epsilon=epsilon,
        silu=silu_on_load,
        implementation=implementation,
    )
