"""Sizes that pictures are scaled to."""


def fitted_size(
    size: tuple[int, int],
    short: int,
    long: int,
    *,
    limit: tuple[int, int] | None = None,
    multiple: int = 1,
) -> tuple[int, int]:
    """(H, W) scaled so that the short side is `short`, or the long one `long` if that is less.

    Args:
      size: (H, W) of the picture.
      short, long: in pixels.
      limit: a further (H, W) that must not be exceeded.
      multiple: each side is rounded to the nearest multiple of it.
    """
    scale = min(short / min(size), long / max(size))
    if limit is not None:
        scale = min(scale, limit[0] / size[0], limit[1] / size[1])
    height, width = (
        max(multiple, multiple * int(int(side * scale + 0.5) / multiple + 0.5)) for side in size
    )
    return height, width
