"""torchvision's RoIAlign and NMS in place of mmcv's compiled ones, which mmcv-lite lacks.

mmcv's own Python around them stays. Both projects' kernels do the same: bins with as many samples
as a region needs, and suppression of boxes in the order of their scores.
"""

import importlib.util
import sys
import types

import torch


class _Extension(types.ModuleType):
    """Stands in for `mmcv._ext`; what it has no replacement for fails when it is called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_, **__):
            raise NotImplementedError(f"mmcv is installed without its operation {name}")

        return missing


def make_available() -> str:
    """Makes `mmcv.ops` importable; returns whose RoIAlign and NMS it then has.

    Raises:
      ModuleNotFoundError: neither mmcv's compiled operations nor torchvision are installed.
    """
    if importlib.util.find_spec("mmcv._ext") is not None:
        return "mmcv"
    import torchvision  # registers `torch.ops.torchvision`

    extension = _Extension("mmcv._ext")
    extension.nms = _nms
    extension.roi_align_forward = _roi_align_forward
    extension.roi_align_backward = _roi_align_backward
    sys.modules["mmcv._ext"] = extension
    return f"torchvision {torchvision.__version__}"


def _nms(boxes, scores, *, iou_threshold, offset):
    if offset:
        raise NotImplementedError("torchvision's NMS has no offset of a pixel")
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def _roi_align_forward(
    maps, regions, output, _y, _x, *,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
):  # fmt: skip
    if pool_mode != 1:
        raise NotImplementedError("torchvision's RoIAlign takes means only")
    # In float32: its GPU kernels have no bfloat16.
    result = torch.ops.torchvision.roi_align(
        maps.float(), regions.float(), spatial_scale, aligned_height, aligned_width,
        sampling_ratio, aligned,
    )  # fmt: skip
    output.set_(result.to(output.dtype))  # mmcv's kernels fill what they are given: no copy either


def _roi_align_backward(
    gradient, regions, _y, _x, output, *,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
):  # fmt: skip
    result = torch.ops.torchvision._roi_align_backward(
        gradient.float(), regions.float(), spatial_scale, aligned_height, aligned_width,
        *output.shape, sampling_ratio, aligned,
    )  # fmt: skip
    output.set_(result.to(output.dtype))
