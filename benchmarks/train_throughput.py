"""Training steps of the segmentor here against mmsegmentation's, in one run.

Both take batches of uint8 pictures and label maps and do all that a training run does with them on
the device: normalisation, UperNet with its auxiliary head, the loss at the size of the pictures,
gradients, AdamW. mmsegmentation has the PyTorch reference of this project for its backbone, and
runs in eager mode, as its own training does. It has to be installed (mmcv-lite is enough).

    python -m benchmarks.train_throughput --model nano --batch 2 --image-size 256    # CPU
    python -m benchmarks.train_throughput --model tiny --batch 16 --dtype bfloat16   # GPU
"""

import contextlib
import statistics
import warnings

import jax
import numpy as np
import torch

from benchmarks import common, real_step
from benchmarks.segmentation_pipeline import mmseg_transforms
from torch_reference import vssd as reference

CLASSES = 150


def ours(options):
    """A call of one training step, the number of trainable parameters, and the batch."""
    config = real_step.config_of(
        "upernet:micro",
        model=f"upernet_vssd_{options.model}",
        batch_size=options.batch,
        image_size=options.image_size,
        short_side=options.image_size,
        dtype=options.dtype,
        implementation=options.implementation,
    )
    trainer, batch = real_step.training(config)
    state, key = trainer.fresh_state(), jax.random.key(0)
    size = sum(value.size for value in state.params.values())
    placed = next(trainer.device_batches(iter([batch])))
    step = trainer.program(state, placed)
    call = common.pipelined(lambda state: step(state, placed, key)[0], state, depth=options.depth)
    return call, size, batch


def theirs(options, widths, batch, device):
    """The same of mmsegmentation; `widths` are the channels of the decoder and auxiliary head."""
    from mmengine.structures import PixelData
    from mmseg.models import EncoderDecoder, SegDataPreProcessor
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    # Its registry wants a type's name.
    class ReferenceVSSD(reference.VSSD):
        def __init__(self, name):
            config = reference.create_model(name, backbone=True).config
            super().__init__(config, backbone=True)

    MODELS.register_module(module=ReferenceVSSD, force=True)
    embed_dim = reference.VARIANTS[f"vssd_{options.model}"].embed_dim
    maps = [embed_dim * 2**stage for stage in range(4)]
    head = {
        "num_classes": CLASSES,
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    }

    def loss(weight):
        return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}

    model = EncoderDecoder(
        data_preprocessor=SegDataPreProcessor(
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            size=(options.image_size, options.image_size),
            seg_pad_val=255,
        ),
        backbone={"type": "ReferenceVSSD", "name": f"vssd_{options.model}"},
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
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)
    images = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in batch["image"]]
    samples = []
    for label in batch["label"]:
        sample = SegDataSample(metainfo={"img_shape": label.shape})
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(label[None].astype(np.int64)))
        samples.append(sample)
    dtype = getattr(torch, options.dtype)
    mixed = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)

    def call():
        for _ in range(options.depth):
            data = model.data_preprocessor({"inputs": images, "data_samples": samples}, True)
            with mixed:
                losses = model(**data, mode="loss")
            total, _ = model.parse_losses(losses)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call, sum(parameter.numel() for parameter in model.parameters())


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny or small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", help="of our kernels; the default is the device's best")
    parser.add_argument("--depth", type=int, help="steps between two waits (1, on a GPU 10)")
    options = common.parse(parser, model="nano", batch=2, image_size=256, dtype="float32")
    gpu = jax.default_backend() == "gpu"
    options.depth = options.depth or (10 if gpu else 1)
    warnings.filterwarnings("ignore", module="mmseg|mmcv|mmengine")
    if mmseg_transforms() is None:
        raise SystemExit("mmsegmentation is not installed: pip install mmsegmentation mmcv-lite")
    our_call, our_size, batch = ours(options)
    widths = (32, 16) if options.model == "nano" else (512, 256)
    their_call, their_size = theirs(options, widths, batch, "cuda" if gpu else "cpu")
    if our_size != their_size:
        raise AssertionError(f"{our_size} parameters here, {their_size} in mmsegmentation")
    calls = {"vssd_jax": our_call, "mmsegmentation": their_call}
    times = common.measure(calls, rounds=options.rounds, seconds=options.seconds)
    rows = []
    for name, values in times.items():
        common.add(rows, {
            "implementation": name,
            "images/s": options.batch * options.depth / statistics.median(values),
            "vssd_jax is faster by": common.median_ratio(values, times["vssd_jax"]),
        }, options)
    common.report(
        options,
        rows,
        parameters=our_size,
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
