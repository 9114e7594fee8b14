"""VSSD here against the plain PyTorch reference, in one run, in turns.

Every measurement is a fresh process, and they take turns: PyTorch must not have this project's use
of memory, and on a virtual machine the memory of a process that has waited for another one, say for
a minute of compilation, can be a fifth slower from then on. PyTorch is channels-last and has
automatic mixed precision: in eager mode, on a CPU also with this project's use of memory (glibc
keeps what is freed), and under torch.compile, which on a CPU needs a C++ compiler and minutes
(`--torch eager` leaves it out).

    python -m benchmarks.compare_torch --batch 8 --dtype float32             # CPU
    python -m benchmarks.compare_torch --batch 128 --dtype bfloat16          # GPU
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

# This process only waits: the device's memory is for the others.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import common, timing


def measured(name: str, options, gpu: bool) -> dict | None:
    """What a process of `benchmarks.steps` says; None, and a line, where torch.compile fails."""
    fields = {**common.settings(options), "name": name, "gpu": gpu}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps", json.dumps(fields)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
    )
    result = json.loads(ended.stdout)
    if "error" not in result:
        return result
    if name != "torch compile":
        raise RuntimeError(f"{name}: {result['error']}")
    print(f"torch.compile does not work here: {result['error']}", flush=True)
    return None


def main():
    gpu = jax.default_backend() == "gpu"
    modes = ["eager", "compile"] if gpu else ["eager", "eager, memory kept", "compile"]
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="nano, micro, tiny, small or base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", help="of our kernels; the default is the device's best")
    parser.add_argument("--tasks", nargs="+", default=["inference", "training"])
    parser.add_argument("--torch", nargs="+", choices=modes, default=modes, help="modes of PyTorch")
    parser.add_argument("--processes", type=int, default=1 if gpu else 3,
                        help="of each implementation; the median of their medians counts")
    parser.add_argument("--depth", type=int, default=10 if gpu else 1,
                        help="steps between two waits")
    options = parser.parse_args()

    names = ["vssd_jax", *(f"torch {mode}" for mode in options.torch)]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(options.processes):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name not in results:
                continue
            if (result := measured(name, options, gpu)) is None:
                del results[name]
                continue
            results[name].append(result)
            said = {task: f"{statistics.median(x):.4g} s" for task, x in result["times"].items()}
            print(name, *(f"{task} {time}" for task, time in said.items()), flush=True)
    rows = []
    for task in options.tasks:
        times = {
            name: [statistics.median(result["times"][task]) for result in found]
            for name, found in results.items()
        }
        for name, values in times.items():
            common.add(rows, {
                "task": task,
                "implementation": name,
                "images/s": options.batch * options.depth / statistics.median(values),
                "vssd_jax is faster by": timing.median_ratio(values, times["vssd_jax"]),
            }, options)
    about = [result for name, found in results.items() if name != "vssd_jax" for result in found]
    versions = {key: value for key, value in about[0].items() if key != "times"} if about else {}
    common.report(options, rows, **versions)


if __name__ == "__main__":
    main()
