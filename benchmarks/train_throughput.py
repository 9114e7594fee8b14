"""Training steps of the segmentor or the detector here against OpenMMLab's, in one run.

Both take batches of uint8 pictures and label maps, or boxes and masks, and do all that a training
run does with them on the device: normalisation, the model, its losses, gradients, AdamW.
mmsegmentation's UperNet and mmdet's Mask R-CNN have the PyTorch reference of this project for their
backbone, start from the same weights, and run in eager mode, as their own training does. They have
to be installed; mmcv-lite is enough, with torchvision for mmdet, whose RoIAlign and NMS are then
taken (benchmarks/mmcv_operations.py).

    python -m benchmarks.train_throughput --model nano --batch 2 --image-size 256    # CPU
    python -m benchmarks.train_throughput --model tiny --batch 16 --dtype bfloat16   # GPU
    python -m benchmarks.train_throughput --task detection --model nano --batch 2    # CPU

What differs in detection: shapes are fixed here, so that boxes are compared with `max_objects`
objects, of which six are there, and the mask head takes a quarter of the sampled regions of each
picture, positive or not; mmdet compares with six, and its mask head takes the positive ones alone.
Here masks come as bits, there as bytes. A step here also takes the norm of the gradient and leaves
the state as it is where that is not finite. Our batch lies on the device already; theirs goes
there within the step. Many threads of PyTorch wait for each other: on a busy CPU its figures fall
far more than ours, and only those of an idle one mean anything.
"""

import contextlib
import importlib.util
import math
import statistics
import warnings

import jax
import numpy as np
import torch

from benchmarks import common, mmcv_operations, real_step, timing
from benchmarks.segmentation_pipeline import mmseg_transforms
from torch_reference import vssd as reference
from vssd_jax.models import family, torch_names
from vssd_jax.models.detection.masks import PackedMasks, unpack_mask

