"""How a process uses the host's memory and cores."""

import contextlib
import ctypes
import functools


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next arrays of this process.

    By default it hands large arrays back to the system and takes them again page by page: a fifth
    of the time of the data transforms, a third of that of a training step on a CPU.
    """
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    # No mallopt outside glibc.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def prepare_cpu() -> None:
    """Makes programs on a CPU keep their memory; to be called before JAX computes anything.

    glibc keeps a block of more than 64 MB only if it was asked for by the main thread. Programs
    are therefore run by the thread that calls them. It changes nothing on other devices.
    """
    import jax

    keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)


@functools.cache
def compiler_options() -> dict[str, str]:
    """XLA's options for the programs of this project: `jax.jit(f, compiler_options=...)`.

    On a CPU they use vectors of 512 bits where there are any, and take the convolutions, though not
    the matrix products, away from XLA's new library YNNPACK: it is up to four times slower than
    XLA's own at them, and takes fresh memory each time. Empty on other devices, and with a version
    of XLA that does not know them.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options = {
        "xla_cpu_experimental_ynn_fusion_type": kinds,
        "xla_cpu_prefer_vector_width": "512",
    }
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
