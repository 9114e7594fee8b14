"""What a model sees of the pictures of a folder, drawn and written as files."""

import collections
import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vssd_jax.data.decode import UnreadableImage
from vssd_jax.data.heat_maps import Tile, draw_heat_maps
from vssd_jax.distributed import say
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.inference import pictures
from vssd_jax.inference.predict_files import find_pictures, output_stems
from vssd_jax.inference.predictor import Picture, Predictor, load_predictor, reason
from vssd_jax.tasks.pixels import normalized

KINDS = ("token_weights", "receptive_field", "grad_cam", "attention", "features")
_FIELD_DECADES = 4  # of a receptive field that are drawn
_SHARES = (0.2, 0.3, 0.5, 0.99)


class Seen(NamedTuple):
    """A picture as a model gets it.

    Attributes:
      pixels: (H, W, 3) uint8, scaled and cut as the weights say.
      images: (1, H', W', 3) float32, normalised, of a detector padded at the bottom and the right.
    """

    pixels: np.ndarray
    images: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """H and W, without padding."""
        return self.pixels.shape[0], self.pixels.shape[1]


def seen_by(predictor: Predictor, picture: Picture) -> Seen:
    """What the predictor gives its model; raises UnreadableImage or OSError as `prepare` does."""
    row, fields = predictor.prepare(picture), predictor.preprocessing
    image = row["image"]
    height, width = row.get("image_shape", image.shape[:2])
    shapes = jnp.array([(height, width)], jnp.int32)
    images = normalized(jnp.asarray(image[None]), shapes, mean=fields["mean"], std=fields["std"])
    return Seen(image[:height, :width], np.asarray(images))


