"""Train neural networks over thin wires: the public API, loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thinwire.comm.allreduce import allreduce as allreduce
    from thinwire.comm.errors import CommError as CommError
    from thinwire.comm.errors import PeerFailedError as PeerFailedError
    from thinwire.comm.errors import PeerLateError as PeerLateError
    from thinwire.comm.errors import PeerLostError as PeerLostError
    from thinwire.launch.join import init as init

# Name -> module that defines it. Nothing here imports torch until the name is used.
_PUBLIC = {
    "CommError": "thinwire.comm.errors",
    "PeerFailedError": "thinwire.comm.errors",
    "PeerLateError": "thinwire.comm.errors",
    "PeerLostError": "thinwire.comm.errors",
    "allreduce": "thinwire.comm.allreduce",
    "init": "thinwire.launch.join",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'thinwire' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
