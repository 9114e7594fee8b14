"""The PyTorch side of `compare_torch`, in a process of its own.

    python -m benchmarks.pytorch '{"model": "tiny", "mode": "eager", ...}'

It reads lines with the name of a task ("inference", "training"), runs it and answers with a line:
empty, or why it failed.
"""

import contextlib
import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch

from torch_reference import vssd as reference
from vssd_jax.host import keep_freed_memory


def calls(options):
    """Functions that run inference and training steps of the PyTorch reference, and wait."""
    create = functools.partial(
        reference.create_model, f"vssd_{options.model}", num_classes=1000  # as VSSD has
    )
    device = options.device
    inference = create().to(device).eval()
    training = create().to(device)
    size = options.image_size
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((options.batch, 3, size, size), np.float32))
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(rng.integers(0, 1000, options.batch)).to(device)
    optimizer = torch.optim.AdamW(
        training.parameters(), lr=1e-4, weight_decay=0.05, fused=device == "cuda"
    )
    if options.mode == "compile":
        inference, training = torch.compile(inference), torch.compile(training)
    dtype = getattr(torch, options.dtype)

    def mixed():
        return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def infer():
        with torch.no_grad(), mixed():
            for _ in range(options.depth):
                inference(x)
        wait()

    def train():
        for _ in range(options.depth):
            optimizer.zero_grad(set_to_none=True)
            with mixed():
                loss = torch.nn.functional.cross_entropy(training(x).float(), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(training.parameters(), 5.0)
            optimizer.step()
        wait()

    return {"inference": infer, "training": train}


def main():
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever PyTorch prints is no answer
    if options.mode == "eager, memory kept":
        keep_freed_memory()
    tasks = calls(options)
    about = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        answer = ""
        try:
            tasks[line.strip()]()
        except Exception as error:
            answer = (str(error) or repr(error)).splitlines()[0]
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