NAMES = {"segmentation": "upernet_vssd_", "detection": "mask_rcnn_vssd_"}
CLASSES = {task: sizes[2] for task, sizes in real_step.SIZES.items()}
PIXELS = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def config_of(options):
    """The config of our run."""
    size, fields = options.image_size, {"batch_size": options.batch, "dtype": options.dtype}
    fields |= {"model": options.name, "implementation": options.implementation}
    if options.task == "segmentation":
        return real_step.config_of("upernet:micro", image_size=size, short_side=size, **fields)
    sides = size, size * 5 // 3  # 800 and 1333, as in COCO's schedules
    return real_step.config_of(
        "mask_rcnn:micro,1x",
        short_sides=sides[:1],
        long_side=sides[1],
        padded_shapes=(tuple(-(-side // 32) * 32 for side in sides),),
        batch_norm_images=options.batch,
        **fields,
    )


def ours(options):
    """A call of `depth` training steps, and of what they begin with.

    Returns:
      The call, the batch, the weights by PyTorch's names, the number of trainable parameters, and
      the first loss.
    """
    trainer, batch = real_step.training(config_of(options))
    state, key = trainer.fresh_state(), jax.random.key(0)
    arrays = {name: np.array(x) for name, x in (state.params | state.batch_stats).items()}
    weights = torch_names.to_torch(family.find(options.name)[0].torch_table, arrays)
    placed = next(trainer.device_batches(iter([batch])))
    step = trainer.program(state, placed)
    size = sum(value.size for value in state.params.values())
    state, metrics = step(state, placed, key)
    call = common.pipelined(lambda state: step(state, placed, key)[0], state, depth=options.depth)
    return call, batch, weights, size, float(metrics["loss"])


def backbone(options, registry):
    """The PyTorch reference as an entry of a registry, and the channels of its maps."""

    # A registry wants a type's name.
    class ReferenceVSSD(reference.VSSD):
        def __init__(self, name):
            config = reference.create_model(name, backbone=True).config
            super().__init__(config, backbone=True)

    registry.register_module(module=ReferenceVSSD, force=True)
    embed_dim = reference.VARIANTS[f"vssd_{options.model}"].embed_dim
    entry = {"type": "ReferenceVSSD", "name": f"vssd_{options.model}"}
    return entry, [embed_dim * 2**stage for stage in range(4)]


def segmentor(options, batch):
    """mmsegmentation's model, and the batch as it takes it."""
    from mmengine.structures import PixelData
    from mmseg.models import EncoderDecoder, SegDataPreProcessor
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    entry, maps = backbone(options, MODELS)
    widths = (32, 16) if options.model == "nano" else (512, 256)
    head = {
        "num_classes": CLASSES["segmentation"],
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    }

    def loss(weight):
        return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}

    model = EncoderDecoder(
        data_preprocessor=SegDataPreProcessor(
            size=(options.image_size, options.image_size), seg_pad_val=255, **PIXELS
        ),
        backbone=entry,
        decode_head={
            "type": "UPerHead",
            "in_channels": maps,
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": widths[0],
            "loss_decode": loss(1.0),
            **head,
        },
        auxiliary_head={
            "type": "FCNHead",
            "in_channels": maps[2],
            "in_index": 2,
            "channels": widths[1],
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": loss(0.4),
            **head,
        },
        train_cfg={},
        test_cfg={"mode": "whole"},
    )
    samples = []
    for label in batch["label"]:
        sample = SegDataSample(metainfo={"img_shape": label.shape})
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(label[None].astype(np.int64)))
        samples.append(sample)
    return model, {"inputs": [*map(pixels, batch["image"])], "data_samples": samples}


def detector(options, batch):
    """mmdet's model, and the batch as it takes it."""
    from mmdet.models import DetDataPreprocessor, MaskRCNN
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    sizes = family.make_config(options.name)
    channels, classes = sizes.fpn_channels, CLASSES["detection"]
    entry, maps = backbone(options, MODELS)

    def coder(*stds):
        return {"type": "DeltaXYWHBBoxCoder", "target_stds": stds}

    def extractor(bins):
        return {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": bins, "sampling_ratio": 0},
            "out_channels": channels,
            "featmap_strides": [4, 8, 16, 32],
        }

    def chosen(positive, negative, count, share, **more):
        """How a loss chooses its boxes."""
        return {
            "assigner": {
                "type": "MaxIoUAssigner", "pos_iou_thr": positive, "neg_iou_thr": negative,
                "min_pos_iou": negative, "match_low_quality": True, "ignore_iof_thr": -1,
            },
            "sampler": {
                "type": "RandomSampler", "num": count, "pos_fraction": share, "neg_pos_ub": -1,
                "add_gt_as_proposals": more.pop("objects"),
            },
            "pos_weight": -1, "debug": False, **more,
        }  # fmt: skip

    l1 = {"type": "L1Loss", "loss_weight": 1.0}
    model = MaskRCNN(
        data_preprocessor=DetDataPreprocessor(pad_mask=True, pad_size_divisor=32, **PIXELS),
        backbone=entry,
        neck={"type": "FPN", "in_channels": maps, "out_channels": channels, "num_outs": 5},
        rpn_head={
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [sizes.anchor_scale],
                "ratios": list(sizes.anchor_ratios),
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
            "loss_bbox": l1,
        },
        roi_head={
            "type": "StandardRoIHead",
            "bbox_roi_extractor": extractor(7),
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": channels,
                "fc_out_channels": sizes.box_channels,
                "roi_feat_size": 7,
                "num_classes": classes,
                "bbox_coder": coder(0.1, 0.1, 0.2, 0.2),
                "reg_class_agnostic": False,
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
                "loss_bbox": l1,
            },
            "mask_roi_extractor": extractor(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": channels,
                "conv_out_channels": channels,
                "num_classes": classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True},
            },
        },
        train_cfg=ConfigDict(
            rpn=chosen(
                0.7, 0.3, sizes.rpn_samples, sizes.rpn_positive_fraction,
                objects=False, allowed_border=-1,
            ),
            rpn_proposal={
                "nms_pre": sizes.rpn_pre_nms_train,
                "max_per_img": sizes.rpn_proposals,
                "nms": {"type": "nms", "iou_threshold": sizes.rpn_nms_iou},
                "min_bbox_size": 0,
            },
            rcnn=chosen(
                0.5, 0.5, sizes.roi_samples, sizes.roi_positive_fraction,
                objects=sizes.roi_add_objects, mask_size=28,
            ),
        ),
        test_cfg=ConfigDict(rpn={}, rcnn={}),
    )  # fmt: skip
    images, samples = [], []
    for i, (height, width) in enumerate(batch["image_shape"].tolist()):
        images.append(pixels(batch["image"][i, :height, :width]))
        packed = PackedMasks(*(batch[name][i] for name in ("masks", "mask_starts", "mask_boxes")))
        there = np.flatnonzero(batch["valid"][i])
        masks = [np.asarray(unpack_mask(packed, j, (height, width))) for j in there]
        sample = DetDataSample(metainfo={"img_shape": (height, width)})
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(batch["boxes"][i, there]),
            labels=torch.from_numpy(batch["labels"][i, there].astype(np.int64)),
            masks=BitmapMasks(np.stack(masks), height, width),
        )
        samples.append(sample)
    return model, {"inputs": images, "data_samples": samples}


