"""Encoded pictures for the tests of the data modules."""

import io

import numpy as np
from PIL import Image


def jpeg(seed, height=30, width=40, quality=90):
    """A JPEG of smooth colours that differ from seed to seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
