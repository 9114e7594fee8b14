"""The sum at the end of a residual branch."""

from vssd_jax.kernels import dispatch
from vssd_jax.types import Array, Float

OPERATION = dispatch.Operation(
    "add_branch", {"xla": dispatch.plain("vssd_jax.kernels.add_branch.xla")}
)


def add_branch(
    x: Float[Array, "B ..."],
    branch: Float[Array, "B ..."],
    branch_scale: Float[Array, " B"] | None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B ..."]:
    """`x + branch_scale * branch`.

    Args:
      x, branch: (B, ...), of one dtype.
      branch_scale: (B,), from stochastic depth: 0 for a dropped branch, more than 1 for one that
        is kept. None stands for ones.
      implementation: "xla", or see `vssd_jax.kernels.dispatch.Operation.choose`.

    Returns:
      (B, ...) in the dtype of `x`.
    """
    batched = {"x": x, "branch": branch, "branch_scale": branch_scale}
    return OPERATION.run(implementation, batched)
