"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) with label smoothing, on the device."""

import jax
import jax.numpy as jnp


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """(B,) labels to (B, num_classes) float32: 1 - smoothing, plus smoothing / num_classes each."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every picture with its partner in the reversed batch, as timm does in "batch" mode.

    One draw serves the whole batch: with `switch_prob` it is CutMix, otherwise mixup, and the
    share of the picture itself follows Beta(alpha, alpha). CutMix's rectangle keeps the picture's
    shape, is cut off at the border, and the share is corrected to the area that remains. An alpha
    of 0 switches its kind off; both at 0 leave the pictures as they are.

    Over a sharded batch, reversal is of the global batch (a transfer between devices).

    Args:
      key: a PRNG key.
      images: (B, H, W, C), floating point.
      labels: (B,) integers.

    Returns:
      The mixed images, in the dtype of `images`, and (B, num_classes) float32 targets, smoothed
      and mixed alike.
    """
    targets = soft_targets(labels, num_classes, smoothing)
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return images, targets
    if mixup_alpha <= 0:
        switch_prob = 1.0
    elif cutmix_alpha <= 0:
        switch_prob = 0.0
    key_switch, key_share, key_box = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(key_switch, switch_prob)
    alpha = jnp.where(use_cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    share = jax.random.beta(key_share, alpha, alpha, dtype=jnp.float32)

    height, width = images.shape[1:3]
    box = _cutmix_box(key_box, height, width, share)  # (H, W)
    # The weight of the picture itself, per pixel: 0 or 1 for CutMix, the share for mixup.
    weight = jnp.where(use_cutmix, 1 - box.astype(jnp.float32), share)[None, :, :, None]
    weight = weight.astype(images.dtype)
    share = jnp.where(use_cutmix, 1 - box.mean(dtype=jnp.float32), share)
    images = images * weight + images[::-1] * (1 - weight)
    return images, targets * share + targets[::-1] * (1 - share)


def _cutmix_box(key: jax.Array, height: int, width: int, share: jax.Array) -> jax.Array:
    """A (height, width) mask, true inside a rectangle of about 1 - share of the area."""
    ratio = jnp.sqrt(1 - share)
    keys = jax.random.split(key)

    def span(key: jax.Array, size: int) -> jax.Array:
        extent = (size * ratio).astype(jnp.int32)
        start = jax.random.randint(key, (), 0, size, dtype=jnp.int32) - extent // 2
        position = jnp.arange(size)
        return (position >= start) & (position < start + extent)

    return span(keys[0], height)[:, None] & span(keys[1], width)[None, :]
