"""What pictures show, in numbers: against known weights, plain formulas and PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.extending import toy_backbone  # noqa: F401 - registers its models
from tests.golden.inventories import load_inventory
from tests.golden.synthetic import synthetic_state_dict
from tests.golden_model import ablation_config, golden_images, golden_model, relative_error, run
from torch_reference import create_model
from vssd_jax.errors import UserError
from vssd_jax.inference import pictures
from vssd_jax.models import family
from vssd_jax.models.layers import Conv, LayerNorm, Precision
from vssd_jax.models.taps import tap, watching
from vssd_jax.models.vssd import VSSD, AttentionMixer, SSDMixer, VSSDConfig

TINY = {
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "d_state": 4,
    "drop_path": 0.0,
}  # fmt: skip


def images(height, width, batch=1, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width, 3))


class OneStage(nnx.Module):
    """A backbone whose only stage is `layer`, at the pixels' resolution."""

    strides = (1,)

    def __init__(self, layer, channels):
        self.layer, self.widths = layer, (channels,)

    def feature_maps(self, images, rngs=None):
        return [tap("map", self.layer(images))]


class MixerAlone(nnx.Module):
    """A mixer whose depthwise convolution sees nothing but the pixel itself."""

    def __init__(self, kind):
        precision, rngs = Precision(jnp.dtype("float64")), nnx.Rngs(1)
        options = {"implementation": None, "precision": precision}
        self.norm = LayerNorm(3, **options)
        if kind == "attention":
            self.mixer = AttentionMixer(3, 1, **options, rngs=rngs)
        else:
            config = VSSDConfig(d_state=4, ngroups=2 if kind == "bissd" else 1, num_heads=(2,) * 4)
            self.mixer = SSDMixer(config, 3, 2, kind=kind, **options, rngs=rngs)
            kernel = self.mixer.conv.kernel
            kernel[...] = jnp.zeros(kernel.shape).at[1, 1].set(1)
        # The mean over channels, which the norm takes away, is no path to other tokens.
        for _, parameter in nnx.iter_graph(self.mixer):
            if isinstance(parameter, nnx.Param) and parameter[...].ndim == 2:
                parameter[...] = 10 * parameter[...]

    def __call__(self, x):
        return self.mixer(x, self.norm.params, None)


# --- Token weights ------------------------------------------------------------------------------


def test_the_token_weights_of_a_model_made_by_hand(x64):
    """dt is a known function of a channel of each pixel: m is softplus of it times exp(A_log)."""
    mixer = MixerAlone("ncssd")
    norm, ssd = mixer.norm, mixer.mixer
    norm.scale[...], norm.bias[...] = jnp.ones(3), jnp.zeros(3)
    kernel = jnp.zeros(ssd.in_proj.kernel.shape).at[0, -2].set(1.5).at[1, -1].set(-2)
    ssd.in_proj.kernel[...] = kernel
    ssd.dt_bias[...], ssd.A_log[...] = jnp.array([0.25, -1.0]), jnp.log(jnp.array([2.0, 3.0]))
    x = images(5, 7, batch=2)
    (found,) = pictures.token_weights(OneStage(mixer, 3), x)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.epsilon)
    expected = np.stack(
        [2 * np.logaddexp(0, 1.5 * normed[..., 0] + 0.25),
         3 * np.logaddexp(0, -2 * normed[..., 1] - 1)], -1
    )[:, None]  # fmt: skip
    assert found.shape == (2, 1, 5, 7, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def plain_mixer(mixer, norm, x, weights, mask):
    """The mixer by its formula: y_i = sum_j mask_ij (C_i . B_j) m_j x_j + D x_i, gate and all."""
    batch, height, width, _ = x.shape

    def normed(x, layer):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + layer.epsilon) * layer.scale[...] + layer.bias[...]

    z, xbc, _ = np.split(
        normed(x, norm) @ mixer.in_proj.kernel[...], np.cumsum(mixer.sizes)[:2], -1
    )
    xbc = xbc * mixer.conv.kernel[...][1, 1].reshape(-1) + mixer.conv.bias[...]
    xbc = (xbc / (1 + np.exp(-xbc))).reshape(batch, height * width, -1)
    inner, heads = mixer.sizes[0], weights.shape[-1]
    states = (xbc.shape[-1] - inner) // 2
    xs, b, c = np.split(xbc, [inner, inner + states], -1)
    xs = xs.reshape(*xs.shape[:2], heads, -1)
    b, c = (t.reshape(*t.shape[:2], mixer.groups, -1) for t in (b, c))
    group = np.arange(heads) % mixer.groups  # as many heads as groups, or one group
    scores = np.einsum("bihn,bjhn->bijh", c[:, :, group], b[:, :, group])
    m = weights.reshape(batch, height * width, heads)
    y = np.einsum("bijh,bijh,bjh,bjhp->bihp", mask(m), scores, m, xs)
    y = (y + mixer.D[...][:, None] * xs).reshape(batch, height, width, inner)
    return x + (normed(y, mixer.norm) * z) @ mixer.out_proj.kernel[...]


