"""Weights from wherever they lie, as parameters by the names used here."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.weights import names, state
from vssd_jax.weights.folder import Weights, check_dtypes, read_arrays, read_folder
from vssd_jax.weights.torch_file import read_torch_file, select_state_dict

# Fields of a model's config that change its training alone.
_TRAINING = (
    "drop_path", "dropout", "aux_weight",
    "rpn_pre_nms_train", "rpn_samples", "rpn_positive_fraction",
    "roi_samples", "roi_positive_fraction", "roi_add_objects",
)  # fmt: skip


def load(
    source: str | os.PathLike,
    *,
    model: str | None = None,
    which: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    backbone: bool = False,
) -> Weights:
    """Reads weights and checks that each tensor has its place.

    Args:
      source: a weights folder; a `.pth` file; a `.safetensors` file, with PyTorch's names or the
        ones used here; `hf://owner/repo/file`, downloaded through huggingface_hub; or the workdir
        of a training run, whose averaged weights at the latest checkpoint are taken.
      model: the name that the weights must have; None recognises it from the tensors.
      which: "model" or "ema" of a `.pth` file; None is the EMA where it has one.
      overrides: fields of the model's config; needed for what shapes do not tell, such as
        the kind of scan.
      backbone: take a classifier's weights too, if it is the backbone of `model`.

    Raises:
      UserError: a file that cannot be read, another model's weights, and weights with missing,
        unexpected or misshapen tensors.
    """
    source = os.fspath(source)
    if model is not None:
        family.find(model)
    path = _download(source) if source.startswith("hf://") else Path(source)
    overrides = dict(overrides or {})
    try:
        if path.is_dir():
            weights = _read_workdir(path) if _is_workdir(path) else read_folder(path)
            if backbone and weights.model.startswith("vssd_"):
                model, overrides = _classifier(model, overrides)
            _check_agreement(weights, model, overrides)
            state.check(_shapes(weights), weights.params)
            check_dtypes(weights.params)
        else:
            if path.suffix == ".safetensors":
                tensors, provenance = _torch_names(read_arrays(path)), {}
            else:
                tensors, taken = select_state_dict(read_torch_file(path), which, path)
                provenance, which = {"state_dict": taken}, None
            if backbone and not any(name.startswith("backbone.") for name in tensors):
                model, overrides = _classifier(model, overrides)
            weights = _from_torch(tensors, model, overrides, provenance)
        if which is not None:
            raise UserError(f"there is no choice of {which!r}: only .pth files hold two models")
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{source}: {message}") from error
    return dataclasses.replace(
        weights, provenance={"source": source.rstrip("/").rpartition("/")[2]} | weights.provenance
    )


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict that PyTorch's model of the same name loads strictly."""
    tensors = names.to_torch(_table(weights.model), weights.params)
    counters = weights.provenance.get(names.COUNTER, 0)
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        if leaf == "running_var" and counters is not None:
            counter = f"{module}.{names.COUNTER}"
            count = counters.get(counter, 0) if isinstance(counters, dict) else counters
            tensors[counter] = np.array(count, np.int64)
    return tensors


def _is_workdir(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def _read_workdir(path: Path) -> Weights:
    from vssd_jax.training.checkpoints import read_ema

    config = json.loads((path / "config.json").read_text())
    params, step = read_ema(path)
    return Weights(
        model=config["model"],
        num_classes=config["num_classes"],
        overrides=config["model_options"],
        params=params,
        provenance={"state_dict": "ema", "step": step},
    )


def _download(uri: str) -> Path:
    owner, _, rest = uri.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UserError(f"{uri}: write hf://owner/repo/file")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file))
    except Exception as error:  # each of its transports raises errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{uri} cannot be downloaded: {type(error).__name__}: {reason}") from error


