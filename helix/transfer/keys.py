"""The keys of both ends of a connection, made from the secret that both know: HKDF (RFC 5869), then Curve25519."""

from __future__ import annotations

import hmac

import zmq
from zmq.utils import z85


def key_pair(secret: bytes, end: str) -> tuple[bytes, bytes]:
    """Return the public and the private key of an end, listener or connector, in Z85; who knows the secret has both."""
    private = z85.encode(hkdf_sha256(secret, b"helix transfer, " + end.encode()))
    return zmq.curve_public(private), private


def hkdf_sha256(secret: bytes, info: bytes, *, salt: bytes = b"", num_bytes: int = 32) -> bytes:
    """Return ``num_bytes`` bytes of a key for a purpose, ``info``, as RFC 5869 makes them from a secret by SHA-256."""
    pseudorandom_key = hmac.digest(salt, secret, "sha256")
    block, key = b"", b""
    while len(key) < num_bytes:
        block = hmac.digest(pseudorandom_key, block + info + bytes([len(key) // 32 + 1]), "sha256")
        key += block
    return key[:num_bytes]
