"""Compiles programs for GPUs on a machine that has none, and counts what they launch and move.

    python tests/kernels/aot/programs.py sm_90 "op tiny stage 1 bfloat16 forward" ...
    python tests/kernels/aot/programs.py --record [sm_90 ...]      # recorded.json anew

needs the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt` (no CUDA libraries). It prints a line
of JSON for each program: kernels, bytes (operands and results of every kernel, per image),
temporary memory, transposes and, where NVIDIA's `ptxas` is found and new enough for XLA's code, the
Pallas kernels whose registers spill (not in detection and segmentation). XLA's own Triton compiles
the Pallas kernels, so that lowering errors and shared memory that overflows show here. GEMMs are
what XLA chooses without measuring.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))
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

from benchmarks import real_step
from vssd_jax.kernels.attention import OPERATION, attention
from vssd_jax.kernels.depthwise_conv import depthwise_conv
from vssd_jax.kernels.expand_depthwise import expand_depthwise
from vssd_jax.kernels.mlp import MLPParams, mlp
from vssd_jax.kernels.nc_ssd import nc_ssd_gated, specs
from vssd_jax.kernels.nc_ssd_mixer import MixerParams, nc_ssd_mixer
from vssd_jax.kernels.norm_linear import norm_linear
from vssd_jax.kernels.roi_align import roi_align
from vssd_jax.models.layers import round_kernels
from vssd_jax.models.vssd import VSSD, VSSDConfig

HERE = pathlib.Path(__file__).parent
KINDS = {
    "sm_80": "NVIDIA A100",
    "sm_89": "NVIDIA GeForce RTX 4090",
    "sm_90": "NVIDIA H200",
    "sm_100": "NVIDIA B200",
    "sm_120": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
# cuDNN, which has attention over many tokens, is not there: XLA's is compiled in its place.
OPERATION.table.pop("cudnn")
ROI_STRIDES = (4, 8, 16, 32)
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}


def compile_for(arch, f, avals, donated=(), **options):
    """`f` compiled for `arch`, inside `tracing_for(arch)`; `avals`: pytrees of ShapeDtypeStruct.

    `donated` has the numbers of arguments that are, `options` are XLA's.
    """
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=(HERE / f"{arch}.txtpb").read_text(),
        topology="1x1x1",
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    avals = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), avals
    )
    traced = jax.jit(f, donate_argnums=donated).trace(*avals)
    return traced.lower().compile(compiler_options=options)


def tracing_for(arch):
    """The context in which the dispatch takes a GPU for the device."""
    device = AbstractDevice(KINDS[arch], 1, "cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)")


def bytes_of(kind):
    """Of each array of a type, which may be a tuple."""
    return [
        BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", kind)
    ]


def names_of(operands):
    return [operand.strip().split(" ")[-1].lstrip("%") for operand in operands.split(",")]


def slices(text):
    """Fusion -> number of the operand -> bytes read of it, where slices alone are computed."""
    found = {}
    for computation in re.split(r"\n\n", text):
        start = re.match(r"%([\w.\-]+) \(", computation)
        if not start:
            continue
        # By name: the operands that are as large as this value, element by element.
        whole, sizes, elements, reads = {}, {}, {}, {}
        for line in computation.splitlines():
            match = LINE.match(line)
            if not match:
                continue
            name, kind, op, operands = match.groups()
            shape = re.match(r"\w+\[([\d,]*)\]", kind)
            elements[name] = math.prod(int(n) for n in shape[1].split(",") if n) if shape else 0
            if op == "parameter":
                whole[name], sizes[int(operands)] = {int(operands)}, sum(bytes_of(kind))
            for operand in names_of(operands):
                for number in whole.get(operand, ()):
                    if op in ("slice", "dynamic-slice"):
                        part = sizes[number] * elements[name] / elements[operand]
                    elif elements[name] == elements[operand] and "ROOT" not in line:
                        whole.setdefault(name, set()).add(number)
                        continue
                    else:
                        part = math.inf
                    reads[number] = reads.get(number, 0) + part
        found[start[1]] = {number: size for number, size in reads.items() if size < math.inf}
    return found


def count(text, images):
    """Kernels, megabytes and transposes of a compiled program, from its text.

    Of a conditional the branch that moves most counts. A loop counts as often as it runs, or as one
    kernel where the program does not say.
    """
    text = re.sub(r"/\*index=\d+\*/", "", text)  # before every fifth operand
    sliced, transposes = slices(text), []
    starts = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", text, re.MULTILINE)
    computations = {start[1]: start.end() for start in starts}

    def total(start):
        sizes, kernels, moved = {}, 0, 0
        for line in text[start : text.index("\n}", start)].splitlines():
            match = LINE.match(line)
            if not match:
                continue
            name, kind, op, operands = match.groups()
            arrays = bytes_of(kind)
            sizes[name] = sum(arrays)
            if op in FREE:
                continue
            inside = None
            if op == "conditional":
                named = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line)
                listed = re.search(r"branch_computations=\{(.*?)\}", line)
                branches = named or names_of(listed[1])
                inside = max((total(computations[branch]) for branch in branches), key=sum)
            times = re.search(r'known_trip_count":{"n":"(\d+)"', line)
            if op == "while" and times:
                body = total(computations[re.search(r"body=%([\w.\-]+)", line)[1]])
                inside = [int(times[1]) * value for value in body]
            if inside:
                kernels, moved = kernels + inside[0], moved + inside[1]
                continue
            called = re.search(r"calls=%([\w.\-]+)", line)
            parts = sliced.get(called[1], {}) if called else {}
            if "multi_tensor" in line:  # of its vector no more than it writes of parameters
                parts = {0: sizes[name] / 2}
            read = sum(
                min(sizes.get(operand, 0), parts.get(number, math.inf))
                for number, operand in enumerate(names_of(operands))
            )
            kernels += 1
            moved += read + sizes[name]
            # Small ones are weights, for the most part.
            transposing = "transpose" in op or "transpose_fusion" in name
            if transposing and max(arrays, default=0) >= 2**23:
                transposes.append(f"{name} {kind}")
        return kernels, moved

    kernels, moved = total(text.index("\nENTRY"))
    return {
        "kernels": kernels,
        "megabytes_per_image": round(moved / images / 1e6, 2),
        "transposes": transposes,
    }


def ptxas() -> str | None:
    """NVIDIA's assembler: of `nvidia-cuda-nvcc`, a CUDA toolkit, or `nvidia-cuda-nvcc-cu12`."""
    new, old = ([str(pathlib.Path(path) / "nvidia" / folder / "bin") for path in sys.path]
                for folder in ("cu13", "cuda_nvcc"))
    places = [*new, os.environ.get("PATH", ""), "/usr/local/cuda/bin", *old]
    return shutil.which("ptxas", path=os.pathsep.join(places))


