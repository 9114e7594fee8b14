"""Mask R-CNN with a feature pyramid on VSSD (He et al., arXiv 1703.06870; the VSSD paper, 4.2).

Everything has a fixed shape: a batch is padded to one size, objects and proposals to a fixed
number, and boolean masks mark the padding. Semantics are those of mmdet 3.3, with which the
released checkpoints were trained. Boxes are x1 y1 x2 y2 in pixels of the padded image.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vssd_jax.kernels.roi_align import roi_align
from vssd_jax.models import torch_names, vssd
from vssd_jax.models.detection import anchors as anchor_grid
from vssd_jax.models.detection import boxes as box_ops
from vssd_jax.models.detection.assigner import IGNORED, NEGATIVE, assign
from vssd_jax.models.detection.heads import FPN, BoxHead, MaskHead, RPNHead
from vssd_jax.models.detection.masks import PackedMasks, mask_targets
from vssd_jax.models.detection.nms import multiclass_nms, nms
from vssd_jax.models.detection.sampler import sample
from vssd_jax.models.family import (
    BackboneConfig,
    Detections,
    Head,
    Images,
    ImageShapes,
    Recognised,
    register,
)
from vssd_jax.models.layers import Precision
from vssd_jax.models.taps import tap
from vssd_jax.models.torch_names import Row, TensorShapes
from vssd_jax.models.vssd import VSSDConfig
from vssd_jax.types import Array, Bool, Float, Int

BOX_BINS, MASK_BINS = 7, 14

Maps = Sequence[Float[Array, "B _ _ C"]]  # of the pyramid, from fine to coarse
RPNOutputs = list[tuple[Float[Array, "B _"], Float[Array, "B _ 4"]]]  # logits and deltas by level


@dataclasses.dataclass(frozen=True)
class MaskRCNNConfig:
    """A detector; the defaults are the paper's.

    Attributes:
      backbone: the config of the backbone.
      num_classes: default number of classes, without the background.
      fpn_channels: channels of the pyramid and of the RPN and mask heads.
      box_channels: width of the box head.
      anchor_scale, anchor_ratios: side of the anchors in cells, and height over width.
      rpn_pre_nms, rpn_pre_nms_train: proposals per level before suppression.
      rpn_proposals: proposals per image after it.
      rpn_nms_iou: overlap at which it suppresses.
      rpn_samples, rpn_positive_fraction: anchors per image in the RPN's losses.
      roi_samples, roi_positive_fraction: proposals per image in the heads' losses.
      roi_add_objects: whether the ground truth is among these proposals.
      score_threshold, nms_iou, max_detections: of the final detections.
    """

    backbone: BackboneConfig = dataclasses.field(default_factory=VSSDConfig.tiny)
    num_classes: int = 80
    fpn_channels: int = 256
    box_channels: int = 1024
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms: int = 1000
    rpn_pre_nms_train: int = 2000
    rpn_proposals: int = 1000
    rpn_nms_iou: float = 0.7
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    roi_samples: int = 512
    roi_positive_fraction: float = 0.25
    roi_add_objects: bool = True
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor_ratios", tuple(self.anchor_ratios))  # a list in JSON

    @classmethod
    def nano(cls) -> "MaskRCNNConfig":
        """A stand-in for tests and small pictures; not in the paper."""
        return cls(
            backbone=VSSDConfig.nano(), num_classes=10, fpn_channels=32, box_channels=64,
            rpn_pre_nms=200, rpn_pre_nms_train=400, rpn_proposals=100, rpn_samples=64,
            roi_samples=64, max_detections=20,
        )  # fmt: skip

    @classmethod
    def micro(cls) -> "MaskRCNNConfig":
        return cls(backbone=VSSDConfig.micro())

    @classmethod
    def tiny(cls) -> "MaskRCNNConfig":
        return cls(backbone=VSSDConfig.tiny())

    @classmethod
    def small(cls) -> "MaskRCNNConfig":
        return cls(backbone=VSSDConfig.small())


class Proposals(NamedTuple):
    """Regions per image, best first: boxes (B, P, 4), scores (B, P), valid (B, P) bool."""

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


class MaskRCNN(nnx.Module):
    """The detector.

    Args:
      config: the architecture.
      num_classes: classes without the background; None takes the config's.
      dtype: float32 or bfloat16 activations; boxes, scores and losses are float32.
      implementation: of the operations, see `build` in `family.py`.
      remat: recompute the backbone's blocks in the backward pass.
      rngs: with a `params` stream for the initialisation.
    """

    def __init__(
        self,
        config: MaskRCNNConfig,
        *,
        num_classes: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.precision = config, Precision(jnp.dtype(dtype))
        self.num_classes = config.num_classes if num_classes is None else num_classes
        self.implementation = implementation
        options: dict[str, Any] = {"precision": self.precision, "rngs": rngs}
        channels = config.fpn_channels
        self.backbone = config.backbone.make_backbone(
            dtype=dtype, implementation=implementation, remat=remat, rngs=rngs
        )
        # One more level than the backbone has: the pyramid's last, of half the size.
        self.strides = (*self.backbone.strides, 2 * self.backbone.strides[-1])
        self.neck = FPN(self.backbone.widths, channels, **options)
        self.rpn_head = RPNHead(channels, len(config.anchor_ratios), **options)
        self.box_head = BoxHead(
            channels, config.box_channels, self.num_classes, BOX_BINS, **options
        )
        self.mask_head = MaskHead(channels, self.num_classes, **options)

    # --- Inference ------------------------------------------------------------------------------

    def feature_maps(
        self, images: Images, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "B _ _ D"]]:
        """(B, H, W, 3) normalised images -> five maps (B, H/s, W/s, C), s = 4 8 16 32 64."""
        return self.neck(self.backbone.feature_maps(images, rngs))

    def __call__(self, images: Images, image_shapes: ImageShapes | None = None) -> Detections:
        """The same as `predict`; without `image_shapes` there is no padding."""
        if image_shapes is None:
            image_shapes = jnp.tile(jnp.array(images.shape[1:3]), (images.shape[0], 1))
        return self.predict(images, image_shapes)

    def predict(self, images: Images, image_shapes: ImageShapes) -> Detections:
        """Detects objects.

        Args:
          images: (B, H, W, 3), normalised, then padded with zeros at the bottom and the right.
          image_shapes: (B, 2) int32 height and width without the padding.

        Returns:
          At most `max_detections` objects of each image.
        """
        config, image_shapes = self.config, jnp.asarray(image_shapes)
        maps = self.feature_maps(images)
        proposals = tap("proposals", self.proposals(maps, image_shapes, config.rpn_pre_nms))
        logits, deltas = self.box_head(self._roi_features(maps, proposals.boxes, BOX_BINS))

        scores = jax.nn.softmax(logits)[..., :-1]
        decode = jax.vmap(lambda regions, deltas, shape: box_ops.decode(
            regions[:, None], deltas, shape, _BOX_STDS
        ))  # fmt: skip
        boxes, best, labels = multiclass_nms(
            decode(proposals.boxes, deltas, image_shapes),
            scores,
            proposals.valid[..., None] & (scores > config.score_threshold),
            config.nms_iou,
            config.max_detections,
        )
        finite = (jnp.isfinite(logits).all((1, 2)) & jnp.isfinite(deltas).all((1, 2, 3)))[:, None]
        scores = jnp.where(finite, jnp.maximum(best, 0), jnp.nan)
        valid = finite & (best > 0)
        masks = self.mask_head(self._roi_features(maps, boxes, MASK_BINS))
        return Detections(boxes, scores, labels.astype(jnp.int32), valid, _pick(masks, labels))

    def proposals(
        self, maps: Maps, image_shapes: Int[Array, "B 2"], pre_nms: int
    ) -> Proposals:
        """Regions that may hold an object.

        Args:
          maps: the five maps of the pyramid.
          image_shapes: (B, 2).
          pre_nms: regions per level before suppression.
        """
        return self._proposals([self.rpn_head(x) for x in maps], maps, image_shapes, pre_nms)

    def _anchors(
        self, maps: Maps, image_shape: Int[Array, "2"]
    ) -> list[tuple[Float[Array, "_ 4"], Bool[Array, " _"]]]:
        """The anchors of each level, and for each anchor whether it is outside the padding."""
        config, result = self.config, []
        for x, stride in zip(maps, self.strides, strict=True):
            size, ratios = (x.shape[1], x.shape[2]), config.anchor_ratios
            grid = anchor_grid.grid_anchors(size, stride, scale=config.anchor_scale, ratios=ratios)
            inside = anchor_grid.anchors_on_image(size, stride, len(ratios), image_shape)
            result.append((jnp.asarray(grid), inside))
        return result

    def _proposals(
        self, outputs: RPNOutputs, maps: Maps, image_shapes: Int[Array, "B 2"], pre_nms: int
    ) -> Proposals:
        config = self.config

        def propose(
            outputs: list[tuple[jax.Array, jax.Array]], shape: Int[Array, "2"]
        ) -> Proposals:
            """The proposals of one image."""
            boxes, scores = [], []
            for (logits, deltas), (grid, inside) in zip(
                outputs, self._anchors(maps, shape), strict=True
            ):
                best, index = _top(jnp.where(inside, jax.nn.sigmoid(logits), -1), pre_nms)
                box = box_ops.decode(grid[index], deltas[index], shape)
                usable = (best >= 0) & (box[:, 2:] > box[:, :2]).all(-1)
                keep = nms(box, best, usable, config.rpn_nms_iou)
                boxes.append(box)
                scores.append(jnp.where(keep, best, -1))
            best, index = _top(jnp.concatenate(scores), config.rpn_proposals)
            return Proposals(jnp.concatenate(boxes)[index], jnp.maximum(best, 0), best >= 0)

        return jax.vmap(propose)(outputs, image_shapes)

    def _roi_features(
        self, maps: Maps, boxes: Float[Array, "B R 4"], bins: int
    ) -> Float[Array, "B R {bins} {bins} C"]:
        return roi_align(
            maps[:-1], boxes, strides=self.strides[:-1], bins=bins,
            implementation=self.implementation,
        )  # fmt: skip

    # --- Training -------------------------------------------------------------------------------

    def losses(self, batch: dict[str, jax.Array], rngs: nnx.Rngs) -> dict[str, jax.Array]:
        """The five terms of the training loss, to be summed.

        Args:
          batch: M is the most objects that an image can have.
            image: (B, H, W, 3), normalised, then padded with zeros.
            image_shape: (B, 2) int32 height and width without the padding.
            boxes: (B, M, 4) in pixels.
            labels: (B, M) int32 class indices.
            valid: (B, M) bool, False for padding.
            masks, mask_starts, mask_boxes: (B, S) uint8, (B, M) and (B, M, 4) int32, the fields of
              `PackedMasks`.
            has_mask: (B, M) bool, False for objects that train the boxes alone; may be absent.
            class_weights: (num_classes,) of the regions' classification; may be absent.
          rngs: with the streams `sampling` and, if there is drop path, `dropout`.

        Returns:
          rpn_cls, rpn_box, roi_cls, roi_box and roi_mask, scalars. No gradient flows through the
          proposals' boxes.
        """
        maps = self.feature_maps(batch["image"], rngs)
        outputs = [self.rpn_head(x) for x in maps]
        rpn_cls, rpn_box = self.rpn_losses(outputs, maps, batch, rngs.sampling())
        proposals = self._proposals(
            jax.lax.stop_gradient(outputs), maps, batch["image_shape"],
            self.config.rpn_pre_nms_train,
        )  # fmt: skip
        return {
            "rpn_cls": rpn_cls.sum(),
            "rpn_box": rpn_box.sum(),
            **self.roi_losses(maps, proposals, batch, rngs.sampling()),
        }

    def rpn_losses(
        self, outputs: RPNOutputs, maps: Maps, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[Float[Array, " levels"], Float[Array, " levels"]]:
        """Cross-entropy and L1 loss of the sampled anchors: sums per level over their number.

        Args:
          outputs: of the RPN head per level.
          maps: the pyramid (for its sizes).
          batch: as in `losses`.
          key: of the random choice of anchors.

        Returns:
          Two arrays (5,).
        """
        config = self.config
        level = jnp.concatenate(
            [jnp.full(logits.shape[1], i) for i, (logits, _) in enumerate(outputs)]
        )
        logits, deltas = (jnp.concatenate(parts, axis=1) for parts in zip(*outputs, strict=True))

        def terms(
            logits: Float[Array, " A"],
            deltas: Float[Array, "A 4"],
            shape: Int[Array, "2"],
            objects: Float[Array, "M 4"],
            valid: Bool[Array, " M"],
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Of one image: both losses of each sample, its level, and the count to divide by."""
            levels = self._anchors(maps, shape)
            grid, inside = (jnp.concatenate(parts) for parts in zip(*levels, strict=True))
            assigned = assign(
                grid, inside, objects, valid,
                positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3,
            )  # fmt: skip
            index, used = sample(key, assigned, config.rpn_samples, config.rpn_positive_fraction)
            positive = (assigned[index] >= 0) & used
            cls = jnp.where(used, _binary_cross_entropy(logits[index], positive), 0)
            box = _box_loss(grid[index], deltas[index], objects[assigned[index]], positive)
            positives, negatives = positive.sum(), (used & ~positive).sum()
            count = jnp.maximum(positives, 1) + jnp.maximum(negatives, 1)
            return cls, box, level[index], count

        keys = jax.random.split(key, len(logits))
        cls, box, levels, counts = jax.vmap(terms)(
            logits, deltas, batch["image_shape"], batch["boxes"], batch["valid"], keys
        )
        rpn_cls, rpn_box = (
            jax.ops.segment_sum(term.reshape(-1), levels.reshape(-1), len(outputs)) / counts.sum()
            for term in (cls, box)
        )
        return rpn_cls, rpn_box

    def roi_losses(
        self, maps: Maps, proposals: Proposals, batch: dict[str, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        """Cross-entropy and L1 loss of the sampled regions, mask loss of the positive ones.

        Args:
          maps: the pyramid.
          proposals: regions, to which the ground truth is added (`roi_add_objects`).
          batch: as in `losses`.
          key: of the random choice of regions.

        Returns:
          roi_cls, roi_box and roi_mask, scalars.
        """
        config = self.config
        max_positives = int(config.roi_samples * config.roi_positive_fraction)

        def choose(
            proposals: Proposals,
            objects: Float[Array, "M 4"],
            valid: Bool[Array, " M"],
            labels: Int[Array, " M"],
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Of one image: regions, the object of each or -1, labels, and whether it is used."""
            assigned = assign(
                proposals.boxes, proposals.valid, objects, valid,
                positive_iou=0.5, negative_iou=0.5, min_positive_iou=0.5,
            )  # fmt: skip
            regions = proposals.boxes
            if config.roi_add_objects:
                own = jnp.where(valid, jnp.arange(len(objects)), IGNORED)
                assigned = jnp.concatenate([own, assigned])
                regions = jnp.concatenate([objects, regions])
            index, used = sample(key, assigned, config.roi_samples, config.roi_positive_fraction)
            assigned = jnp.where(used, assigned[index], NEGATIVE)
            labels = jnp.where(assigned >= 0, labels[assigned], self.num_classes)
            return regions[index], assigned, labels, used

        proposals = jax.lax.stop_gradient(proposals)
        regions, assigned, labels, used = jax.vmap(choose)(
            proposals, batch["boxes"], batch["valid"], batch["labels"],
            jax.random.split(key, len(batch["boxes"])),
        )  # fmt: skip
        positive = assigned >= 0
        objects = jnp.take_along_axis(batch["boxes"], assigned[..., None], axis=1)
        logits, deltas = self.box_head(self._roi_features(maps, regions, BOX_BINS))
        cls = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        if "class_weights" in batch:
            cls *= jnp.append(batch["class_weights"], 1)[labels]  # 1 for the background
        of_class = jnp.minimum(labels, self.num_classes - 1)
        deltas = jnp.take_along_axis(deltas, of_class[..., None, None], axis=-2)[..., 0, :]
        box = _box_loss(regions, deltas, objects, positive, _BOX_STDS)
        count = jnp.maximum(used.sum(), 1)

        # The positive regions come first.
        regions, assigned, positive, of_class = (
            x[:, :max_positives] for x in (regions, assigned, positive, of_class)
        )
        logits = _pick(self.mask_head(self._roi_features(maps, regions, MASK_BINS)), of_class)
        masks = PackedMasks(batch["masks"], batch["mask_starts"], batch["mask_boxes"])
        height, width = (self.strides[0] * length for length in maps[0].shape[1:3])
        cut = functools.partial(mask_targets, image_size=(height, width))
        targets = jax.vmap(cut)(masks, regions, assigned)
        mask = _binary_cross_entropy(logits, targets).mean((-1, -2))
        if "has_mask" in batch:
            positive &= jnp.take_along_axis(batch["has_mask"], assigned, axis=1)
        return {
            "roi_cls": jnp.where(used, cls, 0).sum() / count,
            "roi_box": box.sum() / count,
            "roi_mask": jnp.where(positive, mask, 0).sum() / jnp.maximum(positive.sum(), 1),
        }


_BOX_STDS = (0.1, 0.1, 0.2, 0.2)


def _top(
    scores: Float[Array, " N"], k: int
) -> tuple[Float[Array, " K"], Int[Array, " K"]]:
    """The k greatest of (N,), or all if there are fewer, and their indices."""
    best, indices = jax.lax.top_k(scores, min(k, len(scores)))
    return best, indices


def _pick(
    masks: Float[Array, "B R H W classes"], labels: Int[Array, "B R"]
) -> Float[Array, "B R H W"]:
    """The mask of each region's class: (B, R, H, W, classes) -> (B, R, H, W)."""
    return jnp.take_along_axis(masks, labels[..., None, None, None], axis=-1)[..., 0]


def _binary_cross_entropy(
    logits: Float[Array, "*shape"], targets: Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    return jax.nn.softplus(logits) - jnp.where(targets, logits, 0)


def _box_loss(
    boxes: Float[Array, "*shape 4"],
    deltas: Float[Array, "*shape 4"],
    objects: Float[Array, "*shape 4"],
    positive: Bool[Array, "*shape"],
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "*shape"]:
    """L1 distance of the deltas to those that lead to the objects, 0 where not positive."""
    # Boxes that are not positive have no object, so that the encoding may not be finite.
    target = jnp.where(positive[..., None], box_ops.encode(boxes, objects, stds), 0)
    return jnp.where(positive, jnp.abs(deltas - target).sum(-1), 0)


# --- The released checkpoints, and Mask R-CNN on other backbones --------------------------------

_ROI_LINEAR = (  # its inputs are a flattened (C, 7, 7) in PyTorch and (7, 7, C) in this project
    torch_names.Leaf(
        "weight",
        "kernel",
        torch_names.Layout(
            lambda w: (
                w.reshape(len(w), -1, BOX_BINS, BOX_BINS).transpose(2, 3, 1, 0).reshape(-1, len(w))
            ),
            lambda w: (
                w.reshape(BOX_BINS, BOX_BINS, -1, w.shape[1])
                .transpose(3, 2, 0, 1)
                .reshape(w.shape[1], -1)
            ),
        ),
    ),
    torch_names.Leaf("bias", "bias", torch_names.SAME_LAYOUT),
)
_TORCH_HEADS = (
    Row("neck.lateral_convs.{}.conv", "neck.lateral.{}", torch_names.CONV),
    Row("neck.fpn_convs.{}.conv", "neck.output.{}", torch_names.CONV),
    Row("rpn_head.rpn_conv", "rpn_head.conv", torch_names.CONV),
    Row("rpn_head.rpn_cls", "rpn_head.cls", torch_names.CONV),
    Row("rpn_head.rpn_reg", "rpn_head.reg", torch_names.CONV),
    Row("roi_head.bbox_head.shared_fcs.0", "box_head.fc1", _ROI_LINEAR),
    Row("roi_head.bbox_head.shared_fcs.1", "box_head.fc2", torch_names.LINEAR),
    Row("roi_head.bbox_head.fc_cls", "box_head.cls", torch_names.LINEAR),
    Row("roi_head.bbox_head.fc_reg", "box_head.reg", torch_names.LINEAR),
    Row("roi_head.mask_head.convs.{}.conv", "mask_head.convs.{}", torch_names.CONV),
    Row("roi_head.mask_head.upsample", "mask_head.upsample", torch_names.DECONV),
    Row("roi_head.mask_head.conv_logits", "mask_head.logits", torch_names.CONV),
)


def _recognise(shapes: TensorShapes) -> Recognised | None:
    if not shapes.any_under("rpn_head.", "roi_head."):
        return None
    fields = {
        "fpn_channels": shapes.size("neck.lateral_convs.0.conv.weight"),
        "box_channels": shapes.size("roi_head.bbox_head.shared_fcs.0.weight"),
    }
    return Recognised(shapes.size("roi_head.bbox_head.fc_cls.weight") - 1, fields)


HEAD = Head(
    prefix="mask_rcnn_",
    module=MaskRCNN,
    classifier=("box_head.cls.", "box_head.reg.", "mask_head.logits."),
    torch_table=_TORCH_HEADS,
    recognise=_recognise,
    training_fields=(
        "rpn_pre_nms_train", "rpn_samples", "rpn_positive_fraction",
        "roi_samples", "roi_positive_fraction", "roi_add_objects",
    ),
)  # fmt: skip
FAMILY = register(
    HEAD.on(
        vssd.FAMILY,
        {
            "nano": MaskRCNNConfig.nano,
            "micro": MaskRCNNConfig.micro,
            "tiny": MaskRCNNConfig.tiny,
            "small": MaskRCNNConfig.small,
        },
    )
)
