"""What the benchmarks share: timing, the steps that are timed, tables and JSON."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vssd_jax.host import compiler_options, cores, prepare_cpu
from vssd_jax.models.layers import round_kernels

prepare_cpu()


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--rounds", type=int, default=5, help="timed rounds; the median counts")
    result.add_argument("--seconds", type=float, default=1.0, help="least length of a round")
    result.add_argument("--json", type=Path, help="file for the results")
    result.add_argument("--lines", type=Path,
                        help="file to which each result is added as soon as it is there")
    return result


def parse(parser: argparse.ArgumentParser, **on_cpu) -> argparse.Namespace:
    """The options; `on_cpu` are the defaults without a GPU, so small that a minute is enough."""
    if jax.default_backend() != "gpu":
        parser.set_defaults(rounds=3, seconds=0.2, **on_cpu)
    return parser.parse_args()


def machine() -> dict:
    """What the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "cpu": cpu,
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def commit() -> str:
    """Of this checkout, with a + where files differ; empty where there is no Git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def pipelined(step, state, *, depth: int = 1):
    """A call that runs `step(state) -> state` `depth` times and waits for the last result.

    One wait for several steps keeps the host's launch overhead out of a GPU's figures, as in a
    training loop.
    """
    box = [state]

    def call():
        for _ in range(depth):
            box[0] = step(box[0])
        jax.block_until_ready(box[0])

    return call


def inference_step(model: nnx.Module):
    """A jitted `(state, images) -> logits` of `model`, and its state as predictions keep it."""
    model.eval()
    round_kernels(model)
    graphdef, state = nnx.split(model)

    def step(state, images):
        return nnx.merge(graphdef, state)(images)

    return jax.jit(step, compiler_options=compiler_options()), state


def batch(size: int, image_size: int, *, classes: int = 1000, dtype=jnp.float32):
    """Random images (B, S, S, 3) and labels (B,)."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, image_size, image_size, 3), np.float32)
    return jnp.asarray(images, dtype), jnp.asarray(rng.integers(0, classes, size))


def table(rows: list[dict]) -> str:
    """The rows as aligned columns; the keys of the first row are the headings."""
    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    heads = list(rows[0])
    cells = [heads] + [[text(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def add(rows: list[dict], row: dict, options: argparse.Namespace) -> None:
    """Appends the row and prints it: something to see while the others are measured.

    With --lines it is also added to that file, as a line of JSON with what it was measured on.
    """
    rows.append(row)
    print(table([row]).splitlines()[-1].strip(), flush=True)
    if options.lines:
        name = Path(sys.argv[0]).stem
        write_line(options.lines, {"benchmark": name, "row": row, "options": settings(options)})


def write_line(path: Path, content: dict, about: dict | None = None) -> None:
    """Adds a line of JSON to a file, with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**content, "machine": about or machine()}) + "\n")


def settings(options: argparse.Namespace) -> dict:
    """The options that say what was measured, for JSON."""
    return {key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items() if key not in ("json", "lines")}


def report(options: argparse.Namespace, rows: list[dict], **more) -> None:
    """Prints the table and writes `{"machine", "options", "rows", ...}` where --json says."""
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "options": settings(options), "rows": rows, **more}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"wrote {options.json}")
