"""Every test runs on the CPU, but those marked `gpu`; none needs a network."""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import hypothesis
import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VSSD_JAX_CACHE"] = ""  # no test writes to the user's folders
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Runs that resume or repeat compile once; workers and subprocesses share the folder.
    _CACHE = tempfile.TemporaryDirectory(prefix="vssd-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# LLVM's optimisations, XLA's fusion emitters and code generation by several threads take half of
# the time and change little for models this small; the slow tests, of the real models, run as users
# do.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
FAST_COMPILATION, AS_USERS = UNOPTIMIZED, {}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Later ones abort at a flag that they do not know, and have the emitters alone.
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS["xla_cpu_use_fusion_emitters"] = True  # options of a program


def flags_for(devices):
    """XLA_FLAGS of a process that has as many CPU devices."""
    return f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"


# The same examples at every run, and no folder for them; more by --hypothesis-profile=thorough.
for profile, examples in (("thorough", 600), ("everyday", 60)):
    hypothesis.settings.register_profile(
        profile, deadline=None, database=None, derandomize=True, max_examples=examples
    )
hypothesis.settings.load_profile("everyday")

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[1]


def pytest_configure(config):
    # Before jax is imported, by the first test module.
    if "slow" not in config.option.markexpr.replace("not slow", ""):
        os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
    if config.option.markexpr == "gpu":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # test processes share the memory
        import jax

        if jax.default_backend() != "gpu":
            pytest.exit("`pytest -m gpu` needs a GPU that JAX finds", returncode=2)
    else:
        import tests.shapes  # noqa: F401 - the import hook takes it by name

        os.environ["JAX_PLATFORMS"] = "cpu"
        # Shapes in annotations are checked whenever these functions are called; not on a GPU, where
        # Triton compiles functions from their source.
        operations = [path.parent.name for path in (ROOT / "vssd_jax/kernels").glob("*/api.py")]
        public = [f"vssd_jax.kernels.{operation}.api" for operation in operations]
        install_import_hook([*public, "vssd_jax.models"], "tests.shapes.check")


def pytest_collection_modifyitems(items):
    # Files with the longest tests first, so that no worker is alone with one at the end.
    long = [ROOT / "tests" / folder for folder in ("training", "extending", "tasks")]
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in long))


@pytest.fixture
def x64():
    """Computes in float64 within a test."""
    import jax

    with jax.enable_x64(True):
        yield


# Bytes of a worker from which on it frees the compiled programs of a file that is done.
_MUCH_MEMORY = 2.5e9


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Compiled programs take gigabytes together; small ones are of use to the next file too."""
    yield
    if "jax" in sys.modules and _resident() > _MUCH_MEMORY:
        sys.modules["jax"].clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # no malloc_trim outside of glibc
            ctypes.CDLL(None).malloc_trim(0)


def _resident():
    """Bytes of memory in use; infinite where that is not known."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE")
