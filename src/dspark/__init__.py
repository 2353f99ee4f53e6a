"""dspark: a draft head grafted on a language model you already have; it answers faster and says exactly the same.

The public names are loaded on first use, so `import dspark` is cheap."""

import contextlib
import gc
import importlib
from collections.abc import Iterator

__version__ = "0.1.0"

PUBLIC = {
    "load_target": "dspark.target.load",
    "load_head": "dspark.head.folder",
    "generate": "dspark.generation",
    "graft": "dspark.grafting",
    "ungraft": "dspark.grafting",
    "Engine": "dspark.engine.engine",
    "Request": "dspark.engine.request",
    "UserError": "dspark.errors",
}
__all__ = ["Engine", "Request", "UserError", "__version__", "generate", "graft", "load_head", "load_target", "ungraft"]


@contextlib.contextmanager
def collector_waits() -> Iterator[None]:
    """Python's garbage collector is off: while imports make a million objects that stay, it would look through all of them again and
    again, a fifth of the time that takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module 'dspark' has no attribute {name!r}")
    with collector_waits():
        value = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value
