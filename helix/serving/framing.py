"""Messages on a stream socket between two processes of one machine: four bytes of length, little-endian, and a payload.

Both ends are this project's own and trust each other; what a payload means is wire.py's.
"""

from __future__ import annotations

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def pack(payload: bytes) -> bytes:
    """Return a payload as it travels."""
    return _LENGTH.pack(len(payload)) + payload


def read_frame(sock: socket.socket) -> bytes | None:
    """Wait for the next payload on a blocking socket; None where the other end has gone."""
    head = _read(sock, _LENGTH.size)
    return None if head is None else _read(sock, _LENGTH.unpack(head)[0])


async def next_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Wait for the next payload; None where the other end has gone."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_LENGTH.unpack(head)[0])
    except (asyncio.IncompleteReadError, OSError):
        return None


def _read(sock: socket.socket, num_bytes: int) -> bytes | None:
    data = bytearray(num_bytes)
    view, done = memoryview(data), 0
    while done < num_bytes:
        try:
            count = sock.recv_into(view[done:])
        except OSError:
            return None
        if count == 0:
            return None
        done += count
    return bytes(data)
