"""onnxruntime beside this project and PyTorch on a CPU, in one run.

    python -m benchmarks.deploy --model micro --json benchmarks/results/deploy_cpu.json

The forward pass of a classifier: the exported file under onnxruntime, compiled by JAX, and the
plain PyTorch reference in eager mode, whose random weights are others. All have the same number of
threads.
"""

import argparse
import functools
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import torch

from benchmarks import common, timing
from torch_reference import vssd as reference
from vssd_jax.host import compiler_options
from vssd_jax.inference.export_onnx import export_onnx
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.weights.folder import Weights, write_folder


def calls(options: argparse.Namespace) -> tuple[dict, dict]:
    """Functions of images that run one forward pass each, by name; and sizes of files."""
    name = f"vssd_{options.model}"
    model = SplitModel(lambda rngs: family.build(name, rngs=rngs))
    params, statistics_ = model.init(jax.random.key(0))
    arrays = {**params, **statistics_}
    with tempfile.TemporaryDirectory() as folder:
        held = {name: np.asarray(value) for name, value in arrays.items()}
        write_folder(Path(folder) / "weights", Weights(name, 1000, {}, held))
        path = export_onnx(
            Path(folder) / "weights", Path(folder) / "model.onnx", size=options.image_size
        )
        size = path.stat().st_size
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
    compiled = jax.jit(
        lambda arrays, images: model.merge(arrays, training=False)(images),
        compiler_options=compiler_options(),
    )
    theirs = reference.create_model(name).eval()

    def run_torch(images: np.ndarray) -> None:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels last in memory
        with torch.inference_mode():
            theirs(x)

    return {
        "vssd_jax": lambda images: compiled(arrays, images).block_until_ready(),
        "onnxruntime": lambda images: session.run(None, {"images": images}),
        "torch eager": run_torch,
    }, {"onnx_bytes": size}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="micro", help="nano, micro, tiny, small or base")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    ways, sizes = calls(options)
    rows = []
    for batch in options.batches:
        images = np.array(common.batch(batch, options.image_size)[0])
        ready = {way: functools.partial(call, images) for way, call in ways.items()}
        times = timing.measure(ready, rounds=options.rounds, seconds=options.seconds)
        for way, values in times.items():
            rows.append({
                "batch": batch,
                "implementation": way,
                "ms": 1e3 * statistics.median(values),
                "images/s": batch / statistics.median(values),
                "vssd_jax is faster by": timing.median_ratio(values, times["vssd_jax"]),
            })
    common.report(
        options, rows, onnxruntime=onnxruntime.__version__, torch=torch.__version__,
        threads=torch.get_num_threads(), **sizes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
