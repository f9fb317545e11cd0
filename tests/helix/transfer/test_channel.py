"""What a connection lets through: only messages that the peer signed for this connection, each once and in order."""

import logging
import os
import resource
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from helix.transfer import channel as channels
from helix.transfer.channel import ChannelLost, Listener, connect
from helix.transfer.protocol import Ask, Cancel, End, Progress, encode

SECRET = b"a secret of some length"


@pytest.fixture
def listener():
    made = Listener("127.0.0.1", 0, SECRET)
    yield made
    made.close()


def accept(listener, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := listener.poll(0.02):
            return found[0]
    return None


def meet(listener, port=None):
    """Both ends of a connection, the listener's first; ``port`` is another way to it."""
    box = []
    thread = threading.Thread(target=lambda: box.append(connect("127.0.0.1", port or listener.port, SECRET, 5.0)))
    thread.start()
    mine = accept(listener)
    thread.join()
    return mine, box[0]


@pytest.fixture
def pair(listener):
    mine, theirs = meet(listener)
    yield mine, theirs
    mine.close()
    theirs.close()


def receive(channel, count, timeout_s=5.0):
    deadline, got = time.monotonic() + timeout_s, []
    while len(got) < count and channel.lost is None and time.monotonic() < deadline:
        got += channel.receive()
        time.sleep(0.002)
    return got


def raw(channel, data):
    channel._socket.setblocking(True)
    channel._socket.sendall(data)
    channel._socket.setblocking(False)


def test_messages_go_both_ways_in_order(pair):
    mine, theirs = pair
    for number in range(50):
        mine.send(Cancel(number))
        theirs.send(Progress(number, 3))
    assert receive(theirs, 50) == [Cancel(number) for number in range(50)]
    assert receive(mine, 50) == [Progress(number, 3) for number in range(50)]


def test_a_message_larger_than_the_sockets_buffers_arrives_without_blocking(pair):
    mine, theirs = pair
    count = 8 << 20
    mine.send(Ask(0, np.arange(count, dtype=np.int32), 0, 0, np.arange(count // 16), {}, 1))
    assert not mine.flush(), "it came back before all was sent"
    got, deadline = [], time.monotonic() + 20
    while not got and time.monotonic() < deadline:
        mine.flush()
        got = theirs.receive()
    assert np.array_equal(got[0].token_ids, np.arange(count))


def test_the_longest_message_arrives_in_pieces(pair, monkeypatch):
    mine, theirs = pair
    message = Ask(0, np.arange(1000, dtype=np.int32), 0, 0, np.arange(60), {}, 1)
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", len(encode(message)))
    monkeypatch.setattr(channels, "_READ_BYTES", 100)
    theirs.send(message)
    while not theirs.flush():
        pass
    [got] = receive(mine, 1)
    assert np.array_equal(got.token_ids, message.token_ids)


def refused(listener, port=None):
    """What a connector with another secret is told; ``port`` is another way to the listener."""
    problems = []

    def attempt():
        with pytest.raises(ChannelLost) as problem:
            connect("127.0.0.1", port or listener.port, b"another secret, as long", 5.0)
        problems.append(str(problem.value))

    thread = threading.Thread(target=attempt)
    thread.start()
    while thread.is_alive():
        assert listener.poll(0.02) == []
    return problems[0]


def test_both_sides_say_at_once_that_the_secret_differs(listener, caplog):
    problem = refused(listener)
    assert "it refused this rank, whose HELIX_TRANSFER_SECRET differs from its own; set " in problem
    assert "its HELIX_TRANSFER_SECRET differs from this group's; set " in caplog.text
    assert listener.num_refused == 1


def test_a_refusal_tells_nothing_but_that_the_secret_differs(listener):
    """The listener's bytes are random ones and fixed ones: its secret is in none of them."""
    answers = []
    for _ in range(2):
        relay = Recorder(listener.port)
        refused(listener, relay.port)
        answers.append(bytes(relay.answered))
        relay.close()
    magic, nonce = len(channels._MAGIC), channels._NONCE
    assert answers[0][:magic] == channels._MAGIC and len(answers[0]) == magic + nonce + len(channels._REFUSAL)
    assert answers[0][magic : magic + nonce] != answers[1][magic : magic + nonce]
    assert answers[0][magic + nonce :] == answers[1][magic + nonce :] == channels._REFUSAL


@pytest.mark.parametrize(
    ("greeting", "told"),
    [(channels._MAGIC, "does not prove that it knows HELIX_TRANSFER_SECRET"), (bytes(16), "something else listens")],
)
def test_a_listener_that_is_no_decode_group_is_found_out(greeting, told):
    impostor = socket.create_server(("127.0.0.1", 0))

    def serve():
        sock, _ = impostor.accept()
        sock.sendall(greeting + bytes(32))
        sock.recv(1000)
        with suppress(OSError):
            sock.sendall(bytes(32))
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ChannelLost, match=told):
        connect("127.0.0.1", impostor.getsockname()[1], SECRET, 5.0)
    thread.join()
    impostor.close()


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n" * 20, bytes(1000), channels._MAGIC + bytes(64)])
def test_strangers_are_dropped_and_do_not_keep_peers_out(listener, caplog, data):
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        mine, theirs = meet(listener)
        theirs.send(Cancel(1))
        assert receive(mine, 1) == [Cancel(1)]
        deadline = time.monotonic() + 5
        while "dropped a connection" not in caplog.text and time.monotonic() < deadline:
            listener.poll(0.02)
        assert "dropped a connection from 127.0.0.1" in caplog.text
        mine.close()
        theirs.close()


def test_a_connection_that_says_nothing_is_dropped_in_time(listener, caplog, monkeypatch):
    monkeypatch.setattr(channels, "HANDSHAKE_S", 0.2)
    with socket.create_connection(("127.0.0.1", listener.port)):
        assert accept(listener, 0.5) is None
    assert "has not proved itself within 0.2 s" in caplog.text


def test_more_strangers_than_may_wait_are_turned_away(listener, caplog, monkeypatch):
    monkeypatch.setattr(channels, "MAX_PENDING", 2)
    strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(4)]
    listener.poll(0.1)
    listener.poll(0.1)
    assert "2 others are being checked" in caplog.text
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("where", [0, 10, 50])
def test_a_forged_message_ends_the_connection_and_nothing_of_it_arrives(pair, caplog, where):
    mine, theirs = pair
    payload = encode(End(3, "done"))
    frame = bytearray(len(payload).to_bytes(4, "big") + bytes(32) + payload)
    frame[4 + where % 32] ^= 1
    theirs.send(Cancel(1))
    raw(theirs, frame)
    theirs.send(Cancel(2))
    assert receive(mine, 3) == [Cancel(1)]
    assert mine.lost == "a message that was not signed by the peer"
    assert "not signed by the peer" in caplog.text


class Recorder:
    """A relay between two ends, which notes what it passes on."""

    def __init__(self, port):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.seen, self.answered = bytearray(), bytearray()
        self.near = self.far = None
        self._target = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        self.near, _ = self._server.accept()
        self.far = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._pump, args=(self.far, self.near, self.answered), daemon=True).start()
        self._pump(self.near, self.far, self.seen)

    def _pump(self, source, target, notes):
        try:
            while data := source.recv(65536):
                notes += data
                target.sendall(data)
        except OSError:
            pass

    def close(self):
        for sock in (self.near, self.far, self._server):
            sock.close()


def test_a_recorded_message_is_refused_the_second_time_and_in_another_connection(listener, caplog):
    relay = Recorder(listener.port)
    mine, theirs = meet(listener, relay.port)
    before = len(relay.seen)
    theirs.send(End(3, "done"))
    assert receive(mine, 1) == [End(3, "done")]
    frame = bytes(relay.seen[before:])
    assert b"done" in frame
    relay.far.sendall(frame)
    assert receive(mine, 1) == []
    assert mine.lost == "a message that was not signed by the peer"
    other, friend = meet(listener)
    raw(friend, frame)
    assert receive(other, 1) == [] and other.lost is not None
    for each in (relay, mine, theirs, other, friend):
        each.close()


def test_a_message_is_refused_in_the_other_direction(listener):
    relay = Recorder(listener.port)
    mine, theirs = meet(listener, relay.port)
    before = len(relay.seen)
    theirs.send(End(3, "done"))
    receive(mine, 1)
    relay.near.sendall(bytes(relay.seen[before:]))
    assert receive(theirs, 1) == []
    assert theirs.lost == "a message that was not signed by the peer"
    for each in (relay, mine, theirs):
        each.close()


def test_an_oversized_message_ends_the_connection_before_it_is_read(pair, caplog):
    mine, theirs = pair
    raw(theirs, (1 << 31).to_bytes(4, "big") + bytes(100))
    assert receive(mine, 1) == []
    assert f"a message of {1 << 31} bytes" in caplog.text


def test_a_truncated_message_is_told_and_nothing_of_it_arrives(pair, caplog):
    mine, theirs = pair
    theirs.send(Cancel(1))
    payload = encode(Cancel(2))
    raw(theirs, len(payload).to_bytes(4, "big") + bytes(32) + payload[:5])
    theirs.close()
    assert receive(mine, 2) == [Cancel(1)]
    assert "dropped a truncated message" in caplog.text
    assert mine.lost == f"it ended inside a message, after {4 + 32 + 5} bytes"


def test_a_signed_message_that_is_malformed_is_dropped_and_the_next_one_arrives(pair, caplog, monkeypatch):
    mine, theirs = pair
    with monkeypatch.context() as patch:
        patch.setattr(channels, "encode", lambda message: b"\xc1 no msgpack")
        theirs.send(Cancel(1))
    theirs.send(Cancel(2))
    with caplog.at_level(logging.WARNING):
        assert receive(mine, 1) == [Cancel(2)]
    assert "dropped a malformed message from 127.0.0.1" in caplog.text
    assert mine.lost is None


def test_descriptors_above_those_of_select_are_waited_for_too(listener):
    """A process that holds many files and connections: select() takes no descriptor above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"needs 1,200 open files, this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.dup(listener._socket.fileno())]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[0]))
        mine, theirs = meet(listener)
        assert min(mine.fileno(), theirs.fileno()) > 1023
        theirs.send(Cancel(1))
        channels.wait_for([mine], 5.0)
        assert mine.receive() == [Cancel(1)]
        mine.close()
        theirs.close()
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_end_of_a_connection_is_told_on_both_sides(pair):
    mine, theirs = pair
    mine.close()
    assert receive(theirs, 1) == []
    assert theirs.lost == "the peer closed it"
    theirs.send(Cancel(1))  # into the void: no error
    assert mine.lost == "closed here"


def test_nobody_listening_is_told_in_time():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ChannelLost, match=f"nobody listened at 127.0.0.1:{port} for 0.3 s"):
        connect("127.0.0.1", port, SECRET, 0.3)
