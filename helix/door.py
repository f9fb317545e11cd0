"""The one way into a running world: a broadcast from rank 0, once a step, of all that rank 0 alone can see.

That is the clock, the commands that wait in its inbox, where stop strings ended a text, and what the other group of a
transfer said. It is taken while a step is in flight, where steps are launched ahead, and every rank applies it between
steps, in order. What it holds was checked before; decisions are never sent.

A broadcast is one message of ``INLINE_BYTES``; what does not fit follows in a second one. A world without work waits
on rank 0's inbox and broadcasts a heartbeat now and then, so that the others' wait never reaches its time-out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from parallel.launch import host_group

from .commands import Cut, encode

INLINE_BYTES = 1024
HEARTBEAT_S = 1.0
_HEADER_BYTES = 16  # int64 each: payload bytes, and whether rank 0 failed


class Turn(msgspec.Struct, frozen=True):
    """What a step begins with, the same on every rank.

    Attributes:
        now: rank 0's clock, in seconds.
        commands: encoded, in their order.
        news: what the front has heard, in a form of its own.
    """

    now: float
    commands: list[msgspec.Raw]
    news: bytes = b""


class DoorClosed(RuntimeError):
    """Rank 0 failed where it alone acts; the message is its own."""


class Source(Protocol):
    """Where rank 0's commands come from."""

    def take(self, wait_s: float) -> list[bytes]:
        """Return encoded commands; where there are none, wait for one so many seconds at most."""


class Door:
    """Shares what rank 0 sees.

    Args:
        source: rank 0's; nobody reads another rank's.
        timeout_s: bound of a collective, in seconds.
    """

    def __init__(self, source: Source, *, timeout_s: float) -> None:
        self._source = source
        self._heartbeat_s = min(HEARTBEAT_S, timeout_s / 4)
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._buffer = torch.zeros(INLINE_BYTES, dtype=torch.uint8)
        self._bytes = self._buffer.numpy()
        self._header = self._bytes[:_HEADER_BYTES].view("<i8")

    def share(self, cuts: list[Cut], listen: Callable[[], bytes], *, idle: bool) -> Turn:
        """Return the next turn. Collective over the world.

        Args:
            cuts: what rank 0 found in the text of the last step.
            listen: gives rank 0's news.
            idle: there is nothing to do before something comes: rank 0 waits for it, for a heartbeat at most.

        Raises:
            DoorClosed: on all other ranks, where collecting failed on rank 0, which raises what it met.
        """
        if self._alone:
            return self._collect(cuts, listen, idle)
        if dist.get_rank() != 0:
            return self._receive()
        try:
            turn = self._collect(cuts, listen, idle)
        except BaseException as error:
            self._send(f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace"), failed=True)
            raise
        self._send(msgspec.msgpack.encode(turn))
        return turn

    def _collect(self, cuts: list[Cut], listen: Callable[[], bytes], idle: bool) -> Turn:
        commands = [encode(cut) for cut in cuts] + self._source.take(self._heartbeat_s if idle else 0.0)
        return Turn(time.monotonic(), [msgspec.Raw(command) for command in commands], listen())

    def _send(self, payload: bytes, failed: bool = False) -> None:
        self._header[:] = len(payload), failed
        inline = payload[: INLINE_BYTES - _HEADER_BYTES]
        self._bytes[_HEADER_BYTES : _HEADER_BYTES + len(inline)] = np.frombuffer(inline, np.uint8)
        dist.broadcast(self._buffer, 0, group=host_group())
        if len(payload) > len(inline):
            rest = np.frombuffer(payload, np.uint8, offset=len(inline)).copy()
            dist.broadcast(torch.from_numpy(rest), 0, group=host_group())

    def _receive(self) -> Turn:
        dist.broadcast(self._buffer, 0, group=host_group())
        num_bytes, failed = self._header.tolist()
        payload = self._bytes[_HEADER_BYTES : _HEADER_BYTES + num_bytes].tobytes()
        if num_bytes > len(payload):
            rest = torch.empty(num_bytes - len(payload), dtype=torch.uint8)
            dist.broadcast(rest, 0, group=host_group())
            payload += rest.numpy().tobytes()
        if failed:
            raise DoorClosed(f"rank 0 failed: {payload.decode()}")
        return msgspec.msgpack.decode(payload, type=Turn)
