"""The connections between prefill ranks and the decode group's rank 0: messages over ZeroMQ, encrypted by CURVE.

 1. Both ends make two key pairs from the shared secret, the listener's and the connectors'. A connector speaks to the
    holder of the one only, and the listener lets in holders of the other only (ZAP): each proves that it knows the
    secret before a byte of its messages is parsed. Session keys are fresh, so that a recorded frame is refused in
    another connection, in the other direction, and a second time.
 2. The listener is a ROUTER, each connector a DEALER whose first frame is empty, a greeting. Another empty frame says
    that an end closes the connection, since a ROUTER cannot hang up on one of its peers.
 3. A connection that ends is lost for good: nobody connects again in silence. ZeroMQ's monitor tells what ends one: a
    peer that is gone, answers no heartbeat, or sends what is too long or not signed by it. A frame that is authentic
    but holds no valid message is dropped, with a log line.

Nothing blocks: ZeroMQ's own thread sends what is queued, receives, and answers heartbeats.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from .keys import key_pair
from .protocol import MAX_MESSAGE_BYTES, Message, MessageError, decode, encode
from .requirements import SAME_SECRET, SECRET_VARIABLE, resolve

HANDSHAKE_S = 5.0  # a connection that has not proved itself by then is closed
SILENCE_S = 120.0
RETRY_S = 0.1
CLOSE_MS = 1000  # what is queued at the end has so long to leave
FORGED_S = 1.0
MAX_QUEUED = 100_000  # messages to a peer that does not read
_OVERHEAD_BYTES = 64  # of a frame of CURVE; it is 33
_CLOSED, _CLOSED_HERE, _UNANSWERED = "the peer closed it", "closed here", "it did not answer"
_ENDED = f"it ended: the peer is gone or silent, or sent a message of more than {MAX_MESSAGE_BYTES} bytes"
_FORGED = "a message that was not signed by the peer"
_NO_DETAIL, _AUTH = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_AUTH
_FAILURES = (_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, _AUTH)
_OTHER_KEY = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_log = logging.getLogger(__name__)


class ChannelLost(ConnectionError):
    """A connection could not be made, or has ended; the message says why."""


class _End:
    """A socket with the channels that go over it."""

    def __init__(self, kind: int, secret: bytes, silence_s: float, ends: tuple[str, str], **options: Any) -> None:
        (public, private), (self._other, _) = (key_pair(secret, end) for end in ends)
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        options.update(
            curve_publickey=public,
            curve_secretkey=private,
            handshake_ivl=int(HANDSHAKE_S * 1000),
            heartbeat_ivl=max(1, int(silence_s * 250)),
            heartbeat_timeout=max(1, int(silence_s * 1000)),
            maxmsgsize=MAX_MESSAGE_BYTES + _OVERHEAD_BYTES,
            sndhwm=MAX_QUEUED,
            rcvhwm=MAX_QUEUED,
            linger=0,  # for connections that end by themselves
        )
        for name, value in options.items():
            setattr(self.socket, name, value)
        self._monitor = self.socket.get_monitor_socket()
        self.pollable = [self.socket, self._monitor]
        self._failure: tuple[int, int] | None = None  # an event that the end of its connection follows
        self._failed_at = 0.0

    def pump(self) -> None:
        """Deal messages to their channels and note what becomes of connections, the end of each after its messages."""
        while not self.socket.closed and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            self._read()
            if event["event"] in _FAILURES:
                self._failure, self._failed_at = (event["event"], event["value"]), time.monotonic()
            self._note(event["event"], event["value"])
        self._read()

    def _read(self) -> None:
        while not self.socket.closed and self.socket.poll(0):
            self._take(self.socket.recv_multipart(copy=False))

    def _endpoint(self, address: tuple[Any, ...]) -> str:
        self.socket.ipv6 = ":" in address[0]
        return "tcp://[{}]:{}".format(*address)

    def post(self, frames: list[bytes]) -> str | None:
        """Queue frames to a peer; returns why its connection is lost, if it is."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return f"the peer does not read: {MAX_QUEUED} messages wait for it"
        except zmq.ZMQError:  # a ROUTER whose peer is gone
            return _ENDED
        return None

    def close(self, linger_ms: int = CLOSE_MS) -> None:
        """End all connections; what is queued has ``linger_ms`` to leave."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self._context.destroy(linger_ms)

    def drop(self, channel: Channel) -> None:
        """Take note that a channel is lost."""

    def _take(self, frames: Sequence[zmq.Frame]) -> None:
        raise NotImplementedError

    def _note(self, event: int, value: int) -> None:
        raise NotImplementedError


class Channel:
    """An authenticated and encrypted connection.

    Attributes:
        name: who is at the other end, for messages.
        lost: why it has ended; None while it is open.
        inbox: what has arrived and was not received yet.
    """

    def __init__(self, name: str, end: _End, route: list[bytes]) -> None:
        self.name, self.end, self._route = name, end, route
        self.inbox: deque[bytes] = deque()
        self.lost: str | None = None

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens on a lost connection."""
        payload = encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"a {type(message).__name__} of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES}")
        if self.lost is None and (problem := self.end.post([*self._route, payload])):
            self.lose(problem)

    def receive(self) -> list[Message]:
        """Look what has arrived, and return it as ``messages`` does."""
        self.end.pump()
        return self.messages()

    def messages(self) -> list[Message]:
        """Return the valid messages that were dealt to it; what else arrived is dropped with a log line."""
        messages: list[Message] = []
        while self.inbox:
            try:
                messages.append(decode(self.inbox.popleft()))
            except MessageError as error:
                _log.warning("dropped a malformed message from %s: %s", self.name, error)
        return messages

    def take(self, payload: bytes) -> None:
        """Keep what has arrived."""
        if not payload:
            self.lose(_CLOSED)
        elif self.lost is None:
            self.inbox.append(payload)

    def close(self, reason: str = _CLOSED_HERE) -> None:
        """End the connection; what was sent before still leaves."""
        if self.lost is None:
            self.end.post([*self._route, b""])
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """Note that the connection has ended."""
        if self.lost is None:
            self.lost = reason
            self.end.drop(self)


