"""KV events over ZMQ: a subscriber that comes late, or lost messages, knows what is cached all the same."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.serving import kv_events
from helix.serving.config import ServingConfig
from helix.serving.kv_events import END, Publisher
from parallel.placement import BlockCyclic

BLOCK = 4


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


class Router:
    """What a router makes of the messages: the tokens up to each block's end, by hash and medium."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, str], tuple[int, ...]] = {}
        self.next = 0

    def take(self, number: bytes, data: bytes) -> None:
        events: list[dict[str, Any]] = msgspec.msgpack.decode(data)[1]
        self.next = int.from_bytes(number, "big") + 1
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.known.clear()
            elif event["type"] == "BlockRemoved":
                del self.known[event["block_hashes"][0], event["medium"]]
            else:
                parent, before = event["parent_block_hash"], tuple[int, ...]()
                if parent is not None:
                    before = next(tokens for (name, _), tokens in self.known.items() if name == parent)
                assert event["block_size"] == BLOCK == len(event["token_ids"])
                self.known[event["block_hashes"][0], event["medium"]] = (*before, *event["token_ids"])

    def ask(self, context: zmq.Context[Any], address: str) -> None:
        """Ask for what it lacks."""
        with context.socket(zmq.DEALER) as sock:
            sock.connect(address)
            sock.send_multipart((b"", self.next.to_bytes(8, "big")))
            _, number, data = sock.recv_multipart()
            while number != END:
                self.take(number, data)
                _, number, data = sock.recv_multipart()


def serve(cache: CacheControl, token_ids: list[int], salt: str = "") -> None:
    """Cache the blocks of a sequence that begins and ends."""
    table = cache.admit(cache.claim(BlockKeys(token_ids, BLOCK, salt)), len(token_ids))
    assert table is not None
    cache.commit(table, len(token_ids))
    cache.release(table, len(token_ids))
    cache.take_movements()


def cached(cache: CacheControl) -> set[tuple[str, tuple[int, ...]]]:
    """What is in the tree, by medium and the tokens up to a block's end, in whole blocks."""
    found = set()
    for block in cache.blocks.tree.walk():
        chain = [block]
        while chain[-1].parent is not None and chain[-1].parent.depth >= 0:
            chain.append(chain[-1].parent)
        tokens = tuple(int.from_bytes(each.key[at : at + 4], "little") for each in reversed(chain)
                       for at in range(0, len(each.key), 4))  # fmt: skip
        if block.num_tokens == BLOCK:
            found.add((("GPU" if block.on_device else "CPU"), tokens))
    return found


def test_who_comes_late_or_lost_some_knows_what_is_cached(
    context: zmq.Context[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "KEPT_BATCHES", 3)
    addresses = [f"ipc://{tmp_path}/{name}" for name in ("events", "replay")]
    cache = CacheControl(BlockCyclic(BLOCK, 2), 4, host_pages=3)
    publisher = Publisher(*addresses, topic="kv@here", block_size=BLOCK)
    cache.listen(publisher.note)
    live, lossy, late = Router(), Router(), Router()
    with context.socket(zmq.SUB) as sock:
        sock.connect(addresses[0])
        sock.subscribe("kv@")
        sock.rcvtimeo = 20_000
        time.sleep(0.2)  # what is sent before a subscription has arrived is lost
        for turn in range(12):
            serve(cache, [turn // 2, *range(100 * (turn % 3), 100 * (turn % 3) + 9)], "salt" * (turn % 2))
            topic, number, data = sock.recv_multipart()
            assert topic == b"kv@here"
            live.take(number, data)
            if turn in (0, 1, 10, 11):
                lossy.ask(context, addresses[1])
        late.ask(context, addresses[1])
        while live.next < late.next:  # a turn may be told in two batches
            live.take(*sock.recv_multipart()[1:])
    publisher.close()
    expected = cached(cache)
    assert len(expected) > 8 and {medium for medium, _ in expected} == {"GPU", "CPU"}
    for router in (live, lossy, late):
        assert {(medium, tokens) for (_, medium), tokens in router.known.items()} == expected
        assert router.next == live.next


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kv_events": "tcp://*:5557"}, "tells other machines the tokens of prompts without a key"),
        ({"kv_events": "5557"}, "must be tcp://HOST:PORT or ipc://PATH"),
        ({"kv_events_replay": "tcp://127.0.0.1:1"}, "needs serve.kv_events"),
    ],
)
def test_endpoints_that_cannot_be_are_refused(settings: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ServingConfig(**settings)


def test_an_endpoint_that_is_taken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^serve.kv_events = ipc:///no/such/folder/x cannot be bound"):
        Publisher("ipc:///no/such/folder/x", None, "", BLOCK)
