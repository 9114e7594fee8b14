"""What `vssd_jax.look` writes for a classifier, a detector and a segmentor."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vssd_jax.errors import UserError
from vssd_jax.inference import pictures
from vssd_jax.inference.look import look, seen_by
from vssd_jax.inference.predictor import load_predictor
from vssd_jax.models import family
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.state import get_state

TINY = {
    "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "d_state": 4,
}  # fmt: skip
DETECTOR = {
    "score_threshold": 0.01, "rpn_pre_nms": 20, "rpn_proposals": 10, "fpn_channels": 8,
    "box_channels": 8, "max_detections": 3,
}  # fmt: skip
NAMES = ("ant", "bee", "cow")


def save(folder, model, preprocessing, **overrides):
    overrides = TINY | overrides
    module = family.build(model, num_classes=3, rngs=nnx.Rngs(0), **overrides)
    write_folder(
        folder, Weights(model, 3, overrides, get_state(module), list(NAMES), preprocessing)
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Weights and pictures."""
    root = tmp_path_factory.mktemp("look")
    square = {"image_size": 64, "eval_crop": 1.0}
    save(root / "classifier", "vssd_nano", square)
    save(root / "causal", "vssd_nano", square, mixers=("ssd",) * 4)
    save(
        root / "detector", "mask_rcnn_vssd_nano",
        {"short_sides": (50,), "long_side": 80, "padded_shapes": ((64, 96), (96, 64))}, **DETECTOR,
    )  # fmt: skip
    save(
        root / "segmentor", "upernet_vssd_nano",
        {"short_side": 48, "long_side": 96, "size_multiple": 16}, channels=8, aux_channels=8,
    )  # fmt: skip
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 90, 3)), ("b.jpg", (60, 90, 3)), ("b.png", (80, 50, 3))):
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(root / "photos" / name)
    return root


