"""Models as ONNX files, checked with onnxruntime before they are written.

Each file has its batch size free and its height and width fixed, takes float32 images in the
layout of this project, (B, H, W, 3), normalised, and names classes and preprocessing in its
metadata.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from vssd_jax import __version__
from vssd_jax.config import preprocessing_of
from vssd_jax.distributed import say
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.inference import onnx_operations
from vssd_jax.kernels import depthwise_conv, dispatch, layer_norm
from vssd_jax.models import family
from vssd_jax.models.mask_rcnn import BOX_BINS, MASK_BINS
from vssd_jax.models.split import Arrays, SplitModel
from vssd_jax.weights.convert import assumed_names
from vssd_jax.weights.folder import Weights
from vssd_jax.weights.load import load
from vssd_jax.weights.narrow import cost
from vssd_jax.weights.state import get_state, set_state

INSTALL = "pip install 'vssd_jax[onnx]'"
# The greatest difference from this project's outputs, over their greatest value. Measured at random
# weights: 1.4e-6 of vssd_tiny at 224x224, at most 1.6e-6 of the models in docs/deploy_onnx.md.
TOLERANCE = 1e-5
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# The models need nothing newer, and older runtimes do not read newer ones.
OPSET = 20
BATCHES = (1, 3)  # with which a file is checked


class Part(NamedTuple):
    """A part of a model that becomes a file.

    Attributes:
      call: the module and the input -> outputs.
      input: name and shape without the batch.
      outputs: their names.
      description: of input and outputs, for the metadata.
    """

    call: Callable[[Any, jax.Array], list[jax.Array]]
    input: tuple[str, tuple[int, ...]]
    outputs: list[str]
    description: str


def export_onnx(
    weights: str | os.PathLike,
    output: str | os.PathLike,
    *,
    part: str = "model",
    size: int | tuple[int, int] | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes a model, or a part of it, as an ONNX file of one piece; whole or not at all.

    Says what the file takes and gives, how well it agrees, and what narrower weights cost.

    The file's outputs are compared with this project's on a CPU, for one and for three inputs,
    before it is written: they differ by at most 1e-5 of the greatest output.

    Args:
      weights: anything that `vssd_jax.weights.load.load` reads.
      output: the file.
      part: "model", images to logits: (B, K) of a classifier, (B, ceil(H/4), ceil(W/4), K) of a
        segmentor. "features", images to feature maps: those of the backbone, or the pyramid of a
        detector with the outputs of its RPN. A detector has no "model": its proposals, RoIAlign and
        suppression stay outside, between "features" and the parts "box_head", (B, 7, 7, C) regions
        to logits and box deltas, and "mask_head", (B, 14, 14, C) to mask logits.
      size: height and width of the images; one number is both. None takes those of the weights'
        preprocessing: of a classifier its image size, of a detector the first padded shape, of a
        segmentor its shorter side squared.
      dtype: of the weights in the file, "float32", "float16" or "bfloat16". In 16 bits the file has
        half the size; matrices and kernels are rounded, everything is computed in float32.

    Returns:
      `output`.

    Raises:
      UserError: missing packages, unknown or impossible parts, an `output` that exists or cannot be
        written, and outputs that do not agree.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not supported{did_you_mean(dtype, DTYPES)}")
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; choose another file or remove it")
    _import()
    loaded = load(weights)
    task = family.task_of(loaded.model)
    fields = preprocessing_of(task, loaded.preprocessing)
    params = _rounded(loaded.params, DTYPES[dtype])
    split, arrays = _module(loaded, params)
    chosen = _part(split, loaded, task, part, _size(task, fields, size))

    def call(x: jax.Array) -> list[jax.Array]:
        return chosen.call(split.merge(arrays, training=False), x)

    name, shape = chosen.input
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((batch, *shape), np.float32) for batch in BATCHES]
    # Before the conversion: it replaces functions of JAX, which modules that are only then imported
    # would keep.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = [jax.device_get(jax.jit(call)(x)) for x in inputs]
        model = _convert(call, loaded.model, name, shape, chosen.outputs)
    if dtype != "float32":
        _narrow(model, DTYPES[dtype])
    names = loaded.class_names or assumed_names(task, loaded.num_classes)
    _describe(
        model,
        {
            "model": loaded.model,
            "task": task,
            "part": part,
            "input": chosen.description,
            "classes": None if names is None else list(names),
            "preprocessing": fields,
            "vssd_jax": __version__,
        },
    )
    content = model.SerializeToString()
    difference = _check(content, name, inputs, expected)
    _write(output, content)
    say(
        f"{loaded.model}, {part} -> {output} ({len(content) / 1e6:,.1f} MB); onnxruntime's outputs "
        f"differ by {difference:.1e} of the greatest"
    )
    say(f"  takes {name} (batch, {', '.join(map(str, shape))}) float32; {chosen.description}")
    if dtype != "float32":
        measured = cost(loaded, params, activations="float32", features=part != "model")
        say(f"  weights {dtype}: {measured}")
    return output


# --- Parts of the models ---------------------------------------------------------------------


def _size(
    task: str, fields: Mapping[str, Any], size: int | tuple[int, int] | None
) -> tuple[int, int]:
    if size is None:
        if task == "detection":
            return fields["padded_shapes"][0]
        size = fields["image_size" if task == "classification" else "short_side"]
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"size={size} must be at least 1")
    return height, width


def _part(
    split: SplitModel, weights: Weights, task: str, part: str, size: tuple[int, int]
) -> Part:
    module: Any = split.abstract
    images = ("images", (*size, 3))
    names = {
        "classification": ["model", "features"],
        "segmentation": ["model", "features"],
        "detection": ["features", "box_head", "mask_head"],
    }[task]
    if part == "model" and task == "detection":
        raise UserError(
            f"{weights.model} cannot be one ONNX file: jax2onnx does not convert its proposals, "
            f"RoIAlign and suppression; export its parts: {', '.join(names)}"
        )
    if part not in names or (task == "detection" and not hasattr(module, "rpn_head")):
        raise UserError(f"{weights.model} has no part {part!r}{did_you_mean(part, names)}")
    about = "normalised RGB images, float32 (B, H, W, 3)"
    if part == "model":
        if not weights.num_classes:
            raise UserError(f"{weights.model} has no head in these weights: export part='features'")
        if task == "classification":
            return Part(lambda m, x: [m(x)], images, ["logits"], f"{about} to logits (B, classes)")
        about += " to logits (B, H/4, W/4, classes)"
        return Part(lambda m, x: [m(x)[0]], images, ["logits"], about)
    if part == "features":
        if task == "detection":
            strides = module.strides
            outputs = [f"{what}_{s}" for what in ("features", "rpn_logits", "rpn_deltas")
                       for s in strides]  # fmt: skip
            about += " to the pyramid's maps (B, H/s, W/s, C), the logits of the anchors of each"
            about += " level, before the sigmoid, and their deltas"
            return Part(_pyramid, images, outputs, about)
        strides = module.strides if task == "classification" else module.backbone.strides
        outputs = [f"features_{s}" for s in strides]
        return Part(_backbone, images, outputs, f"{about} to feature maps (B, H/s, W/s, C)")
    bins = BOX_BINS if part == "box_head" else MASK_BINS
    regions = ("regions", (bins, bins, module.config.fpn_channels))
    if part == "box_head":
        about = "RoIAlign of regions (B, 7, 7, C) to class logits, the background last, and deltas"
        return Part(lambda m, x: list(m.box_head(x)), regions, ["logits", "deltas"], about)
    about = "RoIAlign of boxes (B, 14, 14, C) to mask logits (B, 28, 28, classes)"
    return Part(lambda m, x: [m.mask_head(x)], regions, ["masks"], about)


def _backbone(module: Any, images: jax.Array) -> list[jax.Array]:
    return getattr(module, "backbone", module).feature_maps(images)


def _pyramid(module: Any, images: jax.Array) -> list[jax.Array]:
    maps = module.feature_maps(images)
    logits, deltas = zip(*(module.rpn_head(x) for x in maps), strict=True)
    return [*maps, *logits, *deltas]


def _module(weights: Weights, params: Mapping[str, np.ndarray]) -> tuple[SplitModel, Arrays]:
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return family.build(
            weights.model,
            num_classes=weights.num_classes,
            implementation="xla",
            rngs=rngs,
            **weights.overrides,
        )

    split = SplitModel(build)
    set_state(split.abstract, params)
    return split, {name: jnp.asarray(x) for name, x in get_state(split.abstract).items()}


# --- Weights in 16 bits ----------------------------------------------------------------------


def _rounded(params: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """float32 arrays; those of two and more dimensions have values of `dtype`."""
    if dtype == np.float32:
        return {name: np.asarray(x, np.float32) for name, x in params.items()}
    rounded = {}
    for name, x in params.items():
        with np.errstate(over="ignore"):
            narrow = x.astype(dtype if x.ndim > 1 else np.float32).astype(np.float32)
        if not np.isfinite(narrow).all() and np.isfinite(x).all():
            raise UserError(f"tensor {name} has values too great for {dtype.name}: take bfloat16")
        rounded[name] = narrow
    return rounded


def _narrow(model: Any, dtype: np.dtype) -> None:
    """Stores the initializers in `dtype` that lose nothing by it, each with a cast to float32."""
    import onnx

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        array = onnx.numpy_helper.to_array(tensor)
        narrow = array.astype(dtype)
        if not np.array_equal(narrow.astype(np.float32), array):
            continue
        wide, stored = tensor.name, f"{tensor.name}_{dtype.name}"
        tensor.CopyFrom(onnx.numpy_helper.from_array(narrow, stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [wide], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


# --- Conversion, check and file --------------------------------------------------------------


def _import() -> Any:
    """jax2onnx's function; a UserError if it, onnx or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are missing ({error}): {INSTALL}") from error
    return to_onnx


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps back what jax2onnx says of its own parts: missing packages of examples, old APIs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _onnx_operations() -> Iterator[None]:
    """Within it two operations have the form of `onnx_operations` as their only one."""
    operations = (depthwise_conv.OPERATION, layer_norm.OPERATION)
    tables = [operation.table for operation in operations]
    try:
        for operation in operations:
            operation.table = {"xla": dispatch.plain(onnx_operations.__name__)}
        yield
    finally:
        for operation, table in zip(operations, tables, strict=True):
            operation.table = table


