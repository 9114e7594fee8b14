"""A model as StableHLO in a file of its own, that runs with JAX alone.

The file is a zip of `config.json`, which says what the model is, takes and gives, and
`model.stablehlo`, the program with its weights as `jax.export` writes it. This reads and runs it,
without this package and without Flax:

    import json, zipfile
    import jax
    from jax import export

    with zipfile.ZipFile("vssd_tiny.zip") as file:
        config = json.loads(file.read("config.json"))
        model = jax.jit(export.deserialize(bytearray(file.read("model.stablehlo"))).call)
    logits = model(images)["logits"]

`jax.export` needs the package flatbuffers, here as there. docs/deploy.md has the whole story.
"""

import contextlib
import importlib.util
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from vssd_jax import __version__, strict_json
from vssd_jax.config import preprocessing_of
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.kernels.dispatch import automatic_gradients
from vssd_jax.known_classes import readable
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.tasks.pixels import normalized
from vssd_jax.weights.convert import assumed_names
from vssd_jax.weights.folder import Weights, new_file
from vssd_jax.weights.load import load
from vssd_jax.weights.narrow import cost, narrow, num_bytes

FORMAT, FORMAT_VERSION = "vssd_jax.stablehlo", 1
PARTS = ("model", "features")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST_SIDE = 16384


class Program(NamedTuple):
    """What is exported.

    Attributes:
      function: takes the arrays of `inputs` in their order, and gives a dict of arrays.
      inputs: name -> shape, with symbols for what is left open, and dtype.
      activations: their dtype.
    """

    function: Callable[..., dict[str, jax.Array]]
    inputs: dict[str, jax.ShapeDtypeStruct]
    activations: str


def make_program(
    weights: Weights,
    *,
    part: str = "model",
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    input_dtype: str = "float32",
) -> Program:
    """The function to export, with the weights as constants; see `export_stablehlo`.

    Every operation is its reference in plain JAX, whatever the device of this process: the file is
    for other devices too.
    """
    task = family.task_of(weights.model)
    fields = preprocessing_of(task, weights.preprocessing)
    # In float16 activations overflow; its weights are for fewer bytes alone.
    activations = "bfloat16" if dtype == "bfloat16" else "float32"
    detects = task == "detection" and part == "model"
    if size is None:
        size = default_size(task, part, fields)
    split = SplitModel(
        lambda rngs: family.build(
            weights.model,
            num_classes=weights.num_classes,
            dtype=activations,
            implementation="xla",
            rngs=rngs,
            **weights.overrides,
        )
    )
    params = narrow(weights.params, dtype)

    def function(images: jax.Array, *image_shapes: jax.Array) -> dict[str, jax.Array]:
        if input_dtype == "uint8":
            images = normalized(images, *image_shapes, mean=fields["mean"], std=fields["std"])
        with automatic_gradients():
            arrays = {name: jnp.asarray(x).astype(jnp.float32) for name, x in params.items()}
            model: Any = split.merge(arrays, training=False)
            if part == "features":
                backbone = getattr(model, "backbone", model)
                maps = backbone.feature_maps(images)
                return {f"stride{s}": x for s, x in zip(backbone.strides, maps, strict=True)}
            if task == "detection":
                return model.predict(images, *image_shapes)._asdict()
            return {"logits": model(images)[0] if task == "segmentation" else model(images)}

    if size is None:
        # From 4 pixels on: a stem of 4x4 patches has nothing to give for fewer.
        shape = export.symbolic_shape("b, h, w, 3", constraints=("h >= 4", "w >= 4"))
    else:
        shape = (*export.symbolic_shape("b"), *size, 3)
    inputs = {"images": jax.ShapeDtypeStruct(shape, jnp.dtype(input_dtype))}
    if detects:
        inputs["image_shapes"] = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32)
    return Program(function, inputs, activations)


