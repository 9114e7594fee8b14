"""The shapes of NC-SSD that tests and benchmarks share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes of a call: L = `length`, P = `head_dim`, N = `state`."""

    name: str
    length: int
    heads: int
    head_dim: int
    state: int
    groups: int = 1

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def width(self) -> int:
        """Columns of x|B|C."""
        return self.inner + 2 * self.groups * self.state

    def arguments(
        self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32, seed: int = 0
    ) -> dict[str, jax.Array]:
        """Random arguments of `nc_ssd_gated`, of the size that a trained network has."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        tokens, wide = (batch, self.length), jnp.promote_types(dtype, jnp.float32)
        return {
            "xbc": jnp.asarray(normal(*tokens, self.width), dtype),
            "token_weights": jnp.asarray(np.exp(normal(*tokens, self.heads) - 1), wide),
            "d": jnp.asarray(normal(self.heads), wide),
            "z": jnp.asarray(normal(*tokens, self.inner), dtype),
            "scale": jnp.asarray(1 + 0.1 * normal(self.inner), wide),
            "bias": jnp.asarray(0.1 * normal(self.inner), wide),
        }


def stages(name: str, embed_dim: int, heads: tuple[int, ...], state: int) -> list[Spec]:
    """The three NC-SSD stages of a variant at 224 pixels (inner width 2C)."""
    return [
        Spec(f"{name} stage {i + 1}", (56 >> i) ** 2, h, 2 * (embed_dim << i) // h, state)
        for i, h in enumerate(heads)
    ]


# small has tiny's stages.
NETWORK = [
    *stages("nano", 16, (1, 2, 4), 16),
    *stages("micro", 48, (2, 4, 8), 48),
    *stages("tiny", 64, (2, 4, 8), 64),
    *stages("base", 96, (3, 6, 12), 64),
]

# What the network at 224 pixels does not show: tails of every kind, groups, expansion 1.
EDGES = [
    Spec("odd length", 97 * 3 + 2, 2, 64, 64),
    Spec("one token", 1, 2, 16, 16),
    Spec("stage 4 of 7 x 7", 49, 4, 32, 48),
    Spec("two groups", 65, 4, 32, 24, groups=2),
    Spec("odd everything", 77, 3, 20, 5),
    Spec("wide state", 70, 2, 96, 128),
]