def look(
    weights: str | os.PathLike,
    source: str,
    output: str | os.PathLike,
    *,
    what: Collection[str] = (),
    stage: int | None = None,
    token: tuple[int, int] | None = None,
    label: str | None = None,
    box: int | None = None,
    compare: str | os.PathLike | None = None,
    limit: int = 20,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> list[pathlib.Path]:
    """Writes drawings (PNG) and arrays (NPZ) of what a model sees; says a line of each.

    `receptive_field.png` and `.npz` are of all pictures together; the others lie in a folder for
    each picture.

    Args:
      weights: anything that `vssd_jax.weights.load.load` reads, with a head.
      source: a picture, a folder or a pattern, see `find_pictures`.
      output: the folder to write to; files of the same names are replaced.
      what: of `KINDS`; none stands for all that the model has.
      stage: number of the stage from 1; None takes all of them for token weights and features, the
        last for the receptive field and Grad-CAM, and the last that has it for attention.
      token: x and y of a pixel of the picture as the model sees it, of whose token the attention
        is; None takes the centre.
      label: the name or number of a class for Grad-CAM; None takes the best.
      box: the number of a detected object for Grad-CAM, from 1, the best.
      compare: other weights, whose receptive field is drawn beside.
      limit: the most pictures.
      dtype, implementation: see `load_predictor`.

    Returns:
      The files.

    Raises:
      UserError: an option that fits no stage, class, object or token of the model, a kind that it
        does not have, no readable picture, or an output that cannot be written.
    """
    kinds = _known(what)
    if limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    folder = pathlib.Path(output)
    base, names = find_pictures(source, folder)
    if not pathlib.Path(source).is_file() and folder.resolve() == base.resolve():
        raise UserError(f"{folder} is the folder of the pictures; give another one for the output")
    options: dict[str, Any] = {"dtype": dtype, "implementation": implementation}
    predictor = load_predictor(weights, **options)
    model = predictor.module()
    index = _stage(model, stage)
    target = _target(predictor, label, box)
    kinds = _available(model, kinds, index, names_given=bool(what))
    for option, value, kind in (
        ("token", token, "attention"),
        ("class", label, "grad_cam"),
        ("box", box, "grad_cam"),
        ("compare", compare, "receptive_field"),
    ):
        if value is not None and kind not in kinds:
            raise UserError(f"{option} is for {kind}, which is not among {', '.join(kinds)}")
    stems = output_stems(names)
    other = None
    if compare is not None:
        other = load_predictor(compare, **options)
        _stage(other.module(), stage)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if len(names) > limit:
        say(f"the first {limit} of {len(names)} pictures are looked at")
    seen = _read(predictor, base, names[:limit])
    if token is not None:
        _check_token(seen, token)
    written: list[pathlib.Path] = []
    nothing: list[str] = []
    with _writing(folder):
        for name, one in seen.items():
            found: dict[str, Drawing] = {}
            for kind, draw in _of_one(predictor, model, one, index, token, target).items():
                try:
                    found |= {kind: draw()} if kind in kinds else {}
                except pictures.NothingFound as error:
                    nothing.append(f"{kind} of {name}: {error}")
                    say(f"warning: {nothing[-1]}")
            written += _write(folder / stems[name], name, found)
        if len(nothing) == len(seen) and "grad_cam" in what:
            raise UserError(nothing[0])
        if "receptive_field" in kinds:
            fields = [(os.fspath(weights), model, list(seen.values()))]
            if other is not None and compare is not None:
                again = list(_read(other, base, list(seen)).values())
                fields.append((os.fspath(compare), other.module(), again))
            written += _write(folder, "all pictures", {"receptive_field": _fields(fields, stage)})
    say(f"{len(written)} files -> {folder}")
    return written


def _read(predictor: Predictor, base: pathlib.Path, names: Sequence[str]) -> dict[str, Seen]:
    """The pictures by name, without those that cannot be read, which are said."""
    seen: dict[str, Seen] = {}
    failed: list[str] = []
    for name in names:
        try:
            seen[name] = seen_by(predictor, base / name)
        except (UnreadableImage, OSError) as error:
            failed.append(reason(base / name, error))
    if not seen:
        raise UserError(failed[0])
    for text in failed:
        say(f"warning: {text}")
    return seen


# --- What is asked for ----------------------------------------------------------------------------


def _known(what: Collection[str]) -> tuple[str, ...]:
    for kind in what:
        if kind not in KINDS:
            raise UserError(f"unknown kind of picture {kind!r}{did_you_mean(kind, KINDS)}")
    return tuple(kind for kind in KINDS if kind in what) or KINDS


def _stage(model: nnx.Module, stage: int | None) -> int | None:
    """From 0; None stays."""
    count = len(pictures.backbone_of(model).widths)
    if stage is not None and not 1 <= stage <= count:
        raise UserError(f"stage={stage} must be from 1 to {count}")
    return None if stage is None else stage - 1


def _available(
    model: nnx.Module, kinds: Sequence[str], stage: int | None, *, names_given: bool
) -> tuple[str, ...]:
    """The kinds that the model has, at the stage if one was given."""
    mixers = pictures.mixers(model)
    chosen = mixers if stage is None else mixers[stage : stage + 1]
    where = "the model" if stage is None else f"stage {stage + 1}"
    lacks = {
        "token_weights": None if "token_weights" in chosen else f"{where} has no SSD mixer",
        "attention": None if "attention" in chosen else f"{where} has no attention",
    }
    for kind in kinds:
        if names_given and lacks.get(kind):
            raise UserError(f"{kind}: {lacks[kind]}")
    return tuple(kind for kind in kinds if not lacks.get(kind))


def _check_token(seen: dict[str, Seen], token: tuple[int, int]) -> None:
    for name, one in seen.items():
        height, width = one.size
        if not (0 <= token[0] < width and 0 <= token[1] < height):
            raise UserError(
                f"token {token[0]},{token[1]} is outside of {name}, of which the model sees "
                f"{width}x{height} pixels"
            )


def _target(predictor: Predictor, label: str | None, box: int | None) -> int | None:
    """The class or object of Grad-CAM, from 0."""
    if predictor.task == "detection":
        if label is not None:
            raise UserError("a detector's Grad-CAM is of an object: give its number by box")
        if box is not None and box < 1:
            raise UserError(f"box={box} must be at least 1, the best object")
        return None if box is None else box - 1
    if box is not None:
        raise UserError(f"box={box} is for detectors: the weights are for {predictor.task}")
    if label is None:
        return None
    names = predictor.class_names
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    if label.isdecimal():
        raise UserError(f"there is no class {label}: numbers go from 0 to {len(names) - 1}")
    raise UserError(f"there is no class {label!r}{_nearest(label, names)}")


def _nearest(label: str, names: Sequence[str]) -> str:
    hint = did_you_mean(label, names)
    return hint if len(names) <= 20 or "did you mean" in hint else f" among {len(names)}"


# --- Drawings -------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """Something that a model sees.

    Attributes:
      pictures: by the end of the file's name.
      arrays: by name.
      facts: a line.
    """

    pictures: dict[str, Image.Image]
    arrays: dict[str, np.ndarray]
    facts: str


def _of_one(
    predictor: Predictor,
    model: nnx.Module,
    seen: Seen,
    stage: int | None,
    token: tuple[int, int] | None,
    target: int | None,
) -> dict[str, Callable[[], Drawing]]:
    """What belongs to a single picture, by kind."""
    last = -1 if stage is None else stage
    return {
        "token_weights": lambda: draw_token_weights(model, seen, stage=stage),
        "grad_cam": lambda: draw_grad_cam(predictor, model, seen, target, stage=last),
        "attention": lambda: draw_attention(model, seen, token, stage=stage),
        "features": lambda: draw_features(model, seen, stage=stage),
    }


def draw_token_weights(model: nnx.Module, seen: Seen, *, stage: int | None = None) -> Drawing:
    """The token weights of the last block of each stage (or of one), a tile for each head.

    The arrays `stage1`, ... are (blocks, h, w, heads), of the tokens that are in the picture.
    """
    sheets: dict[str, Image.Image] = {}
    arrays: dict[str, np.ndarray] = {}
    facts: list[str] = []
    strides = pictures.backbone_of(model).strides
    for index, weights in enumerate(pictures.token_weights(model, seen.images)):
        if weights is None or stage not in (None, index):
            continue
        inside = _inside(weights[0], seen, strides[index])
        heads = np.moveaxis(inside[-1], -1, 0)
        tiles = [
            Tile(one, [f"stage {index + 1}, head {head}"], strides[index], over=True)
            for head, one in enumerate(heads, 1)
        ]
        sheets[f"stage{index + 1}"] = draw_heat_maps(seen.pixels, tiles)
        arrays[f"stage{index + 1}"] = inside
        half = float(np.mean([pictures.share_of_pixels(one, 0.5) for one in heads]))
        facts.append(
            f"stage {index + 1} {heads.min():.2g} to {heads.max():.2g}, "
            f"half of it in {_percent(half)} of the tokens"
        )
    return Drawing(sheets, arrays, f"token weights: {'; '.join(facts)}")


def draw_attention(
    model: nnx.Module, seen: Seen, token: tuple[int, int] | None, *, stage: int | None = None
) -> Drawing:
    """The attention of a stage's last block from a token, a tile for each head and their mean.

    The array `attention` is (blocks, h, w, heads), `token` its row and column.

    Args:
      model, seen: the model and what it sees.
      token: x and y of a pixel of the token; None is the centre.
      stage: None is the last one that has attention.
    """
    if stage is None:
        kinds = pictures.mixers(model)
        stage = max((i for i, kind in enumerate(kinds) if kind == "attention"), default=-1)
    height, width = seen.size
    x, y = token or (width // 2, height // 2)
    index = pictures.stage_index(model, stage)
    stride = pictures.backbone_of(model).strides[index]
    cell = y // stride, x // stride
    weights = pictures.attention(model, seen.images, cell, stage=index)[0]
    inside = _inside(weights, seen, stride)
    heads = np.moveaxis(inside[-1], -1, 0)
    mean = heads.mean(0)
    tiles = [Tile(mean, [f"stage {index + 1}, mean of {len(heads)} heads"], stride, over=True)]
    tiles += [Tile(one, [f"head {head}"], stride, over=True) for head, one in enumerate(heads, 1)]
    mark = (cell[1] * stride, cell[0] * stride,
            min((cell[1] + 1) * stride, width), min((cell[0] + 1) * stride, height))  # fmt: skip
    half = pictures.share_of_pixels(mean, 0.5)
    fact = (
        f"attention of stage {index + 1} from the token of pixel {x},{y}: half of the heads' mean "
        f"on {_percent(half)} of the tokens"
    )
    if inside.shape != weights.shape:
        fact += f", {_percent(max(1 - float(mean.sum()), 0))} of it on padding, which is not shown"
    return Drawing(
        {"": draw_heat_maps(seen.pixels, tiles, mark=mark)},
        {"attention": inside, "token": np.array(cell)},
        fact,
    )


def draw_grad_cam(
    predictor: Predictor, model: nnx.Module, seen: Seen, target: int | None, *, stage: int = -1
) -> Drawing:
    """Grad-CAM over the picture, of a class or object as in `pictures.grad_cam`.

    The array `grad_cam` is (h, w); `score` and `label` are numbers.
    """
    shapes = np.array([seen.size], np.int32)
    found = pictures.grad_cam(model, seen.images, target, stage=stage, image_shapes=shapes)
    index = pictures.stage_index(model, stage)
    stride = pictures.backbone_of(model).strides[index]
    inside = _inside(found.maps, seen, stride)[0]
    name, score = predictor.class_names[int(found.labels[0])], float(found.scores[0])
    mark = None
    if found.boxes is not None:
        what = f"object {(target or 0) + 1}, {name}, score"
        left, top, right, bottom = found.boxes[0].tolist()
        mark = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    else:
        mean = "mean " if predictor.task == "segmentation" else ""
        what = f"class {name}, {mean}logit"
    tile = Tile(inside, [f"stage {index + 1}, {what} {score:.3g}"], stride, over=True)
    fact = "0 everywhere"
    if inside.max() > 0:
        fact = f"half of it in {_percent(pictures.share_of_pixels(inside, 0.5))} of the tokens"
    return Drawing(
        {"": draw_heat_maps(seen.pixels, [tile], mark=mark)},
        {"grad_cam": inside, "score": np.array(score), "label": found.labels[0]},
        f"Grad-CAM of {what} {score:.3g} at stage {index + 1}: {fact}",
    )


def draw_features(model: nnx.Module, seen: Seen, *, stage: int | None = None) -> Drawing:
    """The first three principal components of each stage's features as red, green and blue.

    A component's colour goes from its 1st to its 99th percentile. The arrays `stage1`, ... are
    (h, w, 3).
    """
    tiles: list[Tile] = []
    facts: list[str] = []
    arrays: dict[str, np.ndarray] = {}
    strides = pictures.backbone_of(model).strides
    for index, features in enumerate(pictures.feature_maps(model, seen.images)):
        if stage not in (None, index):
            continue
        inside = _inside(features, seen, strides[index])
        maps, shares = pictures.principal_components(inside)
        low, high = np.percentile(maps[0], (1, 99), axis=(0, 1))
        colors = (maps[0] - low) / np.where(high > low, high - low, 1)
        text = f"stage {index + 1}: {_percent(shares.sum())} of the variance"
        if maps[0, ..., 0].size == 1:
            text = f"stage {index + 1}: a single token"
        tiles.append(Tile(colors, [text], strides[index]))
        arrays[f"stage{index + 1}"] = maps[0]
        facts.append(text)
    return Drawing(
        {"": draw_heat_maps(seen.pixels, tiles)},
        arrays,
        f"features, first 3 principal components: {'; '.join(facts)}",
    )


def _fields(models: Sequence[tuple[str, nnx.Module, Sequence[Seen]]], stage: int | None) -> Drawing:
    """The receptive fields of models side by side, each the mean over its pictures."""
    tiles: list[Tile] = []
    facts: list[str] = []
    arrays: dict[str, np.ndarray] = {}
    for number, (name, model, seen) in enumerate(models, 1):
        given = _stage(model, stage)
        index = pictures.stage_index(model, -1 if given is None else given)
        sizes = collections.Counter(one.size for one in seen)
        size, count = sizes.most_common(1)[0]
        if count < len(seen):
            say(f"receptive field of {name}: {count} of {len(seen)} pictures, those of "
                f"{size[1]}x{size[0]} pixels")  # fmt: skip
        field = np.zeros(size)
        for one in seen:
            if one.size == size:
                # Without a detector's padding: the centre is to be the picture's.
                images = one.images[:, : size[0], : size[1]]
                field += pictures.receptive_field(model, images, stage=index) / count
        if not np.isfinite(field).all() or not field.any():
            raise UserError(f"the receptive field of {name} is 0 or not finite everywhere")
        shares = [pictures.share_of_pixels(field, fraction) for fraction in _SHARES]
        lines = [
            f"{_percent(fraction)} in {_percent(share)}"
            for fraction, share in zip(_SHARES, shares, strict=True)
        ]
        tiles.append(
            Tile(
                field,
                [
                    f"{name}, stage {index + 1}",
                    f"{size[1]}x{size[0]} pixels",
                    *(f"{line} of the pixels" for line in lines),
                ],
                decades=_FIELD_DECADES,
            )
        )
        arrays |= {f"field{number}": field, f"shares{number}": np.array(shares)}
        facts.append(
            f"receptive field of stage {index + 1} of {name}, mean over {count}: "
            f"{', '.join(lines)} of the pixels"
        )
    arrays["fractions"] = np.array(_SHARES)
    return Drawing({"": draw_heat_maps(None, tiles, tile=360)}, arrays, "; ".join(facts))


def _inside(maps: np.ndarray, seen: Seen, stride: int) -> np.ndarray:
    """(B, h, w, ...) without the tokens that are all padding.

    Raises:
      UserError: it is not finite.
    """
    height, width = seen.size
    inside = maps[:, : -(-height // stride), : -(-width // stride)]
    if not np.isfinite(inside).all():
        raise UserError(
            f"what the model computes at stride {stride} is not finite: its weights are not, "
            "or too large"
        )
    return inside


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write(folder: pathlib.Path, name: str, found: dict[str, Drawing]) -> list[pathlib.Path]:
    written = []
    if found:
        folder.mkdir(parents=True, exist_ok=True)
    for kind, drawing in found.items():
        for end, picture in drawing.pictures.items():
            path = folder / f"{kind}{'_' if end else ''}{end}.png"
            picture.save(path)
            written.append(path)
        path = folder / f"{kind}.npz"
        arrays: dict[str, Any] = drawing.arrays
        np.savez_compressed(path, **arrays)
        written.append(path)
        say(f"{name}: {drawing.facts}")
    return written