def default_size(task: str, part: str, fields: dict[str, Any]) -> tuple[int, int] | None:
    """The (H, W) that a task needs to be given, of its preprocessing; None if any size will do.

    A detector's anchors and a segmentor's resampling are tables made for one size.
    """
    if part == "features" or task == "classification":
        return None
    if task == "detection":
        return fields["padded_shapes"][0]
    side = -(-fields["short_side"] // fields["size_multiple"]) * fields["size_multiple"]
    return side, side


def export_stablehlo(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    part: str = "model",
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    input_dtype: str = "float32",
    platforms: Sequence[str] = PLATFORMS,
) -> str:
    """Writes a model as StableHLO, whole or not at all.

    The batch is of any size. With `part="model"` the outputs are, of a classifier, `logits` (B, K);
    of a segmentor, `logits` (B, ceil(H/4), ceil(W/4), K), before any upsampling; of a detector,
    which also takes `image_shapes` (B, 2) int32, those of `vssd_jax.models.family.Detections`. With
    `part="features"` they are the feature maps `stride4` to `stride32`, as `feature_maps` gives
    them, of the backbone where the model has one.

    Args:
      source: anything that `vssd_jax.weights.load.load` reads.
      output: the file; it must not exist.
      part: "model" or "features".
      size: (H, W) of the images. None leaves them open, for classifiers and features; for others
        it is that of the preprocessing: a detector's first padded shape, the square of a
        segmentor's short side.
      dtype: of the weights, see `vssd_jax.weights.narrow`. Activations are bfloat16 with
        "bfloat16", otherwise float32.
      input_dtype: "float32" takes normalised images, "uint8" grey levels, which the program
        normalises.
      platforms: that the program can run on: "cpu", "cuda", "rocm", "tpu".

    Returns:
      Lines that say what was written, and what `dtype` costs.

    Raises:
      UserError: weights that cannot be read or have no head, arguments that cannot be used, an
        output that exists or cannot be written.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("exporting needs the package flatbuffers: pip install flatbuffers")
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}{did_you_mean(part, PARTS)}")
    platforms = list(dict.fromkeys(platforms))
    for name in platforms:
        if name not in _KNOWN_PLATFORMS:
            raise UserError(f"unknown platform {name!r}{did_you_mean(name, _KNOWN_PLATFORMS)}")
    if not platforms:
        raise UserError("there is no platform to export for")
    with new_file(output) as path:
        weights = load(source)
        if part == "model" and not weights.num_classes:
            raise UserError(f"{source} has no head; --part features exports its feature maps")
        program = make_program(weights, part=part, size=size, dtype=dtype, input_dtype=input_dtype)
        try:
            with _no_source_files():
                exported = export.export(jax.jit(program.function), platforms=platforms)(
                    *program.inputs.values()
                )
        except jax.errors.InconclusiveDimensionOperation as error:
            raise UserError(
                f"{weights.model} with these options cannot be exported for any size; give --size"
            ) from error
        config = describe(weights, program, exported, part=part, dtype=dtype)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("config.json", strict_json.dumps(config, indent=2) + "\n")
            file.writestr("model.stablehlo", exported.serialize())
        megabytes = path.stat().st_size / 1e6
    lines = [
        f"{weights.model}, {part}, for {', '.join(platforms)} -> {output} ({megabytes:,.1f} MB)",
        *(f"  takes {_line(entry)}" for entry in config["inputs"]),
        *(f"  gives {_line(entry)}" for entry in config["outputs"]),
    ]
    if dtype != "float32":
        narrowed = narrow(weights.params, dtype)
        measured = cost(
            weights, narrowed, activations=program.activations, features=part == "features"
        )
        lines.append(
            f"  weights {dtype} ({num_bytes(weights.params) / 1e6:,.1f} -> "
            f"{num_bytes(narrowed) / 1e6:,.1f} MB), activations {program.activations}: {measured}"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _no_source_files() -> Iterator[None]:
    """Keeps the paths of this computer's files out of the programs that are written in it."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _line(entry: dict[str, Any]) -> str:
    shape = ", ".join(map(str, entry["shape"]))
    return f"{entry['name']} ({shape}) {entry['dtype']}"


def describe(
    weights: Weights, program: Program, exported: export.Exported, *, part: str, dtype: str
) -> dict[str, Any]:
    """The content of `config.json`."""
    task = family.task_of(weights.model)
    names = weights.class_names or assumed_names(task, weights.num_classes)
    inputs = program.inputs
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": weights.model,
        "task": task,
        "part": part,
        "num_classes": weights.num_classes,
        "overrides": weights.overrides,
        "class_names": readable(names) if names else None,
        "preprocessing": preprocessing_of(task, weights.preprocessing),
        "dtypes": {"weights": dtype, "activations": program.activations},
        "inputs": [_array(name, x) for name, x in inputs.items()],
        "outputs": [_array(name, x) for name, x in outputs.items()],
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "versions": {"vssd_jax": __version__}
        | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "provenance": {
            key: weights.provenance[key]
            for key in ("source", "dataset", "metrics")
            if key in weights.provenance
        },
    }


def _array(name: str, array: Any) -> dict[str, Any]:
    """Of a shape: whole numbers, and text such as "b" or "floordiv(h - 1, 4) + 1"."""
    shape = [int(n) if isinstance(n, int | np.integer) else str(n) for n in array.shape]
    return {"name": name, "shape": shape, "dtype": jnp.dtype(array.dtype).name}


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of "HxW"; a UserError for another text."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = tuple(map(int, found.groups())) if found else ()
    if len(sides) != 2 or not all(1 <= side <= _LARGEST_SIDE for side in sides):
        raise UserError(
            f"--size={text} must be HEIGHTxWIDTH in pixels, from 1 to {_LARGEST_SIDE}, as 224x224"
        )
    return sides[0], sides[1]