class Listener(_End):
    """Waits for connectors that know the secret. Whatever others send, it goes on.

    Args:
        bind: the address of the interface; loopback unless others are meant to come in.
        port: 0 takes any.
        secret: the shared secret.
        silence_s: a peer that answers no heartbeat for so long is lost, in seconds.

    Attributes:
        num_refused: connections whose secret was another one.

    Raises:
        OSError: when the port cannot be had.
    """

    def __init__(self, bind: str, port: int, secret: bytes, silence_s: float = SILENCE_S) -> None:
        ends = "listener", "connector"
        super().__init__(zmq.ROUTER, secret, silence_s, ends, curve_server=1, zap_domain=b"helix", router_mandatory=1)
        self.num_refused = 0
        self._channels: dict[bytes, Channel] = {}
        self._by_descriptor: dict[int, Channel] = {}
        self._new: list[Channel] = []
        self._doorman = self._context.socket(zmq.REP)
        self._doorman.bind("inproc://zeromq.zap.01")
        self.pollable.append(self._doorman)
        try:
            self.socket.bind(self._endpoint(resolve(bind, port)[0]))
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, error.strerror) from error
        self.port = int(self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def poll(self, timeout_s: float = 0.0) -> list[Channel]:
        """Return the connections that have proved themselves since; waits ``timeout_s`` at most for something new."""
        zmq.select(self.pollable, [], [], timeout_s)
        self.pump()
        new, self._new = self._new, []
        return new

    def pump(self) -> None:
        """Deal messages, note what becomes of connections, and let in the holders of the connectors' key."""
        super().pump()
        while not self.socket.closed and self._doorman.poll(0):
            version, request, *_, key = self._doorman.recv_multipart()
            status = b"200" if key == z85.decode(self._other) else b"400"
            self._doorman.send_multipart([version, request, status, b"", b"", b""])
        if self._failure is not None and time.monotonic() - self._failed_at > FORGED_S:
            # ZeroMQ stops reading a connection that has carried what its peer did not sign, and does not say which.
            # That no attempt to connect has failed shows in that the end of a connection does not follow.
            self._failure = None
            for channel in self._channels.values():
                channel.close(_FORGED)

    def _take(self, frames: Sequence[zmq.Frame]) -> None:
        route, frame = frames[0].bytes, frames[-1]
        if route in self._channels:
            self._channels[route].take(frame.bytes)
            return
        channel = Channel(str(frame.get("Peer-Address")), self, [route])
        self._channels[route] = self._by_descriptor[int(frame.get(zmq.SRCFD))] = channel
        self._new.append(channel)

    def _note(self, event: int, value: int) -> None:
        if event != zmq.EVENT_DISCONNECTED:
            return
        failure, self._failure = self._failure, None
        if channel := self._by_descriptor.pop(value, None):
            channel.lose(_FORGED if failure else _ENDED)
        elif failure is not None and (failure == _OTHER_KEY or failure[0] == _AUTH):
            self.num_refused += 1
            _log.warning("dropped a connection: its %s differs from this group's; %s", SECRET_VARIABLE, SAME_SECRET)
        else:
            _log.warning("dropped a connection that has not proved itself in %g s: it is no prefill rank", HANDSHAKE_S)


class _Connector(_End):
    """An attempt at a connection to a listener, and what has become of it."""

    def __init__(self, address: tuple[Any, ...], name: str, secret: bytes, silence_s: float) -> None:
        ends = "connector", "listener"
        super().__init__(zmq.DEALER, secret, silence_s, ends, reconnect_ivl=-1, probe_router=1)
        self.channel, self.proved = Channel(name, self, []), False
        self.socket.curve_serverkey = self._other
        self.socket.connect(self._endpoint(address))

    def attempt(self, deadline: float) -> str | None:
        """Return None once both ends have proved themselves, otherwise why another attempt may do better.

        Raises:
            ChannelLost: where none may.
        """
        while not self.proved and self.channel.lost is None:
            zmq.select(self.pollable, [], [], RETRY_S)
            self.pump()
            if time.monotonic() > deadline and not self.proved:
                self.channel.lose(_UNANSWERED)
        if not self.proved and self.channel.lost == _ENDED:
            raise ChannelLost(f"no connection to the decode group at {self.channel.name}: {self._why()}")
        return None if self.proved else self.channel.lost

    def drop(self, channel: Channel) -> None:
        """Close the socket: it has no other channel."""
        self.close(CLOSE_MS if channel.lost in (_CLOSED_HERE, _FORGED) else 0)

    def _why(self) -> str:
        if self._failure == _OTHER_KEY:
            return f"it does not prove that it knows {SECRET_VARIABLE} itself; {SAME_SECRET}"
        if self._failure is not None and self._failure[0] in (_NO_DETAIL, _AUTH):
            return f"it refused this rank, whose {SECRET_VARIABLE} differs from its own; {SAME_SECRET}"
        return "something else listens there; see transfer.address"

    def _take(self, frames: Sequence[zmq.Frame]) -> None:
        self.channel.take(frames[-1].bytes)

    def _note(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.proved = True
        elif event in _FAILURES and self.proved:
            self.channel.close(_FORGED)
        elif event == zmq.EVENT_CLOSED:
            self.channel.lose("nobody listens")
        elif event == zmq.EVENT_DISCONNECTED:
            self.channel.lose(_UNANSWERED if self._failure == (_NO_DETAIL, errno.EAGAIN) else _ENDED)


def connect(host: str, port: int, secret: bytes, timeout_s: float, silence_s: float = SILENCE_S) -> Channel:
    """Connect to a listener, which may come up later, and prove to each other that both know the secret.

    Args:
        host, port: the listener's.
        secret: the shared secret.
        timeout_s: how long to try, in seconds.
        silence_s: a listener that answers no heartbeat for so long is lost, in seconds.

    Raises:
        ChannelLost: when nobody listens within ``timeout_s`` seconds; at once when whoever does knows another secret.
    """
    deadline = time.monotonic() + timeout_s
    num_tried = 0
    while True:
        problem: str | None
        try:
            addresses = resolve(host, port)
            end = _Connector(addresses[num_tried % len(addresses)], f"{host}:{port}", secret, silence_s)
            problem = end.attempt(deadline)
            if problem is None:
                return end.channel
        except socket.gaierror as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise ChannelLost(f"nobody listened at {host}:{port} for {timeout_s:g} s ({problem})")
        num_tried += 1
        time.sleep(RETRY_S)


def wait_for(channels: Sequence[Channel], timeout_s: float) -> None:
    """Wait until an open channel has something to read, at most ``timeout_s`` seconds, and deal what has arrived."""
    still_open = [channel for channel in channels if channel.lost is None]
    ends = {id(channel.end): channel.end for channel in still_open}
    if not still_open:
        time.sleep(timeout_s)
    elif timeout_s and not any(channel.inbox for channel in still_open):
        zmq.select([each for end in ends.values() for each in end.pollable], [], [], timeout_s)
    for end in ends.values():
        end.pump()