def files(folder):
    found = (path for path in folder.rglob("*.*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def test_all_of_a_classifier(root, tmp_path, capsys):
    (root / "photos/broken.png").write_bytes(b"nothing")
    written = look(root / "classifier", str(root / "photos"), tmp_path, compare=root / "causal")
    (root / "photos/broken.png").unlink()
    of_one = [
        "attention.npz", "attention.png", "features.npz", "features.png", "grad_cam.npz",
        "grad_cam.png", "token_weights.npz", "token_weights_stage1.png",
        "token_weights_stage2.png", "token_weights_stage3.png",
    ]  # fmt: skip
    expected = [f"{name}/{file}" for name in ("a", "b.jpg", "b.png") for file in of_one]
    assert files(tmp_path) == [*expected, "receptive_field.npz", "receptive_field.png"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in written) == files(tmp_path)
    said = capsys.readouterr().out
    assert "broken.png cannot be read: no known picture format" in said

    predictor = load_predictor(root / "classifier")
    model = predictor.module()
    seen = [seen_by(predictor, root / "photos" / name) for name in ("a.png", "b.jpg", "b.png")]
    weights = pictures.token_weights(model, seen[0].images)
    with np.load(tmp_path / "a/token_weights.npz") as saved:
        assert sorted(saved) == ["stage1", "stage2", "stage3"]
        for stage in range(3):
            np.testing.assert_array_equal(saved[f"stage{stage + 1}"], weights[stage][0])
    best = predictor(root / "photos/a.png")
    with np.load(tmp_path / "a/grad_cam.npz") as saved:
        assert saved["label"] == best.labels[0]
    assert f"a.png: Grad-CAM of class {best.names[0]}, logit" in said
    with np.load(tmp_path / "receptive_field.npz") as saved:
        field = np.mean([pictures.receptive_field(model, one.images) for one in seen], 0)
        np.testing.assert_allclose(saved["field1"], field, rtol=1e-4, atol=1e-9)
        for number, weights in ((1, "classifier"), (2, "causal")):
            field = saved[f"field{number}"]
            shares = [pictures.share_of_pixels(field, f) for f in (0.2, 0.3, 0.5, 0.99)]
            assert saved[f"shares{number}"].tolist() == shares
            assert f"{weights}, mean over 3: 20 % in {100 * shares[0]:.3g} %" in said
    for path in tmp_path.rglob("*.png"):
        if path.is_dir():
            continue
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_weights_that_are_not_finite_are_refused(root, tmp_path):
    module = family.build("vssd_nano", num_classes=3, rngs=nnx.Rngs(0), **TINY)
    state = {name: value * np.nan for name, value in get_state(module).items()}
    square = {"image_size": 64, "eval_crop": 1.0}
    write_folder(tmp_path / "nan", Weights("vssd_nano", 3, TINY, state, list(NAMES), square))
    for kind in ("token_weights", "attention", "features", "grad_cam"):
        with pytest.raises(UserError, match="not finite"):
            look(tmp_path / "nan", str(root / "photos/a.png"), tmp_path / "out", what=[kind])
    with pytest.raises(ValueError, match="not finite"):
        pictures.principal_components(np.full((1, 2, 2, 3), np.nan))


def test_a_class_a_stage_and_a_token(root, tmp_path, capsys):
    photo = str(root / "photos/a.png")
    options = {"what": ("grad_cam", "attention", "token_weights"), "token": (63, 5)}
    with pytest.raises(UserError, match="token_weights: stage 4 has no SSD mixer"):
        look(root / "classifier", photo, tmp_path, stage=4, **options)
    options["what"] = options["what"][:2]
    look(root / "classifier", photo, tmp_path, stage=4, label="cow", **options)
    with np.load(tmp_path / "a/grad_cam.npz") as cam, np.load(tmp_path / "a/attention.npz") as att:
        assert cam["label"] == 2
        assert cam["grad_cam"].shape == (2, 2)
        assert att["token"].tolist() == [0, 1]
        assert att["attention"].shape == (1, 2, 2, 2)
    look(root / "classifier", photo, tmp_path / "two", what=["grad_cam"], label="1", stage=2)
    with np.load(tmp_path / "two/a/grad_cam.npz") as cam:
        assert cam["label"] == 1
        assert cam["grad_cam"].shape == (8, 8)
    assert "Grad-CAM of class bee, logit" in capsys.readouterr().out


def test_a_detector_is_shown_without_its_padding(root, tmp_path, capsys):
    what = ["token_weights", "grad_cam", "receptive_field"]
    look(root / "detector", str(root / "photos/a.png"), tmp_path, what=what, box=2)
    # 60x90 pixels become 50x75, padded to 64x96.
    with np.load(tmp_path / "a/token_weights.npz") as saved:
        assert saved["stage2"].shape == (1, 7, 10, 2)
    with np.load(tmp_path / "a/grad_cam.npz") as saved:
        assert saved["grad_cam"].shape == (2, 3)
        score = float(saved["score"])
    with np.load(tmp_path / "receptive_field.npz") as saved:
        assert saved["field1"].shape == (50, 75)
    predictor = load_predictor(root / "detector")
    seen = seen_by(predictor, root / "photos/a.png")
    assert (seen.size, seen.images.shape) == ((50, 75), (1, 64, 96, 3))
    assert score == pytest.approx(predictor(root / "photos/a.png").scores[1], rel=1e-4)
    assert "Grad-CAM of object 2, " in capsys.readouterr().out
    Image.fromarray(np.full((20, 80, 3), 99, np.uint8)).save(tmp_path / "flat.png")
    look(root / "detector", str(tmp_path / "flat.png"), tmp_path, what=["attention"])
    with np.load(tmp_path / "flat/attention.npz") as saved:
        assert saved["attention"].shape == (1, 1, 3, 2)
        padding = 1 - saved["attention"][0].mean(-1).sum()
    assert f"{100 * padding:.3g} % of it on padding" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"grad_cam of a\.png: no such object is found"):
        look(root / "detector", str(root / "photos/a.png"), tmp_path, what=["grad_cam"], box=9)


@pytest.mark.slow
def test_a_segmentor_and_pictures_of_two_sizes(root, tmp_path, capsys):
    look(root / "segmentor", str(root / "photos"), tmp_path, what=["grad_cam", "receptive_field"])
    said = capsys.readouterr().out
    assert "mean logit" in said
    assert "2 of 3 pictures, those of 80x48 pixels" in said
    with np.load(tmp_path / "a/grad_cam.npz") as saved:
        label = int(saved["label"])
    result = load_predictor(root / "segmentor")(root / "photos/a.png")
    assert NAMES[label] == max(result.shares, key=result.shares.get)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ("classifier", {"what": ["tokens"]}, "unknown kind of picture 'tokens'"),
        ("classifier", {"stage": 5}, "stage=5 must be from 1 to 4"),
        ("classifier", {"stage": 0}, "stage=0 must be from 1 to 4"),
        ("classifier", {"label": "dog"}, "there is no class 'dog'"),
        ("classifier", {"label": "3"}, "there is no class 3: numbers go from 0 to 2"),
        ("classifier", {"compare": "nowhere"}, "nowhere"),
        ("classifier", {"box": 1}, "box=1 is for detectors"),
        ("classifier", {"token": (64, 3)}, "token 64,3 is outside of a.png, of which the model"),
        ("classifier", {"token": (1, 1), "what": ["features"]}, "token is for attention"),
        ("classifier", {"limit": 0}, "limit=0 must be at least 1"),
        ("causal", {"what": ["attention"]}, "attention: the model has no attention"),
        ("causal", {"token": (1, 1)}, "token is for attention, which is not among"),
        ("detector", {"label": "ant"}, "give its number by box"),
        ("detector", {"box": 0}, "box=0 must be at least 1"),
        ("nowhere", {}, "nowhere"),
    ],
)
def test_what_a_user_can_get_wrong(root, tmp_path, weights, options, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        look(root / weights, str(root / "photos/a.png"), tmp_path / "out", **options)
    assert not list(tmp_path.rglob("*.png"))


def test_pictures_and_outputs_that_cannot_be_used(root, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "file").touch()
    for source, output, message in (
        (tmp_path / "broken.png", tmp_path / "out", "broken.png cannot be read"),
        (tmp_path / "none.png", tmp_path / "out", "there is no file or folder"),
        (root / "photos/a.png", tmp_path / "file/out", "cannot be written"),
        (root / "photos", root / "photos", "is the folder of the pictures"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            look(root / "classifier", str(source), output, what=["features"])
