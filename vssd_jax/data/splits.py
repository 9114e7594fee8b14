"""Validation parts of datasets that have none."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def set_aside(
    names: Sequence[str | bytes], share: float, seed: int, groups: Iterable[Hashable] | None = None
) -> np.ndarray:
    """Which samples are for validation: the same ones, whatever the order and the machine.

    A sample's place is decided by a hash of its name, so that hardly any move when others join.

    Args:
      names: of the samples, each once.
      share: of the samples of each group, rounded; at least one sample, if it has two.
      seed: another one makes another choice.
      groups: of each sample, such as its class; None puts all into one.

    Returns:
      (samples,) bool.
    """
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups if groups is not None else [0] * len(names)):
        members.setdefault(group, []).append(number)
    chosen = np.zeros(len(names), bool)
    for numbers in members.values():
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        chosen[sorted(numbers, key=lambda number: _hash(names[number], seed))[:count]] = True
    return chosen


def say_set_aside(where: object, chosen: np.ndarray, share: float) -> None:
    """Says how many samples `set_aside` has chosen."""
    from vssd_jax.distributed import say  # it needs jax, and workers import what imports this

    say(
        f"{where} has no validation part: {chosen.sum()} of {len(chosen)} pictures are set aside "
        f"(config.validation_share={share})"
    )


def _hash(name: str | bytes, seed: int) -> bytes:
    data = name if isinstance(name, bytes) else name.encode(errors="surrogateescape")
    return hashlib.blake2b(data, key=str(seed).encode()).digest()