def _classifier(model: str, overrides: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and overrides of the classifier that `model` has as its backbone."""
    name = f"vssd_{family.find(model)[1]}"
    fields = family.architecture(family.make_config(name))
    return name, {field: value for field, value in overrides.items() if field in fields}


def _table(model: str):
    return names.TABLES[model.rpartition("_")[0] + "_"]


def _abstract(name, num_classes, overrides) -> nnx.Module:
    return family.abstract(
        lambda rngs: family.build(name, num_classes=num_classes, rngs=rngs, **overrides)
    )


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return state.shapes(_abstract(weights.model, weights.num_classes, weights.overrides))


def _check_agreement(weights: Weights, model: str | None, overrides: Mapping[str, Any]) -> None:
    """A folder knows its model: what the caller asks for must not contradict it."""
    family.find(weights.model)
    if model not in (None, weights.model):
        raise UserError(f"the weights are those of {weights.model}, not of {model}")
    here = family.architecture(family.make_config(weights.model, **weights.overrides))
    asked = family.architecture(
        family.make_config(weights.model, **(weights.overrides | dict(overrides)))
    )
    _check_equal(here, asked)


def _check_equal(here, asked) -> None:
    for field, value in here.items():
        if field not in _TRAINING and value != asked[field]:
            raise UserError(f"the weights contradict {field}={asked[field]!r}: theirs is {value!r}")


def _torch_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts for arrays that have either."""
    for table in names.TABLES.values():
        if all(names.known(table, name, here=True) for name in arrays):
            return names.to_torch(table, arrays)
    return arrays


def _from_torch(tensors, model, overrides, provenance) -> Weights:
    model, num_classes, overrides = recognise(tensors, model, overrides)
    table = _table(model)
    model_shapes = state.shapes(_abstract(model, num_classes, overrides))
    # Shapes in PyTorch's layout, from arrays without memory.
    zeros = {name: np.broadcast_to(np.int8(0), shape) for name, shape in model_shapes.items()}
    expected = {name: zero.shape for name, zero in names.to_torch(table, zeros).items()}
    counters = {
        name: tensors[name]
        for name in (f"{key.rpartition('.')[0]}.{names.COUNTER}" for key in expected)
        if name in tensors
    }
    others = {name: value for name, value in tensors.items() if name not in counters}
    state.check(expected, others)
    check_dtypes(others)
    params, _, _ = names.from_torch(table, tensors)
    return Weights(
        model, num_classes, overrides, params,
        provenance | {names.COUNTER: _counts(counters)},
    )  # fmt: skip


def _counts(counters: Mapping[str, np.ndarray]) -> int | dict[str, int] | None:
    for name, value in counters.items():
        if value.dtype != np.int64 or value.shape != ():
            raise UserError(f"{name} is {value.dtype} of shape {value.shape}, not one int64")
    values = {name: int(value) for name, value in counters.items()}
    if not values:
        return None
    return values if len(set(values.values())) > 1 else next(iter(values.values()))


def recognise(
    tensors: Mapping[str, np.ndarray], model: str | None, overrides: Mapping[str, Any]
) -> tuple[str, int, dict[str, Any]]:
    """The model that a state dict with PyTorch's names belongs to.

    Args:
      tensors: the state dict.
      model: its name if that is known.
      overrides: fields of the config that are known.

    Returns:
      The name, the size of the classifier, and `overrides` with what the shapes tell besides.

    Raises:
      UserError: no such model, or one that contradicts `model` or `overrides`.
    """

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= axis or tensors[name].shape[axis] == 0:
            raise UserError(f"these are no weights of a VSSD: there is no usable tensor {name}")
        return tensors[name].shape[axis]

    if any(name.startswith(("rpn_head.", "roi_head.")) for name in tensors):
        kind, prefix = "mask_rcnn_vssd_", "backbone."
        heads = {
            "fpn_channels": size("neck.lateral_convs.0.conv.weight"),
            "box_channels": size("roi_head.bbox_head.shared_fcs.0.weight"),
        }
        num_classes = size("roi_head.bbox_head.fc_cls.weight") - 1
    elif any(name.startswith("decode_head.") for name in tensors):
        kind, prefix = "upernet_vssd_", "backbone."
        heads = {
            "channels": size("decode_head.bottleneck.conv.weight"),
            "aux_channels": size("auxiliary_head.convs.0.conv.weight"),
        }
        num_classes = size("decode_head.conv_seg.weight")
    else:
        kind, prefix, heads = "vssd_", "", {}
        num_classes = size("head.weight")

    stem = "patch" if f"{prefix}patch_embed.norm.weight" in tensors else "conv"
    layer = [f"{prefix}layers.{stage}." for stage in range(4)]
    visible = {
        "embed_dim": size(f"{prefix}patch_embed.conv1.conv.weight") * (2 if stem == "conv" else 1),
        "depths": tuple(
            len({name.split(".")[layer[0].count(".") + 1] for name in tensors
                 if name.startswith(f"{start}blocks.")})
            for start in layer
        ),
        "stem": stem,
        "downsample": "conv" if f"{layer[0]}downsample.conv.1.conv.weight" in tensors else "patch",
        **heads,
    }  # fmt: skip

    same = [
        name
        for name in family.list_models()
        if name.startswith(kind)
        and all(
            family.architecture(family.make_config(name))[field] == visible[field]
            for field in ("embed_dim", "depths")
        )
    ]
    found = (
        same[0]
        if same
        else f"a {kind[:-1]} with {visible['embed_dim']} channels and "
        + (f"{visible['depths']} blocks")
    )
    if model is None and not same:
        raise UserError(f"the tensors are those of {found}, which no known model has; name one")
    model = model or found
    known = family.architecture(family.make_config(model, **overrides))
    if not model.startswith(kind) or any(
        known[field] != visible[field] for field in ("embed_dim", "depths")
    ):
        raise UserError(f"the tensors are those of {found}, not of {model}")

    mixers, num_heads = list(known["mixers"]), list(known["num_heads"])
    for stage, start in enumerate(layer):
        block = f"{start}blocks.0.attn."
        if f"{block}to_qkv.weight" in tensors:
            mixers[stage] = "attention"
            continue
        mixers[stage] = "ncssd" if mixers[stage] == "attention" else mixers[stage]
        num_heads[stage] = size(f"{block}A_log")
        inner = size(f"{block}norm.weight")
        visible["expand"] = inner // size(f"{block}in_proj.weight", 1)
        states = (size(f"{block}conv2d.weight") - inner) // 2  # groups times d_state
        if states != known["ngroups"] * known["d_state"]:
            field = "d_state" if "ngroups" in overrides else "ngroups"
            visible[field] = states // known["d_state" if field == "ngroups" else "ngroups"]
    visible |= {"mixers": tuple(mixers), "num_heads": tuple(num_heads)}
    _check_equal({field: value for field, value in visible.items() if field in overrides}, known)
    told = {field: value for field, value in visible.items() if value != known[field]}
    try:
        family.make_config(model, **(dict(overrides) | told))
    except UserError:  # damaged: compared with what is known, its tensors can be named
        told = {}
    return model, num_classes, dict(overrides) | told