@functools.cache
def release() -> str | None:
    """The release of CUDA that `ptxas` is of, such as "13.0"."""
    if not ptxas():
        return None
    said = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release ([\d.]+)", said.stdout)[1]


def spills(folder) -> list[str] | None:
    """The Pallas kernels in XLA's dump that spill registers, with the bytes that they store.

    None, and a line on stderr, where `ptxas` is too old to tell.
    """
    found, files = [], list(pathlib.Path(folder).glob("*.ptx"))
    if not files:
        raise RuntimeError("XLA wrote no PTX: whether registers spill cannot be told")
    for ptx in files:
        target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
        if not target:  # an empty module
            continue
        command = [ptxas(), "-v", f"-arch={target[1]}", str(ptx), "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True)
        if "Unsupported .version" in run.stderr:
            print(f"spills are not looked for: {run.stderr.splitlines()[0]}", file=sys.stderr)
            return None
        run.check_returncode()
        # Not XLA's own kernels, "..._fusion".
        entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores"
        found += [f"{name} {size}" for name, size in re.findall(entry, run.stderr, re.S)
                  if size != "0" and "fusion" not in name]
    return found


def gradients(f, arguments):
    """`(arguments, dy) -> gradients`, and the shapes of its arguments."""
    result = jax.eval_shape(f, *arguments)

    def backward(*values):
        *values, dy = values
        return jax.vjp(f, *values)[1](dy)

    return backward, [*arguments, result]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlp_shapes(batch, dtype, length, channels):
    wide, back = (channels, 4 * channels), (4 * channels, channels)
    params = [shape(*s) for s in [wide[:1]] * 2 + [wide, wide[1:], back, back[1:]]]
    return {"x": shape(batch, length, channels, dtype=dtype), "params": MLPParams(*params)}


def depthwise_shapes(batch, dtype, side, channels):
    x = shape(batch, side, side, channels, dtype=dtype)
    return {"x": x, "kernel": shape(3, 3, channels), "bias": shape(channels)}


def expand_depthwise_shapes(batch, dtype, side, channels):
    x, wide = shape(batch, side, side, channels, dtype=dtype), 8 * channels
    layers = {"w1": shape(channels, wide), "b1": shape(wide)}
    return {"x": x, **layers, "kernel": shape(3, 3, wide), "bias": shape(wide)}


def attention_shapes(batch, dtype, length, heads, head_dim):
    return {"qkv": shape(batch, length, 3 * heads * head_dim, dtype=dtype)}


def norm_linear_shapes(batch, dtype, spec):
    channels, columns = spec.inner // 2, spec.inner + spec.width + spec.heads
    x = shape(batch, spec.length, channels, dtype=dtype)
    norm = {"scale": shape(channels), "bias": shape(channels)}
    return {"x": x, **norm, "kernel": shape(channels, columns)}


def mixer_shapes(batch, dtype, spec):
    side, channels = int(spec.length**0.5), spec.inner // 2
    picture = functools.partial(shape, batch, side, side)
    params = MixerParams(
        conv_kernel=shape(3, 3, spec.width),
        conv_bias=shape(spec.width),
        d=shape(spec.heads),
        scale=shape(spec.inner),
        bias=shape(spec.inner),
        out_kernel=shape(spec.inner, channels),
    )
    return {
        "x": picture(channels, dtype=dtype),
        "xbc": picture(spec.width, dtype=dtype),
        "token_weights": picture(spec.heads),
        "z": picture(spec.inner, dtype=dtype),
        "params": params,
    }


def nc_ssd_shapes(batch, dtype, spec):
    tokens = (batch, spec.length)
    return {
        "xbc": shape(*tokens, spec.width, dtype=dtype),
        "token_weights": shape(*tokens, spec.heads),
        "d": shape(spec.heads),
        "z": shape(*tokens, spec.inner, dtype=dtype),
        "scale": shape(spec.inner),
        "bias": shape(spec.inner),
    }


def roi_align_shapes(images, dtype, regions, channels=256):
    """The pyramid of pictures of 800x1344."""
    maps = [shape(images, 800 // s, 1344 // s, channels, dtype=dtype) for s in ROI_STRIDES]
    return {"maps": tuple(maps), "boxes": shape(images, regions, 4)}


def operation(name, batch, dtype):
    """A function and the shapes of its arguments."""
    kind, *sizes = name.split(" ")
    if kind == "roi_align":
        regions, bins = map(int, sizes)
        shapes, options = roi_align_shapes(batch, dtype, regions), {"strides": ROI_STRIDES}
        return by_position(roi_align, shapes, bins=bins, implementation="pallas", **options)
    if kind == "depthwise":
        shapes = depthwise_shapes(batch, dtype, *map(int, sizes))
        return by_position(depthwise_conv, shapes, activation="silu")
    if kind == "expand_depthwise":
        shapes = expand_depthwise_shapes(batch, dtype, *map(int, sizes))
        return by_position(expand_depthwise, shapes, implementation="pallas")
    if kind == "attention":
        shapes = attention_shapes(batch, dtype, *map(int, sizes))
        return by_position(attention, shapes, heads=int(sizes[1]), implementation="pallas")
    if kind == "mlp":
        shapes = mlp_shapes(batch, dtype, *map(int, sizes))
        return by_position(mlp, shapes, branch_scale=None, implementation="pallas")
    spec = next(s for s in specs.NETWORK + specs.EDGES if name.endswith(s.name))
    if kind == "norm_linear":
        widths, dtypes = (spec.inner, spec.width, spec.heads), (dtype, dtype, jnp.float32)
        shapes = norm_linear_shapes(batch, dtype, spec)
        return by_position(norm_linear, shapes, widths=widths, dtypes=dtypes)
    options = {"groups": spec.groups, "implementation": "pallas"}
    if kind == "mixer":
        shapes = mixer_shapes(batch, dtype, spec)
        return by_position(nc_ssd_mixer, shapes, branch_scale=None, **options)
    shapes = nc_ssd_shapes(batch, dtype, spec)
    return by_position(nc_ssd_gated, shapes, inner=spec.inner, silu=True, **options)


def by_position(f, shapes, **options):
    """`f` as a function of arrays in the order of `shapes`, and the shapes."""

    def call(*arrays):
        return f(**dict(zip(shapes, arrays, strict=True)), **options)

    return call, list(shapes.values())


def network(name, batch, dtype, direction):
    """Inference or gradients of a whole model, and the shapes of its arguments."""

    def build():
        model = VSSD(getattr(VSSDConfig, name)(), dtype=dtype, rngs=nnx.Rngs(0))
        if direction == "forward":
            round_kernels(model)  # as predictions keep them
        return model

    model = nnx.eval_shape(build)
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


def shapes_of(batch):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def training_step(config):
    """The whole step that `train.py` runs with a config, and the shapes of its arguments."""
    trainer, batch = real_step.training(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return trainer.function, [trainer.abstract, shapes_of(batch), key]


def optimizer_step(config):
    """What of it follows on the gradient."""
    trainer, _ = real_step.training(config)
    state = trainer.abstract
    return trainer.apply, [state, state.params, state.batch_stats, shape()]


def prediction(config):
    """What `eval.py` runs with a config, and the shapes of its arguments."""
    f, trainer, batch = real_step.prediction(config)
    return f, [trainer.abstract.ema, shapes_of(batch)]


CONFIGURED = {"step": training_step, "optimizer": optimizer_step, "predict": prediction}


def program(description):
    """What a description stands for -> function, shapes, images.

    `op NAME DTYPE DIRECTION`, `model NAME DTYPE DIRECTION`, or of a config, with an argument as in
    "tiny:mesa", `step CONFIG`, `optimizer CONFIG` (the step from the gradient on) or
    `predict CONFIG`.
    """
    kind, *name = description.split(" ")
    if kind in CONFIGURED:
        config = real_step.config_of(*name)
        classifies = config.task == "classification"
        batch = 128 if classifies else 8 if kind == "predict" else 2
        config.update(batch_size=batch, eval_batch_size=batch)
        return *CONFIGURED[kind](config), batch
    *name, dtype, direction = name
    name, dtype, batch = " ".join(name), jnp.dtype(dtype), 128
    if name.startswith("roi_align"):
        batch = 2 if direction == "backward" else 8
    if kind == "model":
        return *network(name, batch, dtype, direction), batch
    f, arguments = operation(name, batch, dtype)
    return *((f, arguments) if direction == "forward" else gradients(f, arguments)), batch


def measured(arch, description):
    """The figures of one program."""
    with tracing_for(arch), tempfile.TemporaryDirectory() as folder:
        f, avals, images = program(description)
        # Detection and segmentation have sorts of XLA's, which spill, and sizes of their own.
        heads = re.match("(step|predict) (mask_rcnn|upernet)", description)
        look = ptxas() and not heads
        # Without the second jax 0.12 writes no PTX.
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"} if look else {}
        if heads:
            # XLA finds no tiles for some of their products without measuring: cuBLAS for all.
            options["xla_gpu_enable_triton_gemm"] = False
        donated = (0,) if re.match("step|optimizer", description) else ()  # as in a run
        compiled = compile_for(arch, f, avals, donated, **options)
        figures = count(compiled.as_text(), images)
        figures["temporary_megabytes"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6)
        found = spills(folder) if look else None
        return figures | {"spills": found, "ptxas": release()}


def record(archs):
    """Measures what recorded.json has for `archs` anew; writes after each program."""
    path = HERE / "recorded.json"
    recorded = json.loads(path.read_text())
    if set(archs) == set(KINDS):
        recorded |= {"jax": jax.__version__, "ptxas": release()}
    elif recorded["jax"] != jax.__version__:
        sys.exit(f"the records are of jax {recorded['jax']}: use it, or record all cards anew")
    for arch in archs:
        for description in recorded[arch]:
            figures = measured(arch, description)
            kept = ["kernels", "megabytes_per_image"]
            if not description.startswith("op "):
                kept.append("temporary_megabytes")
            recorded[arch][description] = {name: figures[name] for name in kept}
            path.write_text(json.dumps(recorded, indent=2) + "\n")
            print(arch, description, figures, flush=True)


def main():
    if sys.argv[1] == "--record":
        return record(sys.argv[2:] or KINDS)
    arch, *descriptions = sys.argv[1:]
    for description in descriptions:
        with contextlib.redirect_stdout(sys.stderr):  # what a config says is no answer
            figures = measured(arch, description)
        print(json.dumps({"program": description, "arch": arch} | figures), flush=True)


if __name__ == "__main__":
    main()
