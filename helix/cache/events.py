"""What is cached, told as it changes, so that a router can send requests where their prefix is.

A block is named by the hash of all tokens up to its end:

    hash(block) = blake2b-64(hash(parent) + the block's tokens as little-endian int32)
    hash(root)  = blake2b-64(salt as UTF-8)        the parent of a sequence's first block

Hashes are 16 hexadecimal digits, equal on every rank, and depend on tokens and salt alone, so that a router can compute
them itself. All ranks see the same events in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

HASH_BYTES = 8
DEVICE, HOST = "device", "host"


def root_hash(salt: bytes) -> bytes:
    """Return the hash that stands before the first block of sequences with a salt (UTF-8)."""
    return hashlib.blake2b(salt, digest_size=HASH_BYTES).digest()


def block_hash(parent: bytes, key: bytes) -> bytes:
    """Return the hash of a block by its parent's and its tokens (little-endian int32)."""
    return hashlib.blake2b(parent + key, digest_size=HASH_BYTES).digest()


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One change of one block.

    Attributes:
        event: stored (it can be found from now on), removed (it cannot), or moved (to the other tier).
        hash: the block's name.
        parent: the name of the block before it, or of the root.
        tier: device or host, after the change; for removed, before it.
        rank: the KVP rank that holds it.
        num_tokens: its tokens; fewer than a block's for the end of a sequence.
        tokens: as little-endian int32.
        salt: of a sequence's first block, UTF-8; None for the others.
    """

    event: str
    hash: str
    parent: str
    tier: str
    rank: int
    num_tokens: int
    tokens: bytes = b""
    salt: bytes | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the event in the form of a JSON line, which names tokens by their hash alone."""
        return {name: value for name, value in asdict(self).items() if name not in ("tokens", "salt")}


Listener = Callable[[CacheEvent], None]
