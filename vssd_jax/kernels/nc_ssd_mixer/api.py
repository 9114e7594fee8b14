"""The NC-SSD mixer after its input projection, up to the residual sum (VSSD, figure 3)."""

from typing import NamedTuple

from vssd_jax.kernels import add_branch, depthwise_conv, dispatch, linear, nc_ssd
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "nc_ssd_mixer",
    {
        "pallas": dispatch.Implementation(
            "vssd_jax.kernels.nc_ssd_mixer.pallas", dispatch.pallas_triton, backward=False
        ),
        "onednn": dispatch.by_onednn("vssd_jax.kernels.nc_ssd_mixer.onednn", backward=False),
        "xla": dispatch.plain("vssd_jax.kernels.nc_ssd_mixer.xla"),
    },
    parts=(
        depthwise_conv.OPERATION,
        nc_ssd.GATED_OPERATION,
        linear.OPERATION,
        add_branch.OPERATION,
    ),
)


class MixerParams(NamedTuple):
    """The parameters of `nc_ssd_mixer`."""

    conv_kernel: Float[Array, "3 3 width"]  # of the depthwise convolution of x|B|C
    conv_bias: Float[Array, " width"]
    d: Float[Array, " heads"]  # the skip weight of each head
    scale: Float[Array, " inner"]  # of the LayerNorm over all heads
    bias: Float[Array, " inner"]
    out_kernel: Float[Array, "inner C"]  # of the output projection


def nc_ssd_mixer(
    x: Float[Array, "B H W C"],
    xbc: Float[Array, "B H W width"],
    token_weights: Float[Array, "B H W heads"],
    z: Float[Array, "B H W inner"],
    branch_scale: Float[Array, " B"] | None,
    params: MixerParams,
    *,
    groups: int = 1,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "B H W C"]:
    """`x + branch_scale * (LayerNorm(nc_ssd(SiLU(conv(xbc)))) * z) out_kernel`.

    Args:
      x: (B, H, W, C), the residual.
      xbc: (B, H, W, inner + 2 * groups * N), the columns of x, B and C as projected.
      token_weights: (B, H, W, heads) float32.
      z: (B, H, W, inner), the gate; no activation.
      branch_scale: (B,) or None, see `vssd_jax.kernels.add_branch.api.add_branch`.
      params: see `MixerParams`.
      groups: of B and C.
      epsilon: of the LayerNorm.
      implementation: "xla", "pallas" (on an NVIDIA GPU, two kernels for inference in 16 bits;
        their gradient is that of "xla"), "onednn" (on a CPU with AMX, for inference), or see
        `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, H, W, C) in the dtype of `x`.

    Raises:
      UserError: see `choose`.
    """
    batched = {
        "x": x,
        "xbc": xbc,
        "token_weights": token_weights,
        "z": z,
        "branch_scale": branch_scale,
    }
    shared = {"params": params}
    return OPERATION.run(implementation, batched, shared, groups=groups, epsilon=epsilon)