def forward_mask(dt, a):
    """exp of the sum of dt a over the tokens after j up to and with i; 0 for j after i."""
    total = np.cumsum(dt * a, 1)
    length = dt.shape[1]
    earlier = np.tril(np.ones((length, length), bool))[None, :, :, None]
    return np.where(earlier, np.exp(np.where(earlier, total[:, :, None] - total[:, None], 0)), 0)


@pytest.mark.parametrize("kind", ["ncssd", "ssd", "bissd"])
def test_the_token_weights_in_the_plain_formula_give_what_the_mixer_gives(kind, x64):
    alone = MixerAlone(kind)
    mixer = alone.mixer
    x = images(5, 6, batch=2)
    (weights,) = pictures.token_weights(OneStage(alone, 3), x)
    a = -np.exp(mixer.A_log[...])

    def mask(m):
        if kind == "ncssd":
            return np.ones((1, 1, 1, 1)) * np.ones_like(m)[:, :, None] * np.ones_like(m)[:, None]
        if kind == "ssd":
            return forward_mask(m, a)
        back = forward_mask(m[:, ::-1, 1:], a[1:])[:, ::-1, ::-1]
        return np.concatenate([forward_mask(m[..., :1], a[:1]), back], -1)

    expected = plain_mixer(mixer, alone.norm, x, weights[:, 0], mask)
    np.testing.assert_allclose(alone(jnp.asarray(x)), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["negative_da", "causal", "bidirectional", "all_attention"])
def test_token_weights_by_stage_of_each_kind_of_model(name, x64):
    config = ablation_config(name)
    model = golden_model(config, f"nano_{name}", num_classes=10, dtype="float64")
    found = pictures.token_weights(model, golden_images((2, 3, 64, 40), dtype=np.float64))
    for stage, weights in enumerate(found):
        if config.mixers[stage] == "attention":
            assert weights is None
            continue
        sizes = (2, config.depths[stage], -(-64 // 4 // 2**stage), -(-40 // 4 // 2**stage))
        assert weights.shape == (*sizes, config.num_heads[stage])
        assert (np.sign(weights) == config.token_weight_sign).all()


def test_a_tap_adds_nothing_to_a_program():
    """Watched or not, and with `tap` or without: the same program."""
    model = VSSD(VSSDConfig(**TINY), num_classes=3, rngs=nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)

    def program():
        return str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(
            state, jnp.zeros((1, 32, 32, 3))
        ))  # fmt: skip

    plain, names = program(), []
    with watching(lambda name, value, **about: (names.append(name), value)[1]):
        assert program() == plain
    per_stage = [["token_weights"] * depth + ["map"] for depth in (1, 1, 1)]
    assert names == [*per_stage[0], *per_stage[1], *per_stage[2], "qkv", "map"]
    with watching(lambda name, value, **about: value + 1):
        assert program() != plain


# --- Attention and features -----------------------------------------------------------------------


def test_attention_gives_what_the_mixer_gives(x64):
    alone = MixerAlone("attention")
    model, x = OneStage(alone, 3), images(4, 5, batch=2)
    rows = [
        pictures.attention(model, x, (row, column))[:, 0, :, :, 0].reshape(2, -1)
        for row in range(4)
        for column in range(5)
    ]
    probabilities = np.stack(rows, 1)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-12)
    norm, mixer = alone.norm, alone.mixer
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.epsilon)
    v = (normed @ mixer.qkv.kernel[...])[..., 6:].reshape(2, 20, 3)
    y = (probabilities @ v) @ mixer.out.kernel[...] + mixer.out.bias[...]
    np.testing.assert_allclose(alone(jnp.asarray(x)), x + y.reshape(x.shape), rtol=1e-10)


