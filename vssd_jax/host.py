"""How a process uses the host's memory, cores and disk."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has Intel's matrix units, for bfloat16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# --- Compiled programs on disk -------------------------------------------------------------------

CACHE_VARIABLE = "VSSD_JAX_CACHE"
_CACHE_BYTES = 2e9  # the most that is kept


def keep_compiled_programs() -> None:
    """Keeps compiled programs in a folder, so that the next process need not compile them.

    The folder is `cache_folder()`. Nothing is changed if there is none, if JAX has a folder for
    them already (`JAX_COMPILATION_CACHE_DIR`, or `jax_compilation_cache_dir` of its config), or if
    this process is one of several that compute together: they would have to find the same programs,
    which only a folder that all of them share can promise. A folder that cannot be written is said,
    and left alone.
    """
    import jax

    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if given is not None or jax.distributed.is_initialized():
        return
    if (folder := cache_folder()) is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
        drop_oldest(folder, _CACHE_BYTES)
    except OSError as error:
        print(
            f"compiled programs are not kept: {folder} cannot be written "
            f"({error.strerror or error}); {CACHE_VARIABLE} names another folder, or 0 for none",
            flush=True,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    name = "jax_persistent_cache_min_compile_time_secs"
    # JAX's own limit, a second, leaves out most of what a small model compiles.
    if name.upper() not in os.environ and getattr(jax.config, name) == 1:
        jax.config.update(name, 0.1)


def keeps_programs() -> bool:
    """Whether JAX writes compiled programs to disk."""
    import jax

    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return bool(folder and jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]


def cache_folder() -> Path | None:
    """The folder for compiled programs on this machine; None if there is to be none.

    It lies in the user's folder for caches, or in `VSSD_JAX_CACHE`, which may be empty or 0 for
    none. Each kind of CPU has its own: a home may be that of several machines, and a program for
    one may end with an illegal instruction on another.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given in ("", "0"):
        return None
    try:
        base = Path(given).expanduser() if given else _user_cache() / "vssd_jax" / "compiled"
    except RuntimeError:  # there is no home
        return None
    return base.absolute() / _cpu()


def _user_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # By its specification a relative path counts as none.
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"


def _cpu() -> str:
    """A name for this kind of CPU: the architecture and a hash of its instruction sets."""
    told = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        keys = ("model name", "flags", "CPU part", "Features")
        # Of the first core, or of each kind of core where they differ.
        told = "\n".join(sorted({line for line in lines if line.startswith(keys)}))
    return f"{platform.machine().lower()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def drop_oldest(folder: Path, limit: float) -> None:
    """Deletes the oldest files of a folder as long as all together have more bytes than `limit`."""
    with os.scandir(folder) as entries:
        files = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in entries if e.is_file()]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with contextlib.suppress(OSError):  # another process was faster
            os.remove(path)
        total -= size
