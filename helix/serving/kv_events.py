"""What is cached, told to routers over ZMQ in the wire format of vLLM's KV events.

Every message of the PUB socket has three frames: the topic, a number that counts up from 0 as 8 bytes, big-endian, and
a batch in msgpack, [time in seconds, [event, ...], 0]. An event is a map: its "type" is BlockStored, BlockRemoved or
AllBlocksCleared. Hashes are those of ``helix.cache.events`` as integers of 64 bits; whole blocks are told alone.

Who missed something sends an empty frame and the number that it lacks first, as 8 bytes, from a DEALER to the ROUTER
socket. It gets each batch from there on, behind an empty frame its number and the batch, and last the number 2**64 - 1.
Of what is too old to be kept it gets a batch instead that clears everything and stores all that is cached, under the
number of the last batch that it stands for; so whoever comes late asks from 0.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import numpy as np

from ..cache.events import DEVICE, HOST, CacheEvent

KEPT_BATCHES = 1000
POLL_MS = 20
END = (2**64 - 1).to_bytes(8, "big")
_MEDIA = {DEVICE: "GPU", HOST: "CPU"}
_log = logging.getLogger(__name__)


class _Event(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """An event as it travels."""


class BlockStored(_Event, frozen=True, tag=True):
    """A block can be found; ``extra_keys`` holds the salt of a sequence's first block."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None


class BlockRemoved(_Event, frozen=True, tag=True):
    """A block cannot be found in a medium any more."""

    block_hashes: list[int]
    medium: str


class AllBlocksCleared(_Event, frozen=True, tag=True):
    """Nothing is cached."""


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """Events in their order."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int = 0


class Publisher:
    """Publishes the events of one rank's cache; ``note`` listens to it.

    Args:
        endpoint: where the PUB socket binds, tcp://HOST:PORT or ipc://PATH.
        replay: where the ROUTER socket binds; None answers nobody.
        topic: of every message.
        block_size: tokens of a whole block.

    Raises:
        ValueError: where an endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, replay: str | None, topic: str, block_size: int) -> None:
        import zmq

        self._context: Any = zmq.Context()
        self._pub = self._bound(zmq.PUB, endpoint, "serve.kv_events")
        self._router = None if replay is None else self._bound(zmq.ROUTER, replay, "serve.kv_events_replay")
        self._topic, self._block_size = topic.encode(), block_size
        self._queue: SimpleQueue[CacheEvent] = SimpleQueue()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._cached: dict[str, CacheEvent] = {}  # of every block, the last event, by its hash
        self._number = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _bound(self, kind: int, endpoint: str, name: str) -> Any:
        import zmq

        sock = self._context.socket(kind)
        if kind == zmq.ROUTER:  # it drops what is beyond: a whole replay and its end have to fit
            sock.setsockopt(zmq.SNDHWM, 2 * KEPT_BATCHES)
        if "[" in endpoint:
            sock.setsockopt(zmq.IPV6, 1)
        try:
            sock.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"{name} = {endpoint} cannot be bound: {error.strerror}") from error
        return sock

    def note(self, event: CacheEvent) -> None:
        """Take an event, to be published by a thread of its own; RuntimeError where that has failed."""
        if not self._thread.is_alive():
            raise RuntimeError("serve.kv_events: the thread that publishes has failed")
        if event.num_tokens == self._block_size:
            self._queue.put(event)

    def close(self) -> None:
        """Publish what is left, and hang up."""
        self._ends.set()
        self._thread.join(2.0)
        self._context.destroy(linger=200)

    def _run(self) -> None:
        while not self._ends.is_set():
            if self._router is None:
                time.sleep(POLL_MS / 1e3)
            elif self._router.poll(POLL_MS):
                self._publish()  # first, so that what is asked for is as new as can be
                self._replay(self._router.recv_multipart())
            self._publish()
        self._publish()

    def _publish(self) -> None:
        """Send a batch of all events that wait, if there are any."""
        events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        while True:
            try:
                events += self._told(self._queue.get_nowait())
            except Empty:
                break
        if events:
            data = msgspec.msgpack.encode(Batch(time.time(), events))
            self._pub.send_multipart((self._topic, self._number.to_bytes(8, "big"), data))
            self._kept.append((self._number, data))
            self._number += 1

    def _told(self, event: CacheEvent) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Return an event as it travels, and note what is cached."""
        if event.event == "removed":
            self._cached.pop(event.hash, None)
            return [BlockRemoved([int(event.hash, 16)], _MEDIA[event.tier])]
        self._cached[event.hash] = event
        if event.event == "stored":
            return [_stored(event)]
        return [_stored(event), BlockRemoved([int(event.hash, 16)], _MEDIA[HOST if event.tier == DEVICE else DEVICE])]

    def _everything(self) -> Batch:
        """Return a batch that stores all that is cached, parents before their children, and nothing else."""
        told: set[str] = set()
        events: list[BlockStored | BlockRemoved | AllBlocksCleared] = [AllBlocksCleared()]
        for name in self._cached:
            chain: list[CacheEvent] = []
            while name in self._cached and name not in told:
                told.add(name)
                chain.append(self._cached[name])
                name = chain[-1].parent
            events += map(_stored, reversed(chain))
        return Batch(time.time(), events)

    def _replay(self, frames: list[bytes]) -> None:
        """Answer who asks for batches from a number on."""
        assert self._router is not None
        if len(frames) != 3 or len(frames[2]) != 8:
            _log.info(
                "serve.kv_events_replay: dropped a request of %d frames, must be a number of 8 bytes", len(frames)
            )
            return
        client, start = frames[0], int.from_bytes(frames[2], "big")
        batches = [(number, data) for number, data in self._kept if number >= start]
        if start < self._number - len(self._kept):
            batches = [(self._number - 1, msgspec.msgpack.encode(self._everything()))]
        for number, data in batches:
            self._router.send_multipart((client, b"", number.to_bytes(8, "big"), data))
        self._router.send_multipart((client, b"", END, b""))


def _stored(event: CacheEvent) -> BlockStored:
    return BlockStored(
        block_hashes=[int(event.hash, 16)],
        parent_block_hash=None if event.salt is not None else int(event.parent, 16),
        token_ids=np.frombuffer(event.tokens, "<i4").tolist(),
        block_size=event.num_tokens,
        lora_id=None,
        medium=_MEDIA[event.tier],
        lora_name=None,
        extra_keys=[[event.salt.decode("utf-8", "replace")]] if event.salt else None,
    )