def test_no_attention_no_token_no_stage():
    model = VSSD(VSSDConfig(**TINY), num_classes=3, rngs=nnx.Rngs(0))
    x = images(64, 96).astype(np.float32)
    assert pictures.attention(model, x, (1, 2)).shape == (1, 1, 2, 3, 2)
    with pytest.raises(UserError, match="stage 2 has no attention"):
        pictures.attention(model, x, (0, 0), stage=2)
    for token in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(UserError, match=r"there is no token .*: the map has 2x3"):
            pictures.attention(model, x, token)
    with pytest.raises(UserError, match="there is no stage 4: the model has 4"):
        pictures.receptive_field(model, x, stage=4)


def test_principal_components_against_a_singular_value_decomposition():
    features = np.random.default_rng(0).standard_normal((2, 4, 5, 6)) * np.arange(1, 7) + 3
    found = pictures.principal_components(features, 3)
    tokens = features.reshape(-1, 6)
    left, values, _ = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    np.testing.assert_allclose(
        abs(found.maps.reshape(-1, 3)), abs(left * values)[:, :3], atol=1e-10
    )
    np.testing.assert_allclose(found.shares, values[:3] ** 2 / (values**2).sum())
    few = pictures.principal_components(features[..., :2], 3)
    assert few.maps.shape == (2, 4, 5, 3)
    assert (few.maps[..., 2] == 0).all()
    np.testing.assert_allclose(few.shares.sum(), 1)
    flat = pictures.principal_components(np.ones((1, 2, 2, 4)))
    assert (flat.maps == 0).all()
    assert (flat.shares == 0).all()


def test_feature_maps_are_those_before_the_norms_of_a_backbone():
    make = {"dtype": jnp.float32, "remat": False, "implementation": None}
    backbone = VSSDConfig(**TINY).make_backbone(**make, rngs=nnx.Rngs(0))
    backbone.eval()
    x = jnp.asarray(images(33, 50), jnp.float32)
    found = pictures.feature_maps(backbone, x)
    normed = nnx.jit(lambda backbone, x: backbone.feature_maps(x))(backbone, x)
    for norm, raw, expected in zip(backbone.out_norms, found, normed, strict=True):
        np.testing.assert_allclose(norm(jnp.asarray(raw)), expected, atol=1e-5)


# --- Receptive fields -----------------------------------------------------------------------------


def test_the_receptive_field_of_a_convolution_is_its_kernel(x64):
    precision = Precision(jnp.dtype("float64"))
    conv = Conv(3, 4, 5, precision=precision, rngs=nnx.Rngs(0))
    x = images(12, 17, batch=3)
    field = pictures.receptive_field(OneStage(conv, 4), x)
    expected = np.zeros((12, 17))
    expected[4:9, 6:11] = abs(np.asarray(conv.kernel[...]).sum(-1)).mean(-1)
    np.testing.assert_allclose(field, expected, rtol=1e-12, atol=0)
    assert pictures.share_of_pixels(field, 1.0) == 25 / (12 * 17)


