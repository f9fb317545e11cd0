"""What a transfer needs of this machine, looked at before anything is loaded: its packages and the groups' secret.

The packages are optional, so nothing here imports them, or a module that does, before it is asked to.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from parallel.launch import Launch

SECRET_VARIABLE = "HELIX_TRANSFER_SECRET"
MIN_SECRET_BYTES = 16
_INSTALL = "install it with: pip install -e .[transfer]"


def require(launch: Launch) -> None:
    """Raise ValueError, in one line, when a package is missing or the environment lacks the secret."""
    try:
        import msgpack  # noqa: F401
    except ImportError as error:
        raise ValueError(f"KV transfer needs msgpack, which cannot be imported ({error}); {_INSTALL}") from error
    import_nixl()
    shared_secret(launch)


def import_nixl() -> Any:
    """Return the nixl package, its log records sent to ours; ValueError says how to get it."""
    try:
        import nixl
    except ImportError as error:
        raise ValueError(f"KV transfer needs NIXL, which cannot be imported ({error}); {_INSTALL}") from error
    logger = logging.getLogger("nixl")  # it prints INFO records to standard output, where output lines go
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return nixl


def shared_secret(launch: Launch) -> bytes | None:
    """Return the secret of the environment; a split world that has none makes its own."""
    value = os.environ.get(SECRET_VARIABLE)
    return None if launch.store is not None and not value else check_secret(value)


def check_secret(secret: str | None) -> bytes:
    """Return the secret's bytes; ValueError where it is missing or too short to be one."""
    value = (secret or "").encode()
    if len(value) < MIN_SECRET_BYTES:
        problem = "is not set" if not value else f"has {len(value)} bytes"
        raise ValueError(
            f"{SECRET_VARIABLE} {problem}: two worlds need a shared secret of at least {MIN_SECRET_BYTES} bytes in the "
            f"environment of both; make one with: export {SECRET_VARIABLE}=$(openssl rand -hex 32)"
        )
    return value