def pixels(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def theirs(options, model, data, weights, device):
    """A call of `depth` training steps of a model of OpenMMLab from `weights`; the first loss."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    counters = {name: x for name, x in model.state_dict().items() if name.endswith("_tracked")}
    model.load_state_dict(tensors | counters)
    model = model.to(device, memory_format=torch.channels_last).train()
    # As in our warmup's first steps: what is proposed should not change while it is measured.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=0.05)
    dtype = getattr(torch, options.dtype)
    mixed = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)

    def step():
        inputs = model.data_preprocessor(data, True)
        with mixed:
            losses = model(**inputs, mode="loss")
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return total

    def call():
        for _ in range(options.depth):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call, step().item()


def available(task):
    """The name of the project to compare with, and whose RoIAlign and NMS it has."""
    if task == "segmentation":
        if mmseg_transforms() is None:
            raise SystemExit("mmsegmentation is missing: pip install mmsegmentation mmcv-lite")
        return "mmsegmentation", None
    try:
        if importlib.util.find_spec("mmdet") is not None:
            return "mmdet", mmcv_operations.make_available()
    except ModuleNotFoundError as error:
        raise SystemExit(f"mmdet needs {error.name}: pip install {error.name}") from error
    raise SystemExit("mmdet is missing: pip install mmdet mmcv-lite torchvision")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--task", default="segmentation", choices=list(NAMES))
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny or small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=512,
                        help="side of the crops; of detection the short one, and 5/3 the long one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", help="of our kernels; the default is the device's best")
    parser.add_argument("--depth", type=int, help="steps between two waits (1, on a GPU 10)")
    options = common.parse(parser, model="nano", batch=2, image_size=256, dtype="float32")
    gpu = jax.default_backend() == "gpu"
    options.depth = options.depth or (10 if gpu else 1)
    options.name = NAMES[options.task] + options.model
    warnings.filterwarnings("ignore", module="mmseg|mmdet|mmcv|mmengine")
    other, operations = available(options.task)
    if operations:
        print(f"{other} with the RoIAlign and NMS of {operations}")
    our_call, batch, weights, size, our_loss = ours(options)
    make = {"segmentation": segmentor, "detection": detector}[options.task]
    model, data = make(options, batch)
    their_size = sum(x.numel() for x in model.parameters() if x.requires_grad)
    if size != their_size:
        raise AssertionError(f"{size} parameters here, {their_size} in {other}")
    their_call, their_loss = theirs(options, model, data, weights, "cuda" if gpu else "cpu")
    # Up to the random choice of what counts: features that drop out, regions of the background.
    if not math.isclose(our_loss, their_loss, rel_tol=0.03):
        raise AssertionError(f"the first loss is {our_loss} here, {their_loss} in {other}")
    calls = {"vssd_jax": our_call, other: their_call}
    times = timing.measure(calls, rounds=options.rounds, seconds=options.seconds)
    rows = []
    for name, values in times.items():
        common.add(rows, {
            "implementation": name,
            "images/s": options.batch * options.depth / statistics.median(values),
            "vssd_jax is faster by": timing.median_ratio(values, times["vssd_jax"]),
        }, options)
    common.report(
        options,
        rows,
        parameters=size,
        image_shape=batch["image"].shape[1:3],
        operations=operations,
        first_losses=[our_loss, their_loss],
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
