"""Every row of every operation's table."""

import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import flags_for
from tests.kernels import examples, rows
from vssd_jax.errors import UserError
from vssd_jax.kernels import dispatch

OPERATIONS = dispatch.operations()
ROWS = [(op, name) for op, operation in OPERATIONS.items() for name in operation.table]
ALL_ROWS = pytest.mark.parametrize(("op", "name"), ROWS)
KERNELS = [(op, name) for op, name in ROWS if name != "xla"]


def value_and_gradients(f, arrays):
    """The results as NumPy arrays in float64."""

    @jax.jit
    def run(arrays):
        y, vjp = jax.vjp(f, arrays)
        dy = jax.tree.map(lambda t: jnp.cos(jnp.arange(t.size)).reshape(t.shape).astype(t.dtype), y)
        return y, vjp(dy)

    return [np.asarray(t, np.float64) for t in jax.tree.leaves(run(arrays))]


def example(op, dtype):
    """All arguments of the operation by name."""
    arrays, options = examples.arguments(op, dtype)
    return arrays | options


def test_every_operation_has_an_example():
    assert set(examples.FUNCTIONS) == set(OPERATIONS)


@ALL_ROWS
def test_every_row_has_the_function_of_its_operation(op, name):
    try:
        function = OPERATIONS[op].function(name)
    except ImportError as error:
        pytest.skip(str(error))
    public = set(inspect.signature(examples.FUNCTIONS[op]).parameters)
    own = inspect.signature(function).parameters
    extra = {"implementation"} if name == "xla" and OPERATIONS[op].parts else set()
    assert public - {"implementation"} | extra <= set(own)
    for parameter in set(own) - public:  # of this implementation alone
        assert own[parameter].default is not inspect.Parameter.empty


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_every_row_against_plain_jax(op, name, monkeypatch):
    operation = OPERATIONS[op]
    reason = operation.table[name].runs_on(dispatch.target())
    if reason and name != "pallas":
        pytest.skip(reason)
    if reason:
        rows.pallas(operation)
        monkeypatch.setattr(operation, "table", operation.table)
        rows.register_interpreted(operation)
        name = "interpreted"
    dtype, tolerance = jnp.float32, 2e-5
    if operation.choose(name, **example(op, dtype)) != name:
        dtype, tolerance = jnp.bfloat16, 2e-2
        if operation.choose(name, **example(op, dtype)) != name:
            pytest.skip(f"{op}'s {name} is not for small arguments")
    found = value_and_gradients(*examples.call(op, name, dtype))
    expected = value_and_gradients(*examples.call(op, "xla", dtype))
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU")
@pytest.mark.parametrize("op", OPERATIONS)
def test_names_on_a_cpu(op):
    def choose(name):
        return OPERATIONS[op].choose(name, **example(op, jnp.float32))

    with pytest.raises(UserError, match="unknown implementation 'palas'; did you mean 'pallas'"):
        choose("palas")
    assert choose(None) == choose("xla") == ("cpu" if op == "layer_norm" else "xla")
    for name in ("pallas", "triton", "cudnn"):
        if name in OPERATIONS[op].table:
            message = f"{op} cannot run as '{name}': it needs an NVIDIA GPU, and this is a cpu; use"
            with pytest.raises(UserError, match=message):
                choose(name)
        else:
            assert choose(name) == choose(None)


WITHOUT_PALLAS = """
import sys
pallas = "jax.experimental.pallas"
for name in (pallas, f"{pallas}.triton", "triton", "jax_triton", "jaxtyping"):
    sys.modules[name] = None  # importing it fails
import jax, jax.numpy as jnp
from flax import nnx
from tests.kernels import examples
from vssd_jax.host import compiler_options
from vssd_jax.kernels import dispatch
from vssd_jax.models.vssd import VSSD, VSSDConfig
from vssd_jax.types import Float

assert Float[jax.Array, "B C"] is jax.Array

def loss(f, *args):
    return sum(t.astype(jnp.float32).sum() for t in jax.tree.leaves(f(*args)))

functions, arrays = zip(*(examples.call(op) for op in dispatch.operations()))

def all_operations(arrays):
    return sum(loss(f, a) for f, a in zip(functions, arrays))

gradients = jax.jit(jax.grad(all_operations), compiler_options=compiler_options())(arrays)
assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
config = VSSDConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), d_state=8)
model = VSSD(config, num_classes=3, rngs=nnx.Rngs(0))
jax.eval_shape(model.eval() or model, jnp.ones((1, 32, 32, 3)))
print("done")
"""


def run_on_cpus(script, *, devices=1):
    """Runs Python code in another process."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags_for(devices),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_cpu_needs_neither_pallas_nor_triton_nor_jaxtyping():
    assert "done" in run_on_cpus(WITHOUT_PALLAS)
