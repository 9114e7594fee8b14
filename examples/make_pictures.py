"""Draws docs/first_look.jpg: what a detector finds in scenes of digits, and its token weights.

    python train.py --config configs/digits_detection.py
    python examples/make_pictures.py --weights runs/digits_detection --output docs/first_look.jpg

Two held-out scenes with the objects found (scores of at least 0.5), two photographs that come with
scikit-learn (china.jpg by danielbuechele and flower.jpg by vultilion, CC BY 2.0), and below each
its token weights: of stage 2, the last block, the head whose weights vary most. The detector knows
digits alone; the photographs show what its state takes from pictures of another kind.
"""

import argparse

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

import vssd_jax
from vssd_jax.data.drawing import contact_sheet
from vssd_jax.data.heat_maps import viridis
from vssd_jax.data.normalization import normalize
from vssd_jax.data.scenes import make_scene
from vssd_jax.inference import pictures
from vssd_jax.inference.predictor import Predictor

SCENES = (4, 8)  # seeds
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
STAGE = 1  # the second
SIZE = (300, 240)  # of a tile: width and height
OVER = 0.75  # of the colour over the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="runs/digits_detection", help="of a detector")
    parser.add_argument("--output", default="docs/first_look.jpg")
    options = parser.parse_args()
    predictor = vssd_jax.load_predictor(options.weights)
    above, below = [], []
    for seed in SCENES:
        image, _ = make_scene(np.random.default_rng(seed), split="test")
        found = predictor(image)
        drawn = found.draw(image, class_names=predictor.class_names, min_score=0.5)
        above.append((drawn.resize(SIZE), ["found in a scene of digits"]))
        below.append((token_weights(predictor, image), ["its token weights"]))
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(load_sample_image(name)).crop((53, 0, 587, 427))
        image = np.asarray(photograph.resize((400, 320), Image.Resampling.LANCZOS))
        above.append((Image.fromarray(image).resize(SIZE), [f"{name[:-4]}, a photograph"]))
        below.append((token_weights(predictor, image), ["its token weights"]))
    sheet = contact_sheet(above + below, columns=4, tile=SIZE[0])
    sheet.save(options.output, quality=88)
    print(f"{options.output}: {sheet.width}x{sheet.height}")


def token_weights(predictor: Predictor, image: np.ndarray) -> Image.Image:
    """The weights over the (H, W, 3) uint8 picture, from least (dark) to most (bright)."""
    fields = predictor.preprocessing
    images = normalize(image, fields["mean"], fields["std"])[None]
    maps = pictures.token_weights(predictor.module(), images)[STAGE][0, -1]  # (h, w, heads)
    share = maps / maps.max((0, 1))
    weights = share[..., share.std((0, 1)).argmax()]
    weights = (weights - weights.min()) / np.ptp(weights)
    colors = Image.fromarray(viridis(weights)).resize(SIZE, Image.Resampling.NEAREST)
    grey = Image.fromarray(image).convert("L").convert("RGB").resize(SIZE)
    return Image.blend(grey, colors, OVER)


if __name__ == "__main__":
    main()
