"""Where a detector's pictures go in training: to which size, which part, mirrored or not.

All of it is drawn before a picture is read, from its size alone, so that those that are padded to
one shape can make a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vssd_jax.data.sizes import fitted_sizes


class Geometry(NamedTuple):
    """What becomes of pictures, in this order. One picture's has no axis N.

    Attributes:
      original: (N, 2) height and width.
      first: (N, 2) what they are resized to.
      window: (N, 4) top, left, height and width of what is cut out of that.
      size: (N, 2) what that is resized to.
      flip: (N,) whether it is then mirrored, left to right.
    """

    original: np.ndarray
    first: np.ndarray
    window: np.ndarray
    size: np.ndarray
    flip: np.ndarray

    def row(self, index: int) -> "Geometry":
        """Of one of the pictures."""
        return Geometry(*(field[index] for field in self))


def draw_geometry(
    sizes: np.ndarray,
    rng: np.random.Generator,
    *,
    short_sides: Sequence[int] = (800,),
    long_side: int = 1333,
    crop: bool = False,
    flip: float = 0.5,
) -> Geometry:
    """The paper's 1x schedule takes the defaults, 3x `short_sides=range(480, 801, 32), crop=True`.

    Args:
      sizes: (N, 2) height and width.
      rng: the source of everything random.
      short_sides, long_side: one of the short sides is taken at random; the long side is bounded.
      crop: half of the time first resize to a short side of 400, 500 or 600 (the long side bounded
        as later) and cut out a random rectangle with sides of 384 to 600.
      flip: probability of a horizontal flip.
    """
    count = len(sizes)
    mirrored = rng.random(count) < flip
    first, window = sizes, np.concatenate([np.zeros_like(sizes), sizes], 1)
    if crop:
        cropped = (rng.random(count) < 0.5)[:, None]
        shrunk = fitted_sizes(sizes, rng.choice((400, 500, 600), count), long_side)
        sides = rng.integers(np.minimum(shrunk, 384), np.minimum(shrunk, 600) + 1)
        corners = rng.integers(0, shrunk - sides + 1)
        first = np.where(cropped, shrunk, sizes)
        window = np.where(cropped, np.concatenate([corners, sides], 1), window).astype(sizes.dtype)
    size = fitted_sizes(window[:, 2:], rng.choice(short_sides, count), long_side)
    return Geometry(sizes, first, window, size, mirrored)
