"""What a transfer needs of this machine, looked at before anything is loaded: packages, a secret, and a free port.

The packages are optional, so nothing here imports them, or a module that does, before it is asked to.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parallel.launch import Launch

from ..config import TransferConfig

SECRET_VARIABLE = "HELIX_TRANSFER_SECRET"
SAME_SECRET = f"set {SECRET_VARIABLE} to the same value in both groups"
MIN_SECRET_BYTES = 16
_INSTALL = "install it with: pip install -e .[transfer]"


def require(config: TransferConfig, launch: Launch) -> None:
    """Raise ValueError, in one line, where a package or the secret is missing, or this rank must listen and cannot."""
    try:
        import zmq
    except ImportError as error:
        raise ValueError(f"KV transfer needs pyzmq, which cannot be imported ({error}); {_INSTALL}") from error
    if not zmq.has("curve"):
        raise ValueError(f"KV transfer needs a pyzmq with CURVE, and this one has none; {_INSTALL}")
    import_nixl()
    if launch.store is None:
        shared_secret()
    if launch.rank == 0 and not config.prefills(launch.part):
        # Bound but not listening: a prefill group that waits already does not take this for the decode group.
        with naming_the_setting(config):
            [address, *_] = resolve(*place_to_listen(config))
            with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)


def place_to_listen(config: TransferConfig) -> tuple[str, int]:
    """Return the interface and the port of the decode group; port 0, any that is free, where no address is set."""
    return config.bind, config.host_and_port()[1] if config.address is not None else 0


def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    """Return the addresses of a host, IPv4 and IPv6; OSError where it has none."""
    return [each[4] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@contextmanager
def naming_the_setting(config: TransferConfig) -> Iterator[None]:
    """Turn an OSError of listening into a ValueError that begins with the setting at fault and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(
                f"transfer.address = {config.address}: the decode group cannot listen on port "
                f"{place_to_listen(config)[1]} ({os.strerror(error.errno)}); end what holds it, or give both groups "
                "another port"
            ) from error
        raise ValueError(
            f"transfer.bind = {config.bind} cannot be listened on ({error.strerror}); give the address of an interface "
            "of this machine, or 0.0.0.0 for all of them"
        ) from error


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


def shared_secret() -> bytes:
    """Return the secret that two worlds share; ValueError where it is missing or too short to be one."""
    value = os.environ.get(SECRET_VARIABLE, "").encode()
    if len(value) < MIN_SECRET_BYTES:
        problem = "is not set" if not value else f"has {len(value)} bytes"
        raise ValueError(
            f"{SECRET_VARIABLE} {problem}: two worlds need a shared secret of at least {MIN_SECRET_BYTES} bytes in the "
            f"environment of both; make one with: export {SECRET_VARIABLE}=$(openssl rand -hex 32)"
        )
    return value