def _convert(
    call: Callable[[jax.Array], list[jax.Array]],
    name: str,
    input_name: str,
    shape: tuple[int, ...],
    outputs: list[str],
) -> Any:
    """The ONNX model of `call`, with a batch of any size."""
    to_onnx = _import()
    try:
        with _onnx_operations(), _silence(), dispatch.portable():
            model = to_onnx(
                call,
                inputs=[("batch", *shape)],
                model_name=name,
                opset=OPSET,
                input_names=[input_name],
                output_names=outputs,
            )
    except Exception as error:  # of the converter, for what it does not know
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"jax2onnx cannot convert {name}: {reason}") from error
    finally:
        # Traces made while functions of JAX were replaced must not serve later calls.
        jax.clear_caches()
    for value in model.graph.output:  # where the converter lost track of the batch
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def _describe(model: Any, metadata: Mapping[str, Any]) -> None:
    """Writes the metadata: text as it is, the rest as JSON."""
    import onnx

    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
        if value is not None
    }
    onnx.helper.set_model_props(model, texts)
    model.producer_name, model.producer_version = "vssd_jax", __version__


def _check(
    content: bytes,
    name: str,
    inputs: list[np.ndarray],
    expected: list[list[np.ndarray]],
) -> float:
    """The greatest difference between onnxruntime's outputs and the expected ones.

    A UserError if onnxruntime does not read the model, or the outputs differ by too much.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: x}) for x in inputs]
    except Exception as error:  # its exceptions have no common base
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"onnxruntime refuses the converted model: {reason}") from error
    pairs = [
        pair
        for theirs, ours in zip(found, expected, strict=True)
        for pair in zip(theirs, ours, strict=True)
    ]
    for a, b in pairs:
        if not _difference(a, b) <= TOLERANCE:
            raise UserError(
                f"onnxruntime's outputs differ by {_difference(a, b):.1e} of the greatest "
                f"(allowed: {TOLERANCE:.0e}); nothing was written"
            )
    return max(_difference(a, b) for a, b in pairs)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The greatest difference over the greatest absolute value of `b`; nan if there are nans."""
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))


def _write(output: Path, content: bytes) -> None:
    beside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.link(beside, output)  # unlike a renaming it replaces no file
    except FileExistsError as error:
        raise UserError(f"{output} exists already; choose another file or remove it") from error
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
