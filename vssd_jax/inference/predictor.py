"""Predictions for pictures without labels."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageOps

from vssd_jax.config import preprocessing_of
from vssd_jax.data import drawing
from vssd_jax.data.classification_transforms import EvalTransform
from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.decode import MAX_PIXELS, UnreadableImage, decode, upright_size
from vssd_jax.data.detection_transforms import eval_transform as detection_transform
from vssd_jax.data.detection_transforms import input_shape
from vssd_jax.data.normalization import normalize
from vssd_jax.data.segmentation_transforms import eval_shapes
from vssd_jax.data.segmentation_transforms import resize as segmentation_resize
from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.host import compiler_options, cores, keep_compiled_programs
from vssd_jax.known_classes import readable
from vssd_jax.models import family
from vssd_jax.models.family import Detections, Detector
from vssd_jax.models.layers import round_kernels
from vssd_jax.models.split import Arrays, SplitModel
from vssd_jax.tasks import coco_metrics
from vssd_jax.tasks import segmentation_metrics as metrics
from vssd_jax.tasks.pixels import normalized
from vssd_jax.training.sharding import make_mesh
from vssd_jax.weights.convert import ASSUMED, assumed_names
from vssd_jax.weights.load import load
from vssd_jax.weights.state import get_state, set_state

Picture = str | os.PathLike | Image.Image | np.ndarray
BATCH_SIZES = {"classification": 32, "detection": 4, "segmentation": 4}


# --- Results -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classification:
    """The most probable classes of a picture, best first.

    Attributes:
      labels, names, scores: of the best; scores are probabilities.
      probabilities: (classes,) float32, of all.
    """

    labels: list[int]
    names: list[str]
    scores: list[float]
    probabilities: np.ndarray

    def draw(self, image: np.ndarray) -> Image.Image:
        """The (H, W, 3) uint8 picture with the names and scores below it."""
        return drawing.draw_classification(image, self.names, self.scores, numbers=self.labels)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = zip(self.labels, self.names, self.scores, strict=True)
        return {
            "predictions": [{"label": i, "name": name, "score": score} for i, name, score in rows]
        }


@dataclasses.dataclass(frozen=True)
class Detection:
    """The objects in a picture, best first.

    Attributes:
      labels, names, scores: of each object.
      boxes: (N, 4) float32 x1 y1 x2 y2 in pixels of the picture.
      segmentations: a run-length code of each mask, as in COCO's results; None from a detector that
        has learned no masks.
      size: (H, W) of the picture.
    """

    labels: list[int]
    names: list[str]
    scores: list[float]
    boxes: np.ndarray
    segmentations: list[dict[str, Any]] | None
    size: tuple[int, int]

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool."""
        if self.segmentations is None:
            return None
        masks = [rasterise(code, self.size) > 0 for code in self.segmentations]
        return np.array(masks).reshape(-1, *self.size)

    def draw(
        self, image: np.ndarray, *, class_names: Sequence[str] = (), min_score: float = 0.3
    ) -> Image.Image:
        """The (H, W, 3) uint8 picture with boxes, masks and names of what scores `min_score`.

        `class_names` are those of the predictor; the colours follow the labels.
        """
        shown = [i for i, score in enumerate(self.scores) if score >= min_score]
        names = list(class_names) or _named(self.labels, self.names)
        codes = self.segmentations
        return drawing.draw_detections(
            image,
            boxes=self.boxes[shown],
            labels=[self.labels[i] for i in shown],
            scores=[self.scores[i] for i in shown],
            masks=None if codes is None else [rasterise(codes[i], self.size) > 0 for i in shown],
            class_names=names,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: boxes are x y width height, as COCO has them."""
        objects = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            entry = {
                "label": self.labels[i],
                "name": self.names[i],
                "score": self.scores[i],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            if self.segmentations is not None:
                entry["segmentation"] = self.segmentations[i]
            objects.append(entry)
        return {"predictions": objects}


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The class of every pixel of a picture.

    Attributes:
      label_map: (H, W) uint8; 255 where no class is the most probable.
      class_names: of the labels.
    """

    label_map: np.ndarray
    class_names: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels by name of the class, of those present, greatest first."""
        counts = np.bincount(self.label_map.ravel(), minlength=256)[: len(self.class_names)]
        order = np.argsort(-counts, kind="stable")
        return {
            self.class_names[i]: float(counts[i] / self.label_map.size) for i in order if counts[i]
        }

    def draw(self, image: np.ndarray) -> Image.Image:
        """The (H, W, 3) uint8 picture with the classes' colours over it, and a legend."""
        return drawing.draw_segmentation(image, self.label_map, self.class_names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the pixels."""
        return {"shares": self.shares}


Result = Classification | Detection | Segmentation


def _named(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    known = dict(zip(labels, names, strict=True))
    return [known.get(i, f"class {i}") for i in range(max(known, default=-1) + 1)]


# --- The three tasks -----------------------------------------------------------------------------


class _Method(Protocol):
    """How a task predicts.

    Attributes:
      needs_size: whether batches depend on the pictures' sizes.
    """

    needs_size: bool

    def key(self, size: tuple[int, int]) -> Hashable:
        """Pictures of sizes (H, W) with equal keys can be in one batch."""
        ...

    def prepare(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """(H, W, 3) uint8 to the row of a batch."""
        ...

    def run(self, arrays: Arrays, batch: dict[str, jax.Array]) -> Any:
        """Starts the computation of a batch on the device."""
        ...

    def results(self, outputs: Any, batch: dict[str, np.ndarray], count: int) -> list[Result]:
        """Of the first rows of a batch."""
        ...


class _Classifier:
    needs_size = False

    def __init__(self, model: SplitModel, fields: dict[str, Any], names: list[str], top: int):
        self._transform = EvalTransform(fields["image_size"], fields["eval_crop"])
        self._names, self._top = names, min(top, len(names))
        mean, std = fields["mean"], fields["std"]

        def forward(arrays: Arrays, images: jax.Array) -> jax.Array:
            module: Any = model.merge(arrays, training=False)
            return jax.nn.softmax(module(normalize(images, mean, std)))

        self._forward = jax.jit(forward, compiler_options=compiler_options())

    def key(self, size: tuple[int, int]) -> Hashable:
        return None

    def prepare(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self._transform({"image": pixels})["image"]}

    def run(self, arrays: Arrays, batch: dict[str, jax.Array]) -> jax.Array:
        return self._forward(arrays, batch["image"])

    def results(
        self, outputs: np.ndarray, batch: dict[str, np.ndarray], count: int
    ) -> list[Result]:
        found: list[Result] = []
        for row in outputs[:count]:
            best = np.argsort(-row, kind="stable")[: self._top].tolist()
            names, scores = [self._names[i] for i in best], [float(row[i]) for i in best]
            found.append(Classification(best, names, scores, row))
        return found


class _Detector:
    needs_size = True

    def __init__(
        self, model: SplitModel, fields: dict[str, Any], names: list[str], min_score: float
    ):
        shapes = None if fields["exact_padding"] else fields["padded_shapes"]
        self._options: dict[str, Any] = {
            "short_side": max(fields["short_sides"]),
            "long_side": fields["long_side"],
            "shapes": shapes,
        }
        self._names, self._masks, self._min_score = names, not fields["boxes_only"], min_score
        mean, std = fields["mean"], fields["std"]

        def forward(arrays: Arrays, images: jax.Array, shapes: jax.Array) -> Detections:
            module: Detector = model.merge(arrays, training=False)  # type: ignore[assignment]
            return module.predict(normalized(images, shapes, mean=mean, std=std), shapes)

        self._forward = jax.jit(forward, compiler_options=compiler_options())

    def key(self, size: tuple[int, int]) -> Hashable:
        return input_shape(size, **self._options)

    def prepare(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        element = {"image": pixels, "index": 0, "replaced": 0}
        row = detection_transform(element, **self._options)
        return {name: row[name] for name in ("image", "image_shape", "original_shape")}

    def run(self, arrays: Arrays, batch: dict[str, jax.Array]) -> Detections:
        return self._forward(arrays, batch["image"], batch["image_shape"])

    def results(
        self, outputs: Detections, batch: dict[str, np.ndarray], count: int
    ) -> list[Result]:
        results: list[Result] = []
        for i in range(count):
            keep = outputs.valid[i] & (outputs.scores[i] >= self._min_score)
            height, width = map(int, batch["original_shape"][i])
            size = height, width
            labels = np.asarray(outputs.labels[i])[keep].tolist()
            boxes, codes = coco_metrics.in_original(
                np.asarray(outputs.boxes[i])[keep],
                np.asarray(outputs.masks[i])[keep] if self._masks else None,
                batch["image_shape"][i],
                size,
            )
            results.append(
                Detection(
                    labels,
                    [self._names[label] for label in labels],
                    np.asarray(outputs.scores[i])[keep].astype(float).tolist(),
                    boxes,
                    codes,
                    size,
                )
            )
        return results


class _Segmentor:
    needs_size = True

    def __init__(self, model: SplitModel, fields: dict[str, Any], names: list[str]):
        self._options: dict[str, Any] = {
            "short": fields["short_side"],
            "long": fields["long_side"],
            "multiple": fields["size_multiple"],
        }
        self._names, mean, std = names, fields["mean"], fields["std"]

        def forward(arrays: Arrays, images: jax.Array) -> jax.Array:
            module: Any = model.merge(arrays, training=False)
            return module(normalized(images, mean=mean, std=std))[0]

        def label_maps(
            logits: jax.Array, sizes: jax.Array, seen: tuple[int, int], shape: tuple[int, int]
        ) -> jax.Array:
            labels = metrics.predict_labels([(logits, seen)], sizes, shape)
            return labels.astype(jnp.uint8)

        options: Any = {"compiler_options": compiler_options()}
        # Two programs: the large one for the few sizes that the model sees, a small one for each
        # size of photograph.
        self._forward = jax.jit(forward, **options)
        self._label_maps = jax.jit(label_maps, static_argnums=(2, 3), **options)

    def key(self, size: tuple[int, int]) -> Hashable:
        return eval_shapes(size, **self._options)

    def prepare(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        seen, _ = eval_shapes(pixels.shape[:2], **self._options)
        image = segmentation_resize(pixels, seen)
        return {"image": image, "size": np.array(pixels.shape[:2], np.int32)}

    def run(self, arrays: Arrays, batch: dict[str, jax.Array]) -> jax.Array:
        height, width = jax.device_get(batch["size"]).max(0).tolist()
        *_, shape = eval_shapes((height, width), **self._options)
        logits = self._forward(arrays, batch["image"])
        seen = batch["image"].shape[1:3]
        return self._label_maps(logits, batch["size"], tuple(seen), shape)

    def results(
        self, outputs: np.ndarray, batch: dict[str, np.ndarray], count: int
    ) -> list[Result]:
        sizes = batch["size"][:count].tolist()
        return [
            Segmentation(np.array(labels[:height, :width]), self._names)
            for labels, (height, width) in zip(outputs, sizes, strict=False)
        ]


# --- The predictor -------------------------------------------------------------------------------


class Predictor:
    """Predicts for pictures; made by `load_predictor`.

    Attributes:
      task: "classification", "detection" or "segmentation".
      model: its name.
      class_names: of the labels.
      preprocessing: how a picture becomes the model's input.
      max_pixels: a picture with more is unreadable.
    """

    def __init__(
        self,
        task: str,
        model: str,
        class_names: list[str],
        preprocessing: dict[str, Any],
        method: _Method,
        split: SplitModel,
        *,
        batch_size: int,
        threads: int,
        max_pixels: int,
    ):
        self.task, self.model, self.class_names = task, model, class_names
        self.preprocessing = preprocessing
        self._method, self._threads, self.max_pixels = method, threads, max_pixels
        self._mesh = make_mesh({"data": -1})
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._split = split
        self._arrays: Arrays = jax.device_put(get_state(split.abstract), everywhere)

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Any:
        """Predicts for one picture, or for a list of them.

        Args:
          pictures: a file's name, a PIL image or an (H, W, 3) or (H, W) uint8 array of RGB or grey
            values, or a sequence of such. A file's EXIF orientation is applied.

        Returns:
          A `Classification`, `Detection` or `Segmentation`, or a list of them, in which None stands
          for a picture that cannot be read, which is said.

        Raises:
          UserError: the one picture cannot be read, or is of another type.
        """
        if not isinstance(pictures, Sequence) or isinstance(pictures, str):
            _, result = next(self.stream([pictures]))
            if isinstance(result, Exception):
                raise UserError(reason(pictures, result)) from result
            return result
        results: list[Result | None] = [None] * len(pictures)
        for index, result in self.stream(pictures):
            if isinstance(result, Exception):
                say(f"warning: {reason(pictures[index], result)}")
            else:
                results[index] = result
        return results

    def stream(self, pictures: Sequence[Picture]) -> Iterator[tuple[int, Result | Exception]]:
        """The number of each picture and its result, or why it cannot be read, as they come.

        They come batch by batch, of pictures that have one shape for the model.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            groups: dict[Hashable, list[int]] = {}
            if self._method.needs_size:
                sizes = pool.map(self._key, pictures)
                for index, key in enumerate(sizes):
                    if isinstance(key, Exception):
                        yield index, key
                    else:
                        groups.setdefault(key, []).append(index)
            else:
                groups[None] = list(range(len(pictures)))
            chunks = [
                group[start : start + self._batch_size]
                for group in groups.values()
                for start in range(0, len(group), self._batch_size)
            ]
            yield from self._predict(pool, pictures, chunks)

    def _predict(
        self, pool: ThreadPoolExecutor, pictures: Sequence[Picture], chunks: Iterable[list[int]]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """Prepares batches, computes the one before, gives the results of the one before that."""
        running: tuple[list[int], dict[str, np.ndarray], Any] | None = None
        for numbers, rows in _ahead(pool, self._row, pictures, chunks):
            good = []
            for number, row in zip(numbers, rows, strict=True):
                if isinstance(row, Exception):
                    yield number, row
                else:
                    good.append((number, row))
            if not good:
                continue
            batch = self._stack([row for _, row in good])
            with jax.set_mesh(self._mesh):
                sharding = NamedSharding(self._mesh, PartitionSpec("data"))
                outputs = self._method.run(self._arrays, jax.device_put(batch, sharding))
            done, running = running, ([number for number, _ in good], batch, outputs)
            if done is not None:
                yield from self._finish(*done)
        if running is not None:
            yield from self._finish(*running)

    def _finish(
        self, numbers: list[int], batch: dict[str, np.ndarray], outputs: Any
    ) -> Iterator[tuple[int, Result]]:
        results = self._method.results(jax.device_get(outputs), batch, len(numbers))
        yield from zip(numbers, results, strict=True)

    def _stack(self, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """A batch of a power of two rows, or of the whole size; copies of the first fill it up."""
        size = self._mesh.size
        while size < len(rows):
            size *= 2
        rows = rows + [rows[0]] * (min(size, self._batch_size) - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _key(self, picture: Picture) -> Hashable:
        try:
            if isinstance(picture, str | os.PathLike):
                return self._method.key(upright_size(picture, max_pixels=self.max_pixels))
            height, width = _pixels(picture, self.max_pixels).shape[:2]
            return self._method.key((height, width))
        except (UnreadableImage, OSError) as error:
            return error

    def prepare(self, picture: Picture) -> dict[str, np.ndarray]:
        """A picture as a row of the model's batch.

        Returns:
          `image` (H, W, 3), float32 normalised, of a classifier uint8; of a detector padded, with
          `image_shape` (2,), its height and width without the padding.

        Raises:
          UnreadableImage, OSError: it cannot be read; `reason` says so in a line.
        """
        return self._method.prepare(_pixels(picture, self.max_pixels))

    def module(self) -> nnx.Module:
        """The model itself in evaluation mode, on one device."""
        arrays = jax.device_put(self._arrays, jax.local_devices()[0])
        return self._split.merge(arrays, training=False)

    def _row(self, picture: Picture) -> dict[str, np.ndarray] | Exception:
        try:
            return self.prepare(picture)
        except (UnreadableImage, OSError) as error:
            return error


def _ahead(
    pool: ThreadPoolExecutor,
    prepare: Callable[[Picture], Any],
    pictures: Sequence[Picture],
    chunks: Iterable[list[int]],
    depth: int = 2,
) -> Iterator[tuple[list[int], list[Any]]]:
    """The numbers and prepared rows of each chunk, of which the next are prepared meanwhile."""
    waiting: collections.deque[tuple[list[int], list[Future]]] = collections.deque()
    for chunk in chunks:
        waiting.append((chunk, [pool.submit(prepare, pictures[i]) for i in chunk]))
        if len(waiting) > depth:
            numbers, futures = waiting.popleft()
            yield numbers, [future.result() for future in futures]
    for numbers, futures in waiting:
        yield numbers, [future.result() for future in futures]


def _pixels(picture: Picture, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    if isinstance(picture, str | os.PathLike):
        return decode(pathlib.Path(picture).read_bytes(), oriented=True, max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise UserError(f"a picture is a file's name, a PIL image or an array: {type(picture)}")
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or 0 in picture.shape:
        raise UserError(
            f"a picture is (H, W, 3) or (H, W) uint8: this is {picture.shape} {picture.dtype}"
        )
    if picture.ndim == 2:
        return np.repeat(picture[..., None], 3, axis=-1)
    if picture.shape[-1] not in (1, 3, 4):
        raise UserError(f"a picture has 3 channels, red, green and blue: {picture.shape}")
    return np.ascontiguousarray(np.broadcast_to(picture[..., :3], (*picture.shape[:2], 3)))


def reason(picture: Picture, error: Exception) -> str:
    """Why a picture of `Predictor.stream` has no result, in a line."""
    name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else "the picture"
    text = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
    return f"{name!s} cannot be read: {text}"


def load_predictor(
    weights: str | os.PathLike,
    *,
    model: str | None = None,
    batch_size: int | None = None,
    top: int = 5,
    min_score: float = 0.05,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Predictor:
    """A predictor for the task of given weights, with the preprocessing that they tell.

    Compiled programs are kept on disk for the next process, see
    `vssd_jax.host.keep_compiled_programs`.

    Args:
      weights: anything that `vssd_jax.weights.load.load` reads.
      model: the name that they must have; None recognises it.
      batch_size: the most pictures at a time, over all devices.
      top: how many classes a classification has.
      min_score: of a detector's objects; nothing below 0.05 comes out of it.
      dtype: of the activations, float32 or bfloat16.
      implementation: of the operations: None (the best for the device), "xla", "pallas", "triton".
      threads: that decode and prepare pictures; None takes as many as there are processors.
      max_pixels: a picture with more counts as unreadable.

    Raises:
      UserError: weights that cannot be read, have no head, or whose preprocessing is not known.
    """
    keep_compiled_programs()
    loaded = load(weights, model=model)
    task = family.task_of(loaded.model)
    if not loaded.num_classes:
        raise UserError(f"{weights} has no head: there is nothing to predict")
    fields = preprocessing_of(task, loaded.preprocessing)
    names = loaded.class_names
    if names is None:
        names = list(assumed_names(task, loaded.num_classes) or ())
        if names:
            say(f"{weights} does not name its classes: those of {ASSUMED[task]} are assumed")
        else:
            say(f"{weights} does not name its classes: they are numbered")
            names = [f"class {label}" for label in range(loaded.num_classes)]
    names = readable(names)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if top < 1:
        raise UserError(f"top={top} must be at least 1")

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return family.build(
            loaded.model,
            num_classes=loaded.num_classes,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
            **loaded.overrides,
        )

    split = SplitModel(build)
    set_state(split.abstract, loaded.params)
    round_kernels(split.abstract)  # once: on a GPU each call would launch a kernel for each of them
    method: _Method
    if task == "classification":
        method = _Classifier(split, fields, names, top)
    elif task == "detection":
        method = _Detector(split, fields, names, min_score)
    else:
        method = _Segmentor(split, fields, names)
    return Predictor(
        task,
        loaded.model,
        names,
        fields,
        method,
        split,
        batch_size=batch_size or BATCH_SIZES[task],
        threads=threads or cores(),
        max_pixels=max_pixels,
    )
