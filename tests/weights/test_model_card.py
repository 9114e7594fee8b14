import pytest
from huggingface_hub import ModelCard

from vssd_jax.weights.model_card import model_card


def config(model="vssd_nano", num_classes=3, **more):
    return {"model": model, "num_classes": num_classes, "overrides": {}, **more}


def test_a_classifier():
    text = model_card(
        config(
            overrides={"mixers": ["ssd", "ssd", "ncssd", "attention"]},
            class_names=["tench", "a|b", "snake_*"],
            preprocessing={"image_size": 224, "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
            metrics={"val/top1": 82.5, "corrupted": {"blur": 0.25}, "note": "x", "nan": None},
            dataset="my_pets",
        ),
        "hf://someone/pets@v1",
        license="apache-2.0",
    )
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.to_dict()["library_name"] == "vssd_jax"
    assert {"vssd_jax", "jax"} <= set(card.data.tags)
    assert card.data.model_name == "pets"
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "val/top1": 82.5,
        "corrupted/blur": 0.25,
    }
    assert results["val/top1"].metric_type == "accuracy"
    assert results["val/top1"].dataset_name == "my_pets"
    for part in (
        "# pets\n",
        "https://arxiv.org/abs/2407.18559",
        "| parameters | ",
        'create_model("vssd_nano", weights="hf://someone/pets@v1")',
        "predict.py --weights hf://someone/pets@v1 --input photos/ --output predictions/",
        "| image\\_size | 224 |",
        "| mean | \\[0.5, 0.5, 0.5\\] |",
        "| interpolation | bicubic |",
        "| val/top1 | 82.5 |",
        "tench, a\\|b, snake\\_\\*",
        "config calls my\\_pets.",
        "Of the weights: apache-2.0.",
    ):
        assert part in card.text, part
    assert "<details>" not in text


def test_what_is_not_known_is_left_out_or_said():
    card = ModelCard(model_card(config(), "hf://someone/a"))
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "model-index" not in str(card)
    assert "Not recorded with the weights." in card.text
    assert "Of the weights: not stated." in card.text
    for title in ("Preprocessing", "Metrics", "Classes"):
        assert f"## {title}" not in card.text


def test_many_classes_are_folded():
    names = [f"kind {i}" for i in range(51)]
    text = model_card(config(num_classes=51, class_names=names), "hf://someone/a")
    assert "<summary>51 classes</summary>" in text
    assert all(name in text for name in names)


def test_the_authors_weights():
    source = "hf://YuhengSSS/VSSD/vssd_tiny_e300_with_mesa.pth"
    text = model_card(config("vssd_tiny", 1000, source=source), "hf://someone/a")
    assert "ImageNet-1K, with MESA, by the authors" in text
    assert "| parameters | 24,270,724 |" in text


@pytest.mark.parametrize(
    ("model", "num_classes", "tag", "call"),
    [
        ("vssd_nano", 0, "image-feature-extraction", "features = model(images)"),
        ("mask_rcnn_vssd_nano", 3, "object-detection", "model.predict(images, shapes)"),
        ("upernet_vssd_nano", 3, "image-segmentation", "model(images)[0]"),
    ],
)
def test_tasks(model, num_classes, tag, call):
    card = ModelCard(model_card(config(model, num_classes), "hf://someone/a"))
    assert card.data.pipeline_tag == tag
    assert call in card.text
