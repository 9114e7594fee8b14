"""What the benchmarks share: timing, the steps that are timed, tables and JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vssd_jax.host import compiler_options, prepare_cpu

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
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(calls: dict, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each function, a value for each round.

    The functions take turns within a round, so that a change in the machine's load meets all of
    them. Each must return only when its work is done.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compilation
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(seconds / once))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.2)  # idle threads of the one before spin for a while
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster `fast` is than `slow`: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


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
    """A jitted `(params, images) -> logits` of `model`, and its parameters."""
    model.eval()
    graphdef, state = nnx.split(model)

    def step(state, images):
        return nnx.merge(graphdef, state)(images)

    return jax.jit(step, compiler_options=compiler_options()), state


def training_step(model: nnx.Module):
    """A jitted `(state, images, labels, key) -> state`: gradients, clipping, AdamW.

    Returns the step and its first state. The state is donated.
    """
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(1e-4, weight_decay=0.05)
    )

    def step(state, images, labels, key):
        params, rest, opt_state = state

        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(images, rngs=nnx.Rngs(dropout=key))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    return step, (params, rest, optimizer.init(params))


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


def add(rows: list[dict], row: dict) -> None:
    """Appends the row and prints it: something to see while the others are measured."""
    rows.append(row)
    print(table([row]).splitlines()[-1].strip(), flush=True)


def report(options: argparse.Namespace, rows: list[dict], **more) -> None:
    """Prints the table and writes `{"machine", "options", "rows", ...}` where --json says."""
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value
                    for key, value in vars(options).items() if key != "json"}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "options": settings, "rows": rows, **more}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"wrote {options.json}")
