"""Finds the model that a PyTorch state dict belongs to."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.models.family import Family, Recognised
from vssd_jax.models.torch_names import TensorShapes


def recognise(
    tensors: Mapping[str, np.ndarray], model: str | None, overrides: Mapping[str, Any]
) -> tuple[str, int, dict[str, Any]]:
    """The model that a state dict with PyTorch's names belongs to.

    Args:
      tensors: the state dict.
      model: its name if that is known.
      overrides: fields of the config that are known.

    Returns:
      The name, the size of the classifier, and `overrides` with the fields that the shapes show
      besides.

    Raises:
      UserError: no such model, or one that contradicts `model` or `overrides`.
    """
    shapes = TensorShapes(tensors)
    of_family, recognised = _find_family(shapes, overrides)
    seen = {field: recognised.fields[field] for field in of_family.variant_fields}
    alike = [
        of_family.prefix + variant
        for variant, make in of_family.variants.items()
        if _agree(family.architecture(make()), seen)
    ]
    found = (
        alike[0]
        if alike
        else f"a {of_family.prefix[:-1]} with "
        + " and ".join(f"{field} {value}" for field, value in seen.items())
    )
    if model is None and not alike:
        raise UserError(f"the tensors are those of {found}, which no known model has; name one")
    model = model or found
    known = family.architecture(family.make_config(model, **overrides))
    if family.find(model)[0] is not of_family or not _agree(known, seen):
        raise UserError(f"the tensors are those of {found}, not of {model}")

    _, recognised = _find_family(shapes, overrides, known)
    fields = recognised.fields
    check_equal({field: fields[field] for field in fields if field in overrides}, known, of_family)
    different = {field: value for field, value in fields.items() if value != known[field]}
    try:
        family.make_config(model, **(dict(overrides) | different))
    except UserError:
        # The tensors are damaged. Compared with the model without these fields, they will be named
        # in an error.
        different = {}
    return model, recognised.num_classes, dict(overrides) | different


def _find_family(
    shapes: TensorShapes, given: Collection[str], known: Mapping[str, Any] | None = None
) -> tuple[Family, Recognised]:
    for candidate in family.families():
        if (recognised := candidate.recognise(shapes, known, given)) is not None:
            return candidate, recognised
    some = ", ".join(list(shapes)[:3])
    raise UserError(f"these are no weights of a known model: the tensors are {some}, ...")


def _agree(config: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    return all(config[field] == value for field, value in fields.items())


def check_equal(
    fields: Mapping[str, Any], asked: Mapping[str, Any], of_family: Family
) -> None:
    """Raises a UserError unless the weights' fields are those asked for.

    Fields that affect training alone may differ.
    """
    for field, value in fields.items():
        if field not in of_family.training_fields and value != asked[field]:
            raise UserError(f"the weights contradict {field}={asked[field]!r}: theirs is {value!r}")
