"""Values inside a model's forward pass, for whoever looks at them.

A model calls `tap` where a value is made. It is the identity and adds nothing to a program; only
within `watching` is it a call of the watcher. The backbone of a model has the taps

  map: (B, h, w, C), the output of each stage, before any norm for a head.

and, before the map of a stage, those of its mixers, block by block:

  token_weights: (B, h, w, heads), what an SSD mixer weighs a token with on its way into the state:
    m of NC-SSD, the step size dt of a scan.
  qkv: (B, h * w, 3C) of attention, see `vssd_jax.kernels.attention`; `heads` goes with it.

A detector has `proposals`: its regions, from which no gradient comes in training.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Watcher = Callable[..., Any]  # (name, value, **about) -> what takes the value's place

_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


def tap(name: str, value: T, **about: Any) -> T:
    """`value`, or what the watcher gives for it."""
    watcher = _watcher.get()
    return value if watcher is None else watcher(name, value, **about)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Within it each `tap` calls `watcher(name, value, **about)` and goes on with what it returns.

    What `jax.jit` has already traced outside of the context is not watched.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
