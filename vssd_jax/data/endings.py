"""The endings of picture files, and a word on the files that have others."""

from collections.abc import Mapping

# Of the files that count as pictures; the format is read from the content.
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".jp2", ".avif",
)  # fmt: skip


def describe_endings(counts: Mapping[str, int]) -> str:
    """Numbers of files that are not read, by ending; "" stands for none."""
    parts = [f"{count} x {ending or 'no ending'}" for ending, count in sorted(counts.items())]
    return f"files that are not read, by their endings: {', '.join(parts)}" if parts else ""
