"""The rows "onednn" of the operations' tables, on CPUs that have what they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.kernels import examples, rows
from tests.kernels.test_tables import value_and_gradients
from vssd_jax import host
from vssd_jax.errors import UserError
from vssd_jax.kernels import dispatch, onednn
from vssd_jax.models.count import count_multiply_adds
from vssd_jax.models.family import abstract
from vssd_jax.models.vssd import VSSD, VSSDConfig

OPERATIONS = dispatch.operations()
ROWS = [name for name, operation in OPERATIONS.items() if "onednn" in operation.table]
CPU = dispatch.Target("cpu", "cpu")


@pytest.fixture
def nothing_kept():
    """Compiled programs stay in memory, as without a cache."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture
def available(nothing_kept):
    if reason := dispatch.onednn(CPU):
        pytest.skip(reason)


def wide_reference(name, arrays, options):
    """The results and gradients of plain JAX in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda t: jnp.asarray(t, jnp.float64), arrays)
        if "dtypes" in options:
            options = options | {"dtypes": (jnp.float64,) * len(options["dtypes"])}
        function = examples.FUNCTIONS[name]
        return value_and_gradients(
            lambda arrays: function(**arrays, **options, implementation="xla"), wide
        )


def compare(name, arrays, options, tolerance):
    operation = OPERATIONS[name]
    assert operation.choose("onednn", **arrays, **options) == "onednn"
    function = examples.FUNCTIONS[name]
    found = value_and_gradients(
        lambda arrays: function(**arrays, **options, implementation="onednn"), arrays
    )
    expected = wide_reference(name, arrays, options)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def inference(name, dtype):
    """The arguments of an operation as an inference has them."""
    arrays, options = examples.arguments(name, dtype)
    absent = dict.fromkeys({"branch_scale", "gate"} & set(arrays))
    return arrays | absent, options


TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)]
)


@TOLERANCES
@pytest.mark.parametrize("name", ROWS)
def test_results_and_gradients_against_float64(available, name, dtype, tolerance):
    compare(name, *inference(name, dtype), tolerance)


@TOLERANCES
@pytest.mark.parametrize("name", ROWS)
def test_inference_against_float64(available, name, dtype, tolerance):
    """Some rows are for it alone: where they are differentiated, another one runs."""
    arrays, options = inference(name, dtype)
    call = jax.jit(lambda arrays: examples.FUNCTIONS[name](**arrays, **options))
    assert "@__onednn" in call.lower(arrays).as_text()
    found = [np.asarray(t, np.float64) for t in jax.tree.leaves(call(arrays))]
    for a, b in zip(found, wide_reference(name, arrays, options), strict=False):  # gradients follow
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@TOLERANCES
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize(
    ("stride", "residual", "relu_input"),
    [(1, False, False), (1, True, False), (1, False, True), (2, False, False), (2, False, True)],
)
def test_every_depthwise_convolution(
    available, stride, residual, relu_input, activation, dtype, tolerance
):
    arrays, _ = examples.arguments("depthwise_conv", dtype)
    options = {"stride": stride, "activation": activation, "residual": residual}
    compare("depthwise_conv", arrays, options | {"relu_input": relu_input}, tolerance)


@TOLERANCES
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((7, 9), (3, 3), 1, 1),
        ((8, 6), (3, 3), 1, 0),
        ((8, 6), (5, 5), 1, 2),
        ((6, 5), (1, 1), 1, 0),
        ((5, 4), (1, 1), 1, 1),  # more padding than the kernel sees
        ((6, 5), (2, 3), 1, 1),
        ((7, 9), (3, 3), 2, 1),
        ((8, 6), (4, 4), 4, 0),
        ((6, 7), (3, 3), 1, 2),
    ],
)
def test_every_convolution(available, shape, kernel, stride, padding, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, taps, bias = (
        jnp.asarray(rng.standard_normal(s)) for s in ((2, *shape, 4), (*kernel, 4, 6), 6)
    )
    arrays = {"x": x.astype(dtype), "kernel": taps, "bias": bias}
    compare("conv", arrays, {"stride": stride, "padding": padding}, tolerance)


@pytest.mark.parametrize("activation", [None, *onednn.ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True])
def test_the_parts_of_a_product(available, activation, residual):
    rng = np.random.default_rng(0)
    a, b, r = (rng.standard_normal(s, np.float32) for s in ((70, 33), (33, 50), (70, 50)))
    bias = rng.standard_normal(50, np.float32)
    found = jax.jit(onednn.matmul, static_argnames="activation")(
        a, b, bias, r if residual else None, activation=activation
    )
    wide = a.astype(np.float64) @ b + bias
    with jax.enable_x64(True):
        functions = {"gelu": lambda y: jax.nn.gelu(y, approximate=False), "silu": jax.nn.silu,
                     "relu": jax.nn.relu, None: lambda y: y}  # fmt: skip
        expected = functions[activation](wide) + (r if residual else 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# As it is, as the transpose of a wide result, and of a narrow one.
@pytest.mark.parametrize("sizes", [(100, 24, 16), (1000, 8, 16), (100, 24, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_gradient(available, sizes, dtype):
    rows, *widths = sizes
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((rows, width)), dtype) for width in widths)
    found = jax.jit(onednn.kernel_gradient)(x, dy)
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_bias_is_added_before_the_rounding(available):
    x, kernel = jnp.full((1, 2), 16.0, jnp.bfloat16), jnp.asarray([[16.0], [0.0625]])
    found = examples.FUNCTIONS["linear"](x, kernel, jnp.asarray([1.0]), implementation="onednn")
    assert found[0, 0] == 258  # 257 lies between bfloat16's 256 and 258


def test_under_vmap(available):
    arrays, options = examples.arguments("depthwise_conv")
    function = examples.FUNCTIONS["depthwise_conv"]
    x = jnp.stack([arrays.pop("x")] * 3) * jnp.asarray([1.0, 2, 3])[:, None, None, None, None]

    def call(x):
        return function(x=x, **arrays, **options, implementation="onednn")

    np.testing.assert_allclose(jax.vmap(call)(x), [call(part) for part in x], atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "depthwise_conv", "nc_ssd"])
def test_a_gradient_of_a_gradient(available, name):
    arrays, options = examples.arguments(name)
    function = examples.FUNCTIONS[name]

    def slope(arrays, implementation):
        def total(arrays):
            return jnp.sin(function(**arrays, **options, implementation=implementation)).sum()

        return sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(total)(arrays)))

    found, expected = (jax.jit(jax.grad(slope), static_argnums=1)(arrays, row)
                       for row in ("onednn", "xla"))  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_it_is_the_choice_of_such_a_cpu(available):
    arrays, options = examples.arguments("linear")
    assert OPERATIONS["linear"].choose(None, **arrays, **options) == "onednn"
    assert OPERATIONS["linear"].choose("xla", **arrays, **options) == "xla"
    with dispatch.portable():
        assert OPERATIONS["linear"].choose(None, **arrays, **options) == "xla"
    with dispatch.automatic_gradients():
        assert OPERATIONS["linear"].choose(None, **arrays, **options) == "xla"
    half = arrays | {"x": arrays["x"].astype(jnp.float16)}
    assert OPERATIONS["linear"].choose(None, **half, **options) == "xla"


def test_multiply_adds_are_counted_with_it(available):
    model = abstract(lambda rngs: VSSD(VSSDConfig.nano(), num_classes=10, rngs=rngs))
    with dispatch.portable():
        expected = count_multiply_adds(model, (64, 64))
    assert count_multiply_adds(model, (64, 64)) == expected > 1e6


def test_a_program_that_is_kept_on_disk_does_without_it(monkeypatch):
    monkeypatch.setattr(host, "has_amx", lambda: True)
    monkeypatch.setattr(host, "keeps_programs", lambda: True)
    assert "VSSD_JAX_CACHE=0" in dispatch.onednn(CPU)
    arrays, options = examples.arguments("linear")
    assert OPERATIONS["linear"].choose(None, **arrays, **options) == "xla"
    with pytest.raises(UserError, match="cannot be kept on disk"):
        OPERATIONS["linear"].choose("onednn", **arrays, **options)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_gpu_hears_nothing_of_it(name, caplog):
    arrays, options = examples.arguments(name)
    with rows.on_a_gpu():
        assert OPERATIONS[name].choose(None, **arrays, **options) == "xla"
    assert not caplog.records


def test_other_devices_do_without_it(monkeypatch):
    assert "gpu" in dispatch.onednn(dispatch.Target("gpu", "NVIDIA H200"))
    monkeypatch.setattr(host, "has_amx", lambda: False)
    assert "AMX" in dispatch.onednn(CPU)


def test_a_version_of_xla_without_it_is_found_out(monkeypatch):
    def unknown(name, *args):
        raise jax.errors.JaxRuntimeError(f"UNIMPLEMENTED: __onednn${name}\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_call", unknown)
        assert onednn.missing.__wrapped__() == (
            "XLA's oneDNN does not work here (UNIMPLEMENTED: __onednn$matmul)"
        )

    def another(*operands, shape, dtype, **_):
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(onednn, "_plain", another)
    assert "does not work here (Not equal" in onednn.missing.__wrapped__()


def test_an_exported_program_has_plain_jax(available):
    arrays, options = examples.arguments("mlp")
    arrays["branch_scale"] = None
    function = jax.jit(lambda arrays: examples.FUNCTIONS["mlp"](**arrays, **options))
    assert "custom_call @__onednn$matmul" in function.lower(arrays).as_text()
    exported = jax.export.export(function)(arrays)
    assert "custom_call @__onednn" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(arrays), function(arrays), atol=1e-5)


@pytest.mark.parametrize("dtype", onednn.DTYPES)
def test_plain_jax_computes_the_same(available, dtype):
    rng = np.random.default_rng(0)
    x, k, w = (
        jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 9, 7, 16), (3, 3, 1, 16), (16, 8))
    )

    def calls(x, k, w):
        y = onednn.convolution(
            x, k, x[0, 0, 0].astype(jnp.float32), x, padding=1, groups=16, activation="silu"
        )
        rows = y.reshape(-1, 16)
        return onednn.matmul(rows, w, w[0], activation="gelu"), onednn.product(rows, rows, "right")

    with jax.disable_jit():
        expected = calls(x, k, w)
    for a, b in zip(jax.jit(calls)(x, k, w), expected, strict=True):
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        a, b = (np.asarray(t, np.float64) for t in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
