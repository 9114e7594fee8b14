"""Compiles programs for GPUs on a machine that has none, and counts what they launch and move.

    python tests/kernels/aot/programs.py sm_90 "op tiny stage 1 bfloat16 forward" ...

needs the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt` (no CUDA libraries). It prints a line
of JSON for each program: kernels, bytes (operands and results of every kernel, per image), and
transposes. XLA's own Triton compiles the Pallas kernels, so that lowering errors and shared memory
that overflows show here. GEMMs are what XLA chooses without measuring.
"""

import functools
import json
import math
import os
import pathlib
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from vssd_jax.kernels.attention import attention
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.nc_ssd import nc_ssd_gated, specs
from vssd_jax.models.vssd import VSSD, VSSDConfig

HERE = pathlib.Path(__file__).parent
KINDS = {"sm_80": "NVIDIA A100", "sm_89": "NVIDIA GeForce RTX 4090", "sm_90": "NVIDIA H200"}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}


def compile_for(arch, f, avals):
    """`f` compiled for `arch`, inside `tracing_for(arch)`; `avals`: pytrees of ShapeDtypeStruct."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=(HERE / f"{arch}.txtpb").read_text(),
        topology="1x1x1",
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    avals = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), avals
    )
    return jax.jit(f).trace(*avals).lower().compile()


def tracing_for(arch):
    """The context in which the dispatch takes a GPU for the device."""
    device = AbstractDevice(KINDS[arch], 1, "cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def count(text, images):
    """Kernels, megabytes and transposes of a compiled program, from its text."""
    sizes, kernels, moved, transposes = {}, 0, 0, []
    line_of = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)")
    for line in text[text.index("ENTRY") :].splitlines():
        match = line_of.match(line)
        if not match:
            continue
        name, kind, op, operands = match.groups()
        sizes[name] = sum(
            BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            for dtype, shape in re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", kind)
        )
        if op in FREE:
            continue
        read = sum(sizes.get(o.strip().split(" ")[-1].lstrip("%"), 0) for o in operands.split(","))
        kernels += 1
        moved += read + sizes[name]
        # Small ones are weights.
        if ("transpose" in op or "transpose_fusion" in name) and sizes[name] >= 2**16 * images:
            transposes.append(f"{name} {kind}")
    return {
        "kernels": kernels,
        "megabytes_per_image": round(moved / images / 1e6, 2),
        "transposes": transposes,
    }


def gradients(f, arguments):
    """`(arguments, dy) -> gradients`, and the shapes of its arguments."""
    result = jax.eval_shape(f, *arguments)

    def backward(*values):
        *values, dy = values
        return jax.vjp(f, *values)[1](dy)

    return backward, [*arguments, result]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def operation(name, batch, dtype):
    """A function and the shapes of its arguments."""
    if name.startswith("depthwise"):
        _, height, channels = name.split(" ")
        x = shape(batch, int(height), int(height), int(channels), dtype=dtype)
        f = functools.partial(depthwise_conv, activation="silu")
        return f, [x, shape(3, 3, int(channels)), shape(int(channels))]
    if name.startswith("attention"):
        _, length, heads, head_dim = (int(w) if w.isdigit() else w for w in name.split(" "))
        f = functools.partial(attention, heads=heads, implementation="pallas")
        return f, [shape(batch, length, 3 * heads * head_dim, dtype=dtype)]
    spec = next(s for s in specs.NETWORK + specs.EDGES if s.name == name)
    f = functools.partial(
        nc_ssd_gated, inner=spec.inner, groups=spec.groups, implementation="pallas"
    )
    tokens = (batch, spec.length)
    return f, [
        shape(*tokens, spec.width, dtype=dtype),
        shape(*tokens, spec.heads),
        shape(spec.heads),
        shape(*tokens, spec.inner, dtype=dtype),
        shape(spec.inner),
        shape(spec.inner),
    ]


def network(name, batch, dtype, direction):
    """Inference or gradients of a whole model, and the shapes of its arguments."""
    model = nnx.eval_shape(
        lambda: VSSD(getattr(VSSDConfig, name)(), dtype=dtype, rngs=nnx.Rngs(0))
    )
    model.eval() if direction == "forward" else model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = shape(batch, 224, 224, 3, dtype=dtype)

    def forward(params, rest, images):
        return nnx.merge(graphdef, params, rest)(images)

    def backward(params, rest, images):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(images, nnx.Rngs(dropout=0))
            return -jax.nn.log_softmax(logits)[:, 0].mean(), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    return forward if direction == "forward" else backward, [params, rest, images]


def program(description):
    """`op NAME DTYPE DIRECTION` or `model NAME DTYPE DIRECTION` -> function, shapes, images."""
    kind, *name, dtype, direction = description.split(" ")
    name, dtype, batch = " ".join(name), jnp.dtype(dtype), 128
    if kind == "model":
        return *network(name, batch, dtype, direction), batch
    f, arguments = operation(name, batch, dtype)
    return *((f, arguments) if direction == "forward" else gradients(f, arguments)), batch


def main():
    arch, *descriptions = sys.argv[1:]
    for description in descriptions:
        with tracing_for(arch):
            f, avals, images = program(description)
            text = compile_for(arch, f, avals).as_text()
        print(json.dumps({"program": description, "arch": arch} | count(text, images)), flush=True)


if __name__ == "__main__":
    main()
