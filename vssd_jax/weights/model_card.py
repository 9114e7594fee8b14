"""Model cards: the README.md of a weights folder on the Hugging Face hub."""

import html
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx

from vssd_jax.models import family
from vssd_jax.models.count import count_parameters
from vssd_jax.models.family import Detector, Segmentor
from vssd_jax.weights import hub, released

PAPER = "https://arxiv.org/abs/2407.18559"
TITLE = "VSSD: Vision Mamba with Non-Causal State Space Duality"
# More names than this are folded away.
_SHOWN = 50
# The hub's own names for metrics.
_METRIC_TYPES = {"top1": "accuracy", "miou": "mean_iou"}


class _Task(NamedTuple):
    tag: str  # the hub's name
    text: str
    call: str  # in the example


_FEATURES = _Task(
    "image-feature-extraction",
    "image features",
    "features = model(images)  # (B, H, W, 3) float32, preprocessed -> (B, C)",
)
_CLASSIFICATION = _Task(
    "image-classification",
    "image classification",
    "logits = model(images)  # (B, H, W, 3) float32, preprocessed -> (B, {classes})",
)
_DETECTION = _Task(
    "object-detection",
    "object detection and instance segmentation",
    "found = model.predict(images, shapes)  # (B, H, W, 3) padded, (B, 2) sizes without padding",
)
_SEGMENTATION = _Task(
    "image-segmentation",
    "semantic segmentation",
    "logits = model(images)[0]  # (B, H, W, 3) float32, preprocessed -> (B, H', W', {classes})",
)


def model_card(config: Mapping[str, Any], address: str, *, license: str | None = None) -> str:
    """The text of the card, with the metadata that the hub reads before it.

    Args:
      config: the content of a weights folder's `config.json`. Of its optional parts the card shows
        `class_names`, `preprocessing` (settings by name), `metrics` (numbers by name, perhaps in
        groups), `dataset` and `source`.
      address: `hf://owner/name[@revision]`, where the card's examples read the weights.
      license: of the weights, by the hub's identifier, as "apache-2.0".
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    model, num_classes = config["model"], config["num_classes"]
    name = hub.parse(address).repo.partition("/")[2]
    module = family.abstract(
        lambda rngs: family.build(
            model, num_classes=num_classes, rngs=rngs, **config.get("overrides", {})
        )
    )
    task = _task(module, num_classes)
    metrics = dict(_numbers(config.get("metrics") or {}))
    is_vssd = "vssd" in model
    data = ModelCardData(
        license=license,
        library_name="vssd_jax",
        pipeline_tag=task.tag,
        tags=["vssd_jax", "jax", *(["arxiv:2407.18559"] if is_vssd else [])],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task.tag,
                dataset_type=str(config.get("dataset", "unknown")),
                dataset_name=str(config.get("dataset", "unknown")),
                metric_type=_METRIC_TYPES.get(last := metric.rpartition("/")[2], last),
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    parts = [
        f"# {name}",
        _summary(config, count_parameters(module), task, is_vssd),
        _usage(model, num_classes, task, address),
        _section("Preprocessing", _table("setting", config.get("preprocessing"))),
        _section("Metrics", _table("metric", metrics)),
        _section("Classes", _classes(config.get("class_names"))),
        _section("Training data", _training_data(config)),
        _section("Licence", _licence(license)),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _task(module: nnx.Module, num_classes: int) -> _Task:
    if isinstance(module, Detector):
        return _DETECTION
    if isinstance(module, Segmentor):
        return _SEGMENTATION
    return _CLASSIFICATION if num_classes else _FEATURES


def _numbers(metrics: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers with their names; those of a group as `group/name`."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{group}{name}/")
        elif type(value) in (int, float) and math.isfinite(value):
            yield f"{group}{name}", value


def _summary(config: Mapping[str, Any], parameters: int, task: _Task, is_vssd: bool) -> str:
    classes = config["num_classes"]
    rows = {
        "model": f"`{config['model']}`",
        "task": task.text,
        "parameters": f"{parameters:,}",
        "classes": str(classes) if classes else "no head",
    }
    if config.get("overrides"):
        rows["config fields that differ"] = _plain(config["overrides"])
    after = f" Its architecture is that of [{TITLE}]({PAPER})." if is_vssd else ""
    head = f"Weights of `{config['model']}` for vssd_jax, a JAX library.{after}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{head}\n\n| | |\n| --- | --- |\n{table}"


def _usage(model: str, num_classes: int, task: _Task, address: str) -> str:
    call = task.call.format(classes=num_classes)
    return f"""## Use

```python
import vssd_jax

model = vssd_jax.create_model("{model}", weights="{address}")
{call}
```

```
python predict.py --weights {address} --input photos/ --output predictions/
```"""


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: str, values: Any) -> str:
    if not isinstance(values, Mapping) or not values:
        return ""
    rows = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in values.items())
    return f"| {head} | value |\n| --- | --- |\n{rows}"


def _classes(names: list[str] | None) -> str:
    if not names:
        return ""
    text = ", ".join(_plain(name) for name in names)
    if len(names) <= _SHOWN:
        return text
    return f"<details>\n<summary>{len(names)} classes</summary>\n\n{text}\n\n</details>"


def _training_data(config: Mapping[str, Any]) -> str:
    source = str(config.get("source", ""))
    if tags := released.tags(source):
        data = " or ".join(released.TRAINING_DATA[tag] for tag in tags)
        return (
            f"{data}, by the authors of the paper: the weights come from a file of the name "
            f"`{source.rpartition('/')[2]}`, which is one that they released."
        )
    if config.get("dataset"):
        return f"The dataset that the training's config calls {_plain(config['dataset'])}."
    return "Not recorded with the weights."


def _licence(license: str | None) -> str:
    weights = _plain(license) if license else "not stated"
    return f"Of the weights: {weights}. Of the code, vssd_jax: Apache-2.0."


def _plain(value: Any) -> str:
    """A value as one line of Markdown that means nothing but its characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{mark}" if mark in "\\`*_[]|~" else mark for mark in text)
