"""The detector against the outputs of the authors' code, and its training step."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import AS_USERS
from tests.golden.inventories import load_inventory
from tests.golden.synthetic import synthetic_images, synthetic_state_dict
from vssd_jax.data.coco_masks import pack, part_of
from vssd_jax.kernels.roi_align import roi_align
from vssd_jax.models import mask_rcnn, torch_names
from vssd_jax.models.detection.assigner import assign
from vssd_jax.models.detection.masks import paste_masks
from vssd_jax.models.family import abstract
from vssd_jax.models.mask_rcnn import MaskRCNN, MaskRCNNConfig, Proposals
from vssd_jax.weights.state import set_state

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = np.array([[128, 160], [120, 150]], np.int32)  # image 1 is padded
ORIGINAL = ((128, 160), (240, 300))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "mask_rcnn_nano.npz")


@functools.cache
def make_model(config):
    tensors = synthetic_state_dict(load_inventory("mask_rcnn_nano"))
    params, *_, unknown = torch_names.from_torch(mask_rcnn.FAMILY.torch_table, tensors)
    assert not unknown
    model = abstract(lambda rngs: MaskRCNN(config, rngs=rngs))
    set_state(model, params)
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(MaskRCNNConfig.nano())


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(synthetic_images((2, 3, 128, 160)).transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def maps(model, images):
    return run(model, MaskRCNN.feature_maps, images)


@pytest.fixture(scope="module")
def rpn_outputs(model, maps):
    return run(model, lambda m, maps: [m.rpn_head(x) for x in maps], maps)


def run(model, method, *args):
    """A method of the model under jit.

    Anchors on both sides of an object overlap it alike, and rounding decides which get it; the
    file has the choice that XLA's usual code makes too.
    """
    graphdef, state = nnx.split(model)
    call = jax.jit(
        lambda state, *args: method(nnx.merge(graphdef, state), *args), compiler_options=AS_USERS
    )
    return call(state, *args)


def relative(value, expected):
    value, expected = np.float64(value), np.float64(expected)
    assert value.shape == expected.shape
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def test_feature_maps(maps, golden):
    for i, x in enumerate(maps):
        assert relative(x[:1].transpose(0, 3, 1, 2), golden[f"fpn{i}"]) < 1e-5


def test_rpn_outputs(rpn_outputs, golden):
    for i, (logits, deltas) in enumerate(rpn_outputs):
        expected = golden[f"rpn_cls{i}"].transpose(0, 2, 3, 1).reshape(1, -1)
        assert relative(logits[:1], expected) < 1e-5
        expected = golden[f"rpn_reg{i}"].transpose(0, 2, 3, 1).reshape(1, -1, 4)
        assert relative(deltas[:1], expected) < 1e-5


def test_proposals(model, maps, golden):
    proposals = run(model, lambda m, *args: m.proposals(*args, 200), maps, jnp.asarray(SHAPES))
    assert proposals.valid.all()
    for i in range(2):
        np.testing.assert_allclose(proposals.boxes[i], golden[f"proposals{i}"], atol=1e-2)
        np.testing.assert_allclose(proposals.scores[i], golden[f"proposal_scores{i}"], atol=1e-4)


def test_region_features_and_heads(model, maps, golden):
    rois = golden["rois"]
    image, boxes = rois[:, 0].astype(int), jnp.tile(rois[None, :, 1:], (2, 1, 1))

    def outputs(model, maps, boxes):
        small, large = (
            roi_align(maps, boxes, strides=(4, 8, 16, 32), bins=bins)[image, np.arange(len(rois))]
            for bins in (7, 14)
        )
        return small, large, model.box_head(small), model.mask_head(large)

    small, large, (logits, deltas), masks = run(model, outputs, maps[:4], boxes)
    assert relative(small.transpose(0, 3, 1, 2), golden["roi_feats7"]) < 1e-5
    assert relative(large.transpose(0, 3, 1, 2)[:, ::4], golden["roi_feats14_sub"]) < 1e-5
    assert relative(logits, golden["bbox_cls"]) < 1e-5
    assert relative(deltas.reshape(len(rois), -1), golden["bbox_reg"]) < 1e-5
    masks = masks.transpose(0, 3, 1, 2)[:, ::3]
    assert relative(masks, golden["mask_logits_sub"]) < 1e-5


def test_detections(model, images, golden):
    found = jax.tree.map(np.asarray, run(model, MaskRCNN.predict, images, jnp.asarray(SHAPES)))
    for i in range(2):
        assert found.valid[i].sum() == len(golden[f"det_scores{i}"])
        scale = np.array(ORIGINAL[i]) / SHAPES[i]
        boxes = found.boxes[i] * np.tile(scale[::-1], 2)
        np.testing.assert_allclose(boxes, golden[f"det_bboxes{i}"], atol=1e-2)
        np.testing.assert_allclose(found.scores[i], golden[f"det_scores{i}"], atol=1e-4)
        np.testing.assert_array_equal(found.labels[i], golden[f"det_labels{i}"])
        probabilities = 1 / (1 + np.exp(-found.masks[i]))
        masks = paste_masks(probabilities, boxes, ORIGINAL[i])
        expected = np.unpackbits(golden[f"det_masks{i}"], axis=-1)[..., : ORIGINAL[i][1]] > 0
        np.testing.assert_array_equal(expected.sum((1, 2)), golden[f"det_mask_area{i}"])
        shared, union = (masks & expected).sum(), (masks | expected).sum()
        assert shared / union >= 0.999
        # Rounding, also of the reference itself, can turn pixels that are at the threshold.
        low, high = (paste_masks(probabilities, boxes, ORIGINAL[i], t) for t in (0.499, 0.501))
        assert (expected <= low).all()
        assert (expected >= high).all()


def ground_truth(golden):
    pairs = [[golden[f"gt_{name}{i}"] for i in range(2)] for name in ("bboxes", "labels", "masks")]
    boxes, labels, masks = (jnp.asarray(np.stack(pair)) for pair in pairs)
    # One object more than there are, as padding.
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    cells = [np.arange(length) for length in np.unpackbits(masks[0], axis=-1).shape[1:]]
    parts = [
        [part_of(mask, *cells) for mask in np.unpackbits(image, axis=-1)]
        for image in np.asarray(masks)
    ]
    packed = [pack(of_image, 2**17, 1 + len(of_image)) for of_image in parts]
    names = ("masks", "mask_starts", "mask_boxes")
    return {
        "image_shape": jnp.asarray(SHAPES),
        "boxes": pad(boxes),
        "labels": pad(labels.astype(jnp.int32)),
        "valid": pad(jnp.ones(labels.shape, bool)),
        **{name: jnp.stack([image[name] for image in packed]) for name in names},
    }


def test_rpn_losses(maps, rpn_outputs, golden):
    config = dataclasses.replace(MaskRCNNConfig.nano(), rpn_samples=10000)
    model, batch = make_model(config), ground_truth(golden)
    losses = run(model, MaskRCNN.rpn_losses, rpn_outputs, maps, batch, jax.random.key(0))

    @functools.partial(jax.jit, compiler_options=AS_USERS)
    def assignment(maps, image_shape, boxes, valid):
        levels = model._anchors(maps, image_shape)
        grid, inside = (jnp.concatenate(part) for part in zip(*levels, strict=True))
        return levels, assign(
            grid, inside, boxes, valid, positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3
        )

    positive, used, wrong = 0, 0, np.zeros(5)
    for i in range(2):
        levels, assigned = assignment(
            maps, *(batch[name][i] for name in ("image_shape", "boxes", "valid"))
        )
        positive += int((assigned >= 0).sum())
        used += int((assigned >= -1).sum())
        # The file's run gave the RPN the classes of the objects (mmdet's detector sets them to
        # 0 before), so that objects other than class 0 counted as background in its
        # classification: log(1 + e^x) in place of log(1 + e^-x), x more.
        assigned, labels = np.asarray(assigned), np.asarray(batch["labels"][i])
        background = (assigned >= 0) & (labels[np.maximum(assigned, 0)] > 0)
        logits = np.concatenate([level[0][i] for level in rpn_outputs])
        ends = np.cumsum([len(level[0]) for level in levels])[:-1]
        wrong += [part.sum() for part in np.split(np.where(background, logits, 0), ends)]
    # The file divides by the positive anchors, training by all that are used.
    cls, box = (np.float64(loss) * used / positive for loss in losses)
    np.testing.assert_allclose(cls + wrong / positive, golden["rpn_loss_rpn_cls"], rtol=1e-4)
    np.testing.assert_allclose(box, golden["rpn_loss_rpn_bbox"], rtol=1e-4)


def test_region_losses(golden, maps):
    # The file's regions are the proposals alone: its accuracy is a multiple of 1 / 39.
    config = dataclasses.replace(
        MaskRCNNConfig.nano(), roi_samples=60, roi_positive_fraction=0.5, roi_add_objects=False
    )
    model, batch = make_model(config), ground_truth(golden)
    boxes, valid = np.zeros((2, 20, 4), np.float32), np.zeros((2, 20), bool)
    for i in range(2):
        proposals = golden[f"roi_proposals{i}"]
        boxes[i, : len(proposals)] = proposals
        valid[i, : len(proposals)] = True
    proposals = Proposals(jnp.asarray(boxes), jnp.ones((2, 20)), jnp.asarray(valid))
    losses = run(model, MaskRCNN.roi_losses, maps, proposals, batch, jax.random.key(0))
    for name, theirs in (("cls", "cls"), ("box", "bbox"), ("mask", "mask")):
        np.testing.assert_allclose(losses[f"roi_{name}"], golden[f"roi_loss_{theirs}"], rtol=1e-4)

    def changed(**fields):
        got = run(
            model, MaskRCNN.roi_losses, maps, proposals, batch | fields, jax.random.key(0)
        )
        return {name: float(value / losses[name]) for name, value in got.items()}

    # Objects without a mask train everything but the masks.
    every = np.ones_like(batch["valid"])
    assert changed(has_mask=every) == pytest.approx(dict.fromkeys(losses, 1), rel=1e-5)
    none = changed(has_mask=~every)
    assert none == pytest.approx({"roi_cls": 1, "roi_box": 1, "roi_mask": 0}, rel=1e-5)
    # The mean over those with a mask: of one image's and the other's, by the number of regions.
    one, other = (
        changed(has_mask=every & (np.arange(2) == i)[:, None])["roi_mask"] for i in (0, 1)
    )
    assert min(one, other) < 1 < max(one, other)
    weights = np.full(model.num_classes, 3, np.float32)
    heavy = changed(class_weights=weights)
    assert 1 < heavy["roi_cls"] < 3  # the background weighs 1
    assert heavy["roi_box"] == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
def test_training_loss_has_finite_gradients_also_without_objects(model, images, golden):
    batch = ground_truth(golden) | {"image": images}
    batch["valid"] = batch["valid"].at[1].set(False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params):
        def total(params):
            losses = nnx.merge(graphdef, params, rest).losses(batch, nnx.Rngs(0))
            return sum(losses.values()), losses

        return jax.value_and_grad(total, has_aux=True)(params)

    (total, losses), gradients = step(params)
    assert set(losses) == {"rpn_cls", "rpn_box", "roi_cls", "roi_box", "roi_mask"}
    assert np.isfinite(total)
    for path, gradient in nnx.to_flat_state(gradients):
        assert jnp.isfinite(gradient[...]).all(), path
        assert (gradient[...] != 0).any(), path
