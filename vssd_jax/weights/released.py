"""The weights that the authors released, by model.

They are in the repository `YuhengSSS/VSSD` of the Hugging Face hub, and the names of the files are
those that the authors' README gives. None of them was downloaded while this was written: no
checksum is pinned, and what a file holds is checked when it is loaded.
"""

from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.models import family

REPO = "YuhengSSS/VSSD"

# Model -> tag -> file. The first tag is the default.
RELEASED: dict[str, dict[str, str]] = {
    "vssd_micro": {"imagenet": "vssd_micro_best.pth"},
    "vssd_tiny": {
        "imagenet": "vssd_tiny_best_ema.pth",
        "mesa": "vssd_tiny_e300_with_mesa.pth",
    },
    "vssd_small": {
        "imagenet": "vssd_small_best_ema.pth",
        "mesa": "vssd_small_e300_with_mesa.pth",
    },
    "vssd_base": {
        "imagenet": "vssd_base_best_ema.pth",
        "mesa": "vssd_base_e300_with_mesa.pth",
    },
    "mask_rcnn_vssd_micro": {
        "1x": "mask_rcnn_vssd_fpn_coco_micro.pth",
        "3x": "mask_rcnn_vssd_fpn_coco_micro_3x.pth",
    },
    "mask_rcnn_vssd_tiny": {
        "1x": "mask_rcnn_vssd_fpn_coco_tiny.pth",
        "3x": "mask_rcnn_vssd_fpn_coco_tiny_3x.pth",
    },
    # The authors' README links this one file for both schedules.
    "mask_rcnn_vssd_small": {
        "1x": "mask_rcnn_vssd_fpn_coco_small.pth",
        "3x": "mask_rcnn_vssd_fpn_coco_small.pth",
    },
    "upernet_vssd_micro": {
        "ade20k": "upernet_vssd_final_4xb4-160k_ade20k-512x512_micro.pth",
    },
    "upernet_vssd_tiny": {
        "ade20k": "upernet_vssd_4xb4-160k_ade20k-512x512_tiny.pth",
    },
}

# What the weights with a tag were trained on.
TRAINING_DATA = {
    "imagenet": "ImageNet-1K",
    "mesa": "ImageNet-1K, with MESA",
    "1x": "COCO 2017, 1x schedule",
    "3x": "COCO 2017, 3x schedule",
    "ade20k": "ADE20K",
}


def address(name: str, pretrained: bool | str = True) -> str:
    """The `hf://` address of a model's released weights.

    Says so where the authors' README links one file for several tags.

    Args:
      name: of the model.
      pretrained: the tag: "imagenet" or "mesa", "1x" or "3x", "ade20k"; True is the first that the
        model has.

    Raises:
      UserError: models and tags without a file.
    """
    family.find(name)
    files = RELEASED.get(name)
    if files is None:
        raise UserError(f"{name} has no released weights; {', '.join(RELEASED)} have")
    tag = next(iter(files)) if pretrained is True else pretrained
    if not isinstance(tag, str) or tag not in files:
        choices = " and ".join(repr(choice) for choice in files)
        raise UserError(f"{name} has no released weights {tag!r}, only {choices}")
    file = files[tag]
    shared = [other for other in files if files[other] == file]
    if len(shared) > 1:
        say(
            f"{file}: the authors' README links this one file for {' and '.join(shared)}; "
            "it does not say which of them its weights are"
        )
    return f"hf://{REPO}/{file}"


def tags(file: str) -> list[str]:
    """The tags of a file by its name or address; none if the authors have released no such file."""
    name = file.rpartition("/")[2]
    return [tag for files in RELEASED.values() for tag in files if files[tag] == name]
