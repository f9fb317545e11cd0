"""One connection between a prefill rank and the decode group's rank 0: authenticated frames over TCP.

 1. The listener sends 32 random bytes. The connector answers with 32 of its own and proves that it knows the shared
    secret: HMAC-SHA256 over both. The listener proves the same, or answers with fixed bytes that its secret is another
    one, which is all that they tell. Nothing before that is parsed.
 2. From then on a frame is: length (4 bytes, big-endian), HMAC over its number in the stream and its bytes, its bytes.
    Keys are made from the secret and both random values, one for each direction, so that a recorded frame is refused in
    another connection, in the other direction, and a second time.
 3. A frame that is too long, or whose HMAC is wrong, ends the connection: what follows cannot be trusted. A frame that
    is authentic but holds no valid message is dropped, with a log line.

Frames are authenticated, not encrypted. Nothing blocks: a channel keeps what could not be sent, and ``flush`` goes on.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .protocol import MAX_MESSAGE_BYTES, Message, MessageError, decode, encode
from .requirements import SAME_SECRET, SECRET_VARIABLE

_log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0  # a connection that has not proved itself by then is closed
MAX_PENDING = 64  # connections that may try to prove themselves at once
RETRY_S = 0.1
_MAGIC = b"helix-transfer-1"
_NONCE = 32
_MAC = 32
_REFUSAL = b"your secret is another one".ljust(_MAC, b"\0")  # in the place of the listener's proof
_LENGTH = 4
_READ_BYTES = 1 << 20
_CLOSED = "the peer closed it"


class ChannelLost(ConnectionError):
    """A connection could not be made, or has ended; the message says why."""


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


class Channel:
    """An authenticated connection.

    Attributes:
        name: who is at the other end, for messages.
        lost: why it has ended; None while it is open.
    """

    def __init__(self, sock: socket.socket, name: str, send_key: bytes, receive_key: bytes) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.name = sock, name
        self._keys = send_key, receive_key
        self._num_sent = self._num_received = 0
        self._outgoing, self._incoming = bytearray(), bytearray()
        self.lost: str | None = None

    def fileno(self) -> int:
        """Return the socket's number, to wait for it."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Queue a message and send what the socket takes; nothing happens on a lost connection."""
        payload = encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"a {type(message).__name__} of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES}")
        mac = _mac(self._keys[0], self._num_sent.to_bytes(8, "big"), payload)
        self._num_sent += 1
        self._outgoing += len(payload).to_bytes(_LENGTH, "big") + mac + payload
        self.flush()

    def flush(self) -> bool:
        """Send what the socket takes; return whether everything was sent."""
        while self._outgoing and self.lost is None:
            try:
                sent = self._socket.send(memoryview(self._outgoing)[:_READ_BYTES])
            except BlockingIOError:
                return False
            except OSError as error:
                self._lose(str(error))
                return True
            del self._outgoing[:sent]
        return True

    def receive(self) -> list[Message]:
        """Return the valid messages that have arrived; what else arrived is dropped with a log line."""
        self._read()
        messages: list[Message] = []
        while len(self._incoming) >= _LENGTH:
            length = int.from_bytes(self._incoming[:_LENGTH], "big")
            if length > MAX_MESSAGE_BYTES:
                self._forget(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are read")
                break
            if len(self._incoming) < _LENGTH + _MAC + length:
                break
            payload = bytes(self._incoming[_LENGTH + _MAC : _LENGTH + _MAC + length])
            mac = _mac(self._keys[1], self._num_received.to_bytes(8, "big"), payload)
            if not hmac.compare_digest(mac, bytes(self._incoming[_LENGTH : _LENGTH + _MAC])):
                self._forget("a message that was not signed by the peer")
                break
            self._num_received += 1
            del self._incoming[: _LENGTH + _MAC + length]
            try:
                messages.append(decode(payload))
            except MessageError as error:
                _log.warning("dropped a malformed message from %s: %s", self.name, error)
        if self.lost == _CLOSED and self._incoming:
            self.lost = f"it ended inside a message, after {len(self._incoming)} bytes"
            self._incoming.clear()
            _log.warning("dropped a truncated message from %s: %s", self.name, self.lost)
        return messages

    def close(self) -> None:
        """End the connection."""
        self._lose("closed here")

    def _read(self) -> None:
        while self.lost is None and len(self._incoming) < _LENGTH + _MAC + MAX_MESSAGE_BYTES:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(str(error))
                return
            if not data:
                self._lose(_CLOSED)
                return
            self._incoming += data

    def _forget(self, problem: str) -> None:
        self._incoming.clear()
        self._lose(problem)
        _log.warning("dropped %s from %s, and the connection", problem, self.name)

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self._socket.close()


@dataclass(slots=True)
class _Pending:
    """A connection that has yet to prove itself."""

    sock: socket.socket
    name: str
    nonce: bytes
    deadline: float
    data: bytearray = field(default_factory=bytearray)


class Listener:
    """Waits for connectors that know the secret. Whatever others send, it goes on.

    Args:
        bind: the address of the interface; loopback unless others are meant to come in.
        port: 0 takes any.
        secret: the shared secret.

    Attributes:
        num_refused: connections whose secret was another one.

    Raises:
        OSError: when the port cannot be had.
    """

    def __init__(self, bind: str, port: int, secret: bytes) -> None:
        self._secret = secret
        self._pending: list[_Pending] = []
        self._socket = socket.create_server((bind, port), backlog=MAX_PENDING)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.num_refused = 0

    def poll(self, timeout_s: float = 0.0) -> list[Channel]:
        """Return the connections that have proved themselves since; waits ``timeout_s`` at most for something new."""
        _wait_readable([self._socket, *(each.sock for each in self._pending)], timeout_s)
        self._accept()
        proved: list[Channel] = []
        for each in list(self._pending):
            channel, problem = self._advance(each)
            if channel is None and problem is None:
                continue
            self._pending.remove(each)
            if channel is not None:
                proved.append(channel)
            else:
                each.sock.close()
                _log.warning("dropped a connection from %s: %s", each.name, problem)
        return proved

    def close(self) -> None:
        """Stop listening; connections that have proved themselves stay."""
        for each in self._pending:
            each.sock.close()
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError:  # nobody else is waiting, or who was has gone
                return
            name = f"{address[0]}:{address[1]}"
            if len(self._pending) == MAX_PENDING:
                sock.close()
                _log.warning("dropped a connection from %s: %d others are being checked", name, MAX_PENDING)
                continue
            sock.setblocking(False)
            each = _Pending(sock, name, secrets.token_bytes(_NONCE), time.monotonic() + HANDSHAKE_S)
            with suppress(OSError):  # ``_advance`` finds out
                sock.send(_MAGIC + each.nonce)
            self._pending.append(each)

    def _advance(self, each: _Pending) -> tuple[Channel | None, str | None]:
        """Return the channel of a connection that has proved itself, or why it is to be dropped, or neither yet."""
        wanted = len(_MAGIC) + _NONCE + _MAC
        try:
            data = each.sock.recv(wanted - len(each.data))
        except BlockingIOError:
            late = time.monotonic() > each.deadline
            return None, f"it has not proved itself within {HANDSHAKE_S:g} s" if late else None
        except OSError as error:
            return None, str(error)
        each.data += data
        if not data:
            return None, "it ended before it proved itself"
        if len(each.data) < wanted:
            return None, None
        theirs = bytes(each.data[len(_MAGIC) : len(_MAGIC) + _NONCE])
        right = _mac(self._secret, b"connector", each.nonce, theirs)
        if each.data[: len(_MAGIC)] != _MAGIC:
            return None, "it is no prefill rank"
        if not hmac.compare_digest(right, bytes(each.data[-_MAC:])):
            self.num_refused += 1
            with suppress(OSError):
                each.sock.send(_REFUSAL)
            return None, f"its {SECRET_VARIABLE} differs from this group's; {SAME_SECRET}"
        with suppress(OSError):  # the channel finds out
            each.sock.send(_mac(self._secret, b"listener", theirs, each.nonce))
        keys = _session_keys(self._secret, each.nonce, theirs)
        return Channel(each.sock, each.name, keys[0], keys[1]), None


def connect(host: str, port: int, secret: bytes, timeout_s: float) -> Channel:
    """Connect to a listener, which may come up later, and prove to each other that both know the secret.

    Raises:
        ChannelLost: when nobody listens within ``timeout_s`` seconds; at once when whoever does knows another secret.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), RETRY_S))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ChannelLost(f"nobody listened at {host}:{port} for {timeout_s:g} s ({error})") from error
            time.sleep(RETRY_S)
    try:
        sock.settimeout(max(deadline - time.monotonic(), HANDSHAKE_S))
        theirs, nonce = _prove_to_listener(sock, secret)
    except OSError as error:
        sock.close()
        raise ChannelLost(f"no connection to the decode group at {host}:{port}: {error}") from error
    keys = _session_keys(secret, theirs, nonce)
    return Channel(sock, f"{host}:{port}", keys[1], keys[0])


def _prove_to_listener(sock: socket.socket, secret: bytes) -> tuple[bytes, bytes]:
    """Do the connector's part of the handshake; return the listener's random bytes and this end's."""
    start = _read_exactly(sock, len(_MAGIC) + _NONCE)
    nonce, theirs = secrets.token_bytes(_NONCE), start[len(_MAGIC) :]
    if start[: len(_MAGIC)] != _MAGIC:
        raise ChannelLost("something else listens there; see transfer.address")
    sock.sendall(_MAGIC + nonce + _mac(secret, b"connector", theirs, nonce))
    answer = _read_exactly(sock, _MAC)
    if answer == _REFUSAL:
        raise ChannelLost(f"it refused this rank, whose {SECRET_VARIABLE} differs from its own; {SAME_SECRET}")
    if not hmac.compare_digest(answer, _mac(secret, b"listener", nonce, theirs)):
        raise ChannelLost(f"it does not prove that it knows {SECRET_VARIABLE} itself; {SAME_SECRET}")
    return theirs, nonce


def wait_for(channels: Sequence[Channel], timeout_s: float) -> None:
    """Wait until one of the open channels has something to read, at most ``timeout_s`` seconds."""
    still_open = [channel for channel in channels if channel.lost is None]
    if still_open:
        _wait_readable(still_open, timeout_s)
    else:
        time.sleep(timeout_s)


def _wait_readable(ends: Sequence[Channel | socket.socket], timeout_s: float) -> None:
    """Wait until one of the ends can be read. By ``poll``: ``select`` takes no descriptor above 1,023."""
    with selectors.PollSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        selector.select(timeout_s)


def _session_keys(secret: bytes, listener: bytes, connector: bytes) -> tuple[bytes, bytes]:
    """Return the keys of what the listener sends and of what the connector sends."""
    return _mac(secret, b"from listener", listener, connector), _mac(secret, b"from connector", listener, connector)


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionError("it closed the connection")
        data += part
    return data
