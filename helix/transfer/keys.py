"""The keys of both ends of a connection, made from the secret that both know: HKDF (RFC 5869), then Curve25519."""

from __future__ import annotations

import hmac

import zmq
from zmq.utils import z85


def key_pair(secret: bytes, end: str) -> tuple[bytes, bytes]:
    """Return the public and the private key of an end, listener or connector, in Z85; who knows the secret has both."""
    private = z85.encode(hkdf_sha256(secret, b"helix transfer, " + end.encode()))
    return zmq.curve_public(private), private


def hkdf_sha256(secret: bytes, info: bytes, *, salt: bytes = b"") -> bytes:
    """Return a key of 32 bytes for a purpose, ``info``: the first that RFC 5869 makes of a secret by SHA-256."""
    return hmac.digest(hmac.digest(salt, secret, "sha256"), info + b"\1", "sha256")
