"""Fine-tuning: the weights that a new model starts from."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from flax import nnx

from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.known_classes import readable
from vssd_jax.models import family
from vssd_jax.models.family import Model
from vssd_jax.weights.load import load
from vssd_jax.weights.state import check, shapes


def pretrained_weights(
    source: str | os.PathLike,
    name: str,
    model: nnx.Module,
    overrides: Mapping[str, Any],
    *,
    class_names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """The part of given weights that a model starts from, by dotted name.

    A classifier of other classes stays fresh. So does, in a detector or segmentor that starts from
    a classifier, everything but the backbone. Both are printed.

    Args:
      source: see `vssd_jax.weights.load.load`.
      name: of the model.
      model: the model; only its shapes are used.
      overrides: the fields of its config.
      class_names: of its labels.

    Raises:
      UserError: weights that cannot be read or do not fit.
    """
    expected = shapes(model)
    loaded = load(source, model=name, overrides=overrides, backbone=True)
    if loaded.model != name:
        # A backbone has no place for the classifier's last norm and head.
        params = {
            f"backbone.{key}": value
            for key, value in loaded.params.items()
            if f"backbone.{key}" in expected
        }
        if not params:
            raise UserError(f"{source}: none of its tensors has a place in the backbone of {name}")
        fresh = [key for key in expected if key not in params]
        say(f"{source} is a classifier: all but the backbone starts fresh")
    elif loaded.num_classes != cast(Model, model).num_classes or (
        None not in (class_names, loaded.class_names)
        and readable(class_names or ()) != readable(loaded.class_names or ())
    ):
        classifier = family.find(name)[0].classifier
        fresh = [key for key in expected if key.startswith(classifier)]
        params = {key: value for key, value in loaded.params.items() if key not in fresh}
        has = "no head"
        if loaded.num_classes == cast(Model, model).num_classes:
            has = f"other classes ({', '.join((loaded.class_names or [])[:3])}, ...)"
        elif loaded.num_classes:
            has = f"{loaded.num_classes} classes"
        say(f"{source} has {has}: the classifier starts fresh")
    else:
        params, fresh = dict(loaded.params), []
    check(expected, params, fresh=fresh)
    return params
