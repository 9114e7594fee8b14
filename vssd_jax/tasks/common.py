"""What the tasks share: the model and the batches of a config."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from vssd_jax.models import family


def build(config: ml_collections.ConfigDict, num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    """The fresh model that a config describes, in training mode."""
    return family.build(
        config.model,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        implementation=config.implementation,
        remat=config.remat,
        rngs=rngs,
        **config.model_options,
    )


def batches(
    make: Callable, config: ml_collections.ConfigDict, source, transform, **options
) -> Iterator[dict]:
    """This process's share of the batches of `pipeline.train_batches` or `eval_batches`."""
    return make(
        source,
        transform,
        num_workers=config.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **options,
    )
