"""Kernels under a sharded jit: each device has its own part of the batch."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from tests.kernels.test_tables import run_on_cpus
from vssd_jax.kernels import dispatch, mesh

# Gradients of every operation with Pallas kernels, in the interpreter, on eight devices.
SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.kernels import examples, rows
from vssd_jax.kernels import dispatch

BATCH = 8
devices = jax.make_mesh((BATCH,), ("data",), axis_types=(AxisType.Auto,))

def place(t):
    batched = t.ndim > 1 and t.shape[0] == BATCH
    return jax.device_put(t, NamedSharding(devices, P("data") if batched else P()))

for op, operation in dispatch.operations().items():
    if "pallas" not in operation.table:
        continue
    rows.register_interpreted(operation)
    dtype, tolerance = jnp.float32, 1e-4
    arrays, options = examples.arguments(op, dtype, BATCH)
    if operation.choose("interpreted", **arrays, **options) != "interpreted":
        dtype, tolerance = jnp.bfloat16, 1e-2  # kernels for 16 bits
    f, arrays = examples.call(op, "interpreted", dtype, BATCH)
    forward_only = not operation.table["pallas"].backward
    if forward_only:
        run = f
    else:
        def loss(arrays):
            return sum(jnp.square(y.astype(jnp.float32)).sum() for y in jax.tree.leaves(f(arrays)))

        run = jax.grad(loss)
    expected = jax.jit(run)(arrays)
    with jax.set_mesh(devices):
        placed = jax.tree.map(place, arrays)
        compiled = jax.jit(run).lower(placed).compile()
        found = compiled(placed)
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text, f"{op}: gathered"
    if not forward_only and op not in ("attention", "roi_align"):
        assert "all-reduce" in text, f"{op}: gradients of parameters are sums over all devices"
    for name, t in found.items() if not forward_only else enumerate(jax.tree.leaves(found)):
        for leaf in jax.tree.leaves(t):
            if leaf.ndim > 2 and leaf.shape[0] == BATCH:
                assert leaf.sharding.spec[0] in ("data", ("data",)), (op, name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
    print("sharded", op, flush=True)
"""


def test_kernels_stay_sharded():
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    output = run_on_cpus(SHARDED, devices=8)
    for name, operation in dispatch.operations().items():
        assert ("pallas" in operation.table) == (f"sharded {name}\n" in output)


def test_sizes_count_per_device():
    x = jax.ShapeDtypeStruct((8, 2**28), jnp.float32)
    assert "2147483648 elements on a device (below 2147483648)" in mesh.too_large(x)
    with use_abstract_mesh(AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        assert mesh.too_large(x) is None
        assert "268435456 elements on a device (below 268435456)" in mesh.too_large(x, factor=8)
        odd = jax.ShapeDtypeStruct((9, 2**28), jnp.float32)  # eight devices cannot divide it
        assert mesh.too_large(odd) is not None