@pytest.mark.parametrize("kind", ["ncssd", "ssd", "bissd", "attention"])
def test_what_each_mixer_sees(kind, x64):
    height, width = 9, 8
    field = pictures.receptive_field(OneStage(MixerAlone(kind), 3), images(height, width, 2))
    order = np.arange(height * width).reshape(height, width)
    centre = order[height // 2, width // 2]
    if kind == "ssd":
        assert (field[order <= centre] > 1e-12).all()
        assert (field[order > centre] == 0).all()
    else:
        assert (field > 1e-12).all()


def test_a_network_sees_the_picture_with_nc_ssd_and_what_lies_before_with_a_causal_scan(x64):
    size, seen = 96, {}
    for name in ("ncssd", "ssd"):
        config = VSSDConfig(**{**TINY, "mixers": (name,) * 4})
        model = VSSD(config, num_classes=3, dtype=jnp.float64, rngs=nnx.Rngs(0))
        field = pictures.receptive_field(model, images(size, size, batch=4), stage=0)
        seen[name] = (field > 0).mean(1)  # of each row of pixels
    # A ReLU may be off at a pixel in all four images.
    assert (seen["ncssd"] > 0.9).all()
    assert (seen["ssd"][: size // 2] > 0.9).all()
    # Local convolutions reach further: 3 of the block at stride 4, 10 pixels of the stem.
    assert (seen["ssd"][size // 2 + 4 + 3 * 4 + 10 :] == 0).all()


def test_a_field_is_the_mean_over_images(x64):
    model, both = OneStage(MixerAlone("ncssd"), 3), images(6, 6, batch=2)
    each = [pictures.receptive_field(model, both[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(pictures.receptive_field(model, both), np.mean(each, 0), rtol=1e-9)
    assert abs(each[0] - each[1]).max() > 1e-3


def test_shares_of_pixels():
    field = np.array([[1.0, 4.0], [-3.0, 2.0]])
    shares = [pictures.share_of_pixels(field, f) for f in (0, 0.1, 0.4, 0.41, 0.7, 0.9, 1)]
    assert shares == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 1]
    for wrong, fraction in ((np.zeros((2, 2)), 0.5), (field, 1.1), (field * np.nan, 0.5)):
        with pytest.raises(ValueError, match="no share"):
            pictures.share_of_pixels(wrong, fraction)


# --- Grad-CAM -------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """A float64 depthwise convolution is one tiny call a channel: threads wait for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("classification_nano", 3), ("all_ssd", 1), ("causal", 2), ("bidirectional", 3)],
)
@pytest.mark.usefixtures("one_thread", "x64")
def test_grad_cam_against_pytorch(name, stage):
    # Both in float64: in float32 a ReLU's input near zero has the other sign on one CPU or another,
    # and a path of the gradient more or less.
    if name == "classification_nano":
        config, inventory = VSSDConfig.nano(), name
    else:
        config, inventory = ablation_config(name), f"nano_{name}"
    model = golden_model(config, inventory, num_classes=10, dtype="float64")
    x = golden_images((2, 3, 64, 96), dtype=np.float64)
    found = pictures.grad_cam(model, x, 7, stage=stage)

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    reference = create_model("vssd_nano", **fields)
    state = synthetic_state_dict(load_inventory(inventory))
    reference.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    reference.double().eval()
    maps = []
    reference.layers[stage].blocks[-1].register_forward_hook(lambda _m, _i, o: maps.append(o))
    scores = reference(torch.from_numpy(x.transpose(0, 3, 1, 2)).double())[:, 7]
    (gradient,) = torch.autograd.grad(scores.sum(), maps[0])
    weights = gradient.mean((1, 2), keepdim=True)
    expected = torch.relu((weights * maps[0]).sum(-1)).detach().numpy()
    assert found.maps.shape == expected.shape
    assert expected.max() > 0
    assert relative_error(found.maps, expected) < 1e-9
    np.testing.assert_allclose(found.scores, scores.detach(), atol=1e-9)
    assert found.labels.tolist() == [7, 7]


def test_grad_cam_of_the_best_class_and_of_none_that_is():
    model = golden_model(VSSDConfig.nano(), "classification_nano", num_classes=10, dtype="float32")
    x = jnp.asarray(golden_images((2, 3, 64, 64)))
    best = pictures.grad_cam(model, x)
    logits = np.asarray(run(model, x))
    assert best.labels.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(best.scores, logits.max(-1), atol=1e-5)
    for label in (10, -1):
        with pytest.raises(UserError, match=f"no class {label}: the model has 10"):
            pictures.grad_cam(model, x, label)
    with pytest.raises(TypeError):  # not cut to a whole number
        pictures.grad_cam(model, x, 1.5)


def change_by_channel(model, x, stage, score, step=1e-5):
    """The gradient of `score(model, x)` with respect to a number added to a channel of a map.

    Added everywhere, so this is the sum of the gradient over the positions. By differences; a
    detector's regions stay those of the map as it is.
    """
    graph, state = nnx.split(model)

    def watched(state, watcher):
        with watching(watcher):
            return score(nnx.merge(graph, state), x)

    @jax.jit
    def regions_of(state):
        regions = []

        def watcher(name, value, **about):
            if name == "proposals":
                regions.append(value)
            return value

        watched(state, watcher)
        return regions

    @jax.jit
    def changed(state, change, regions):
        seen = []

        def watcher(name, value, **about):
            if name == "proposals":
                return regions[0]
            if name == "map":
                seen.append(value)
                return value + change if len(seen) - 1 == stage else value
            return value

        return watched(state, watcher)

    regions = regions_of(state)
    steps = step * np.eye(model.backbone.widths[stage])
    return np.array(
        [(changed(state, by, regions) - changed(state, -by, regions)) / (2 * step) for by in steps]
    )


def plain_grad_cam(features, gradient):
    """Of a map (h, w, C) and the gradient's sums over its positions."""
    return np.maximum((features * gradient / features[..., 0].size).sum(-1), 0)


@pytest.mark.slow
def test_grad_cam_of_a_segmentor_against_differences(x64):
    model = family.build(
        "upernet_vssd_nano", num_classes=4, dtype=jnp.float64, rngs=nnx.Rngs(0), channels=8,
        aux_channels=8, **TINY,
    )  # fmt: skip
    model.eval()
    x = jnp.asarray(images(48, 64))
    labels = np.asarray(nnx.jit(lambda model, x: model(x)[0])(model, x)).argmax(-1)
    counts = np.bincount(labels.ravel(), minlength=4)
    label = int(counts.argmax())
    found = pictures.grad_cam(model, x, stage=1)
    assert found.labels.tolist() == [label]

    def score(model, x):
        logits = model(x)[0][..., label]
        return jnp.where(labels == label, logits, 0).sum() / counts[label]

    gradient = change_by_channel(model, x, 1, score)
    expected = plain_grad_cam(pictures.feature_maps(model, x)[1][0], gradient)
    assert expected.max() > 0
    assert relative_error(found.maps[0], expected) < 1e-6
    model.decode_head.classifier.bias[...] = jnp.array([0, 0, 0, -1e3])
    with pytest.raises(UserError, match="no pixel is of the class"):
        pictures.grad_cam(model, x, 3)


@pytest.mark.slow
def test_grad_cam_of_a_detector_against_differences(x64):
    model = family.build(
        "mask_rcnn_vssd_nano", num_classes=3, dtype=jnp.float64, rngs=nnx.Rngs(0),
        score_threshold=0.01, rpn_pre_nms=20, rpn_proposals=10, fpn_channels=8, box_channels=8,
        max_detections=5, **TINY,
    )  # fmt: skip
    model.eval()
    x, shapes = jnp.asarray(images(64, 64)), jnp.array([[64, 50]], jnp.int32)
    found = pictures.grad_cam(model, x, 1, stage=2, image_shapes=shapes)

    def score(model, x):
        return model.predict(x, shapes).scores[0, 1]

    gradient = change_by_channel(model, x, 2, score)
    expected = plain_grad_cam(pictures.feature_maps(model, x)[2][0], gradient)
    assert expected.max() > 0
    assert relative_error(found.maps[0], expected) < 1e-5
    with pytest.raises(UserError, match="no such object is found"):
        pictures.grad_cam(model, x, 7, stage=2, image_shapes=shapes)


# --- Other models ---------------------------------------------------------------------------------


class NoTaps(nnx.Module):
    widths, strides = (3,), (1,)

    def feature_maps(self, images, rngs=None):
        return [images]


def test_a_backbone_without_taps_says_what_it_lacks():
    x = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError, match="NoTaps shows 0 maps of 1 stages"):
        pictures.feature_maps(NoTaps(), x)
    with pytest.raises(UserError, match="Conv has no backbone"):
        pictures.feature_maps(
            Conv(3, 3, 1, precision=Precision(jnp.dtype("float32")), rngs=nnx.Rngs(0)), x
        )


def test_a_backbone_that_is_not_vssd():
    for name in ("toy_small", "upernet_toy_small"):
        model = family.build(name, num_classes=4, rngs=nnx.Rngs(0))
        x = images(40, 50).astype(np.float32)
        assert pictures.mixers(model) == [None] * 4
        assert [m.shape[1:] for m in pictures.feature_maps(model, x)][-1] == (2, 2, 64)
        # Row 2 of the second map sees the rows 3 to 5 of the first, and those 3 pixels of every 4.
        field = pictures.receptive_field(model, x, stage=1)
        assert np.flatnonzero(field.any(1)).tolist() == [11, 12, 13, 15, 16, 17, 19, 20, 21]
        assert pictures.grad_cam(model, x).maps.shape == (1, 2, 2)
