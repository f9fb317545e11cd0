"""What a connection lets through: only messages that the peer signed for this connection, each once and in order."""

import logging
import os
import resource
import socket
import threading
import time
from contextlib import suppress
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from helix.transfer import channel as channels
from helix.transfer.channel import ChannelLost, Listener, connect
from helix.transfer.protocol import Ask, Cancel, End, MessageError, Progress, encode
from tests.helix.transfer.relay import FORGED, OVERSIZED, TRUNCATED, Relay

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


def meet(listener, port=None, host="127.0.0.1", **settings):
    """Both ends of a connection, the listener's first; ``port`` is another way to it."""
    box = []
    thread = threading.Thread(target=lambda: box.append(connect(host, port or listener.port, SECRET, 5.0, **settings)))
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


@pytest.fixture
def relayed(listener, monkeypatch):
    """Both ends of a connection, and what stands between them."""
    monkeypatch.setattr(channels, "FORGED_S", 0.2)
    relay = Relay(listener.port)
    mine, theirs = meet(listener, relay.port)
    relay.settle()
    yield mine, theirs, relay
    mine.close()
    theirs.close()
    relay.close()


def receive(channel, count, timeout_s=5.0):
    deadline, got = time.monotonic() + timeout_s, []
    while len(got) < count and channel.lost is None and time.monotonic() < deadline:
        got += channel.receive()
        time.sleep(0.002)
    return got


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
    message = Ask(0, np.arange(count, dtype=np.int32), 0, 0, np.arange(count // 16), {}, 1)
    began = time.monotonic()
    mine.send(message)
    sent_s = time.monotonic() - began
    [got] = receive(theirs, 1, 20.0)
    assert np.array_equal(got.token_ids, message.token_ids)
    assert sent_s < time.monotonic() - began, "the message arrives after send has come back"


def test_the_longest_message_arrives_and_a_longer_one_is_not_sent(monkeypatch):
    message = Ask(0, np.arange(1000, dtype=np.int32), 0, 0, np.arange(60), {}, 1)
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", len(encode(message)))
    listener = Listener("127.0.0.1", 0, SECRET)
    mine, theirs = meet(listener)
    theirs.send(message)
    [got] = receive(mine, 1)
    assert np.array_equal(got.token_ids, message.token_ids)
    with pytest.raises(MessageError, match="at most"):
        theirs.send(msgspec.structs.replace(message, salt="x"))
    theirs.close()
    listener.close()


def test_nothing_of_a_message_can_be_read_on_its_way(relayed):
    mine, theirs, relay = relayed
    theirs.send(End(3, "failed", "this must stay between us"))
    assert receive(mine, 1) == [End(3, "failed", "this must stay between us")]
    assert b"stay between" not in relay.seen and b"failed" not in relay.seen


def refused(listener, port=None):
    """What a connector with another secret is told; ``port`` is another way to the listener."""
    problems = []

    def attempt():
        with pytest.raises(ChannelLost) as problem:
            connect("127.0.0.1", port or listener.port, b"another secret, as long", 5.0)
        problems.append(str(problem.value))

    thread = threading.Thread(target=attempt)
    thread.start()
    before, deadline = listener.num_refused, time.monotonic() + 5.0
    while thread.is_alive() or (listener.num_refused == before and time.monotonic() < deadline):
        assert listener.poll(0.02) == []
    return problems[0]


def test_both_sides_say_at_once_that_the_secret_differs(listener, caplog):
    problem = refused(listener)
    assert "it refused this rank, whose HELIX_TRANSFER_SECRET differs from its own; set " in problem
    assert "its HELIX_TRANSFER_SECRET differs from this group's; set " in caplog.text
    assert listener.num_refused == 1


def test_a_refusal_tells_nothing(listener):
    """The listener's bytes are ZeroMQ's greeting, which is the same for all."""
    answers = []
    for _ in range(2):
        relay = Relay(listener.port)
        refused(listener, relay.port)
        answers.append(bytes(relay.answered))
        relay.close()
    assert answers[0] == answers[1] and len(answers[0]) == 64 and answers[0][0] == 0xFF


def test_who_has_the_listeners_public_key_alone_is_not_let_in(listener, caplog, monkeypatch):
    plain = channels.key_pair
    monkeypatch.setattr(channels, "key_pair", lambda secret, end: plain(SECRET if end == "listener" else secret, end))
    assert "refused this rank, whose HELIX_TRANSFER_SECRET differs" in refused(listener)
    assert listener.num_refused == 1


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\x01" + bytes(31)
WELCOME = bytes([4, 168]) + b"\x07WELCOME" + bytes(160)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (GREETING + WELCOME, "does not prove that it knows HELIX_TRANSFER_SECRET"),
        (b"220 mail.example ESMTP\r\n" * 5, "something else listens"),
    ],
)
def test_a_listener_that_is_no_decode_group_is_found_out(answer, told):
    impostor = socket.create_server(("127.0.0.1", 0))

    def serve():
        sock, _ = impostor.accept()
        sock.sendall(answer)
        with sock, suppress(OSError):
            while sock.recv(1000):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ChannelLost, match=told):
        connect("127.0.0.1", impostor.getsockname()[1], SECRET, 5.0)
    thread.join()
    impostor.close()


def test_a_listener_that_never_answers_is_told_in_time():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ChannelLost, match=r"for 0.3 s \(it did not answer\)"),
    ):
        connect("127.0.0.1", silent.getsockname()[1], SECRET, 0.3)


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n\r\n" * 20, bytes(1000), b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(64)]
)
def test_strangers_are_dropped_and_do_not_keep_peers_out(listener, caplog, data):
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(data)
        with suppress(OSError):  # it is dropped already
            stranger.shutdown(socket.SHUT_WR)
        mine, theirs = meet(listener)
        theirs.send(Cancel(1))
        assert receive(mine, 1) == [Cancel(1)]
        deadline = time.monotonic() + 5
        while "dropped a connection that has not proved itself" not in caplog.text and time.monotonic() < deadline:
            listener.poll(0.02)
        assert "dropped a connection that has not proved itself" in caplog.text
        mine.close()
        theirs.close()


def test_a_connection_that_says_nothing_is_dropped_in_time(caplog, monkeypatch):
    monkeypatch.setattr(channels, "HANDSHAKE_S", 0.2)
    listener = Listener("127.0.0.1", 0, SECRET)
    with socket.create_connection(("127.0.0.1", listener.port)):
        assert accept(listener, 0.5) is None
    assert "has not proved itself in 0.2 s" in caplog.text
    listener.close()


def test_a_forged_message_ends_the_connection_and_nothing_of_it_arrives(relayed):
    mine, theirs, relay = relayed
    theirs.send(Cancel(1))
    relay.settle()
    relay.far.sendall(FORGED)
    assert receive(mine, 2) == [Cancel(1)]
    assert mine.lost == "a message that was not signed by the peer"
    assert receive(theirs, 1) == [] and theirs.lost is not None, "it ends at the other side too"


def test_a_recorded_message_is_refused_the_second_time_and_in_another_connection(listener, relayed):
    mine, theirs, relay = relayed
    before = len(relay.seen)
    theirs.send(End(3, "done"))
    assert receive(mine, 1) == [End(3, "done")]
    relay.settle()
    frame = bytes(relay.seen[before:])
    relay.far.sendall(frame)
    assert receive(mine, 1) == []
    assert mine.lost == "a message that was not signed by the peer"
    other_relay = Relay(listener.port)
    other, friend = meet(listener, other_relay.port)
    other_relay.settle()
    other_relay.far.sendall(frame)
    assert receive(other, 1) == [] and other.lost == "a message that was not signed by the peer"
    friend.close()
    other_relay.close()


def test_a_message_is_refused_in_the_other_direction(relayed):
    mine, theirs, relay = relayed
    before = len(relay.seen)
    theirs.send(End(3, "done"))
    assert receive(mine, 1) == [End(3, "done")]
    relay.settle()
    relay.near.sendall(bytes(relay.seen[before:]))
    assert receive(theirs, 1) == []
    assert theirs.lost == "a message that was not signed by the peer"


@pytest.mark.parametrize("data", [OVERSIZED, TRUNCATED])
def test_an_oversized_or_truncated_message_ends_the_connection_and_nothing_of_it_arrives(relayed, data):
    mine, theirs, relay = relayed
    theirs.send(Cancel(1))
    relay.settle()
    relay.far.sendall(data)
    if data == TRUNCATED:
        relay.hang_up()
    assert receive(mine, 2) == [Cancel(1)]
    assert mine.lost.startswith("it ended: the peer is gone or silent, or sent a message of more than")


def test_a_connection_that_is_cut_is_lost_on_both_sides_and_never_made_again(listener, relayed):
    mine, theirs, relay = relayed
    relay.hang_up()
    assert receive(mine, 1) == receive(theirs, 1) == []
    assert mine.lost is not None and theirs.lost is not None
    theirs.send(Cancel(1))
    assert accept(listener, 0.5) is None and mine.receive() == []


def test_a_peer_that_answers_no_heartbeat_is_lost(listener):
    relay = Relay(listener.port)
    _, theirs = meet(listener, relay.port, silence_s=0.4)
    theirs.receive()
    time.sleep(0.8)
    assert theirs.receive() == [] and theirs.lost is None, "it answers, with nothing said"
    relay.holds = True
    assert receive(theirs, 1) == [] and theirs.lost.startswith("it ended: the peer is gone or silent")
    relay.close()


def test_one_look_deals_to_all_connections_of_a_listener(listener, monkeypatch):
    pairs, looks, plain = [meet(listener) for _ in range(3)], [], listener.pump
    monkeypatch.setattr(listener, "pump", lambda: looks.append(plain()))
    for number, (_, theirs) in enumerate(pairs):
        theirs.send(Cancel(number))
    time.sleep(0.2)
    channels.wait_for([mine for mine, _ in pairs], 0.0)
    assert len(looks) == 1
    assert [mine.messages() for mine, _ in pairs] == [[Cancel(0)], [Cancel(1)], [Cancel(2)]]
    for _, theirs in pairs:
        theirs.close()


def test_connections_over_ipv6():
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        listener = Listener("::1", 0, SECRET)
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    mine, theirs = meet(listener, host="::1")
    theirs.send(Cancel(1))
    assert receive(mine, 1) == [Cancel(1)]
    assert mine.name == "::1"
    theirs.close()
    listener.close()


def test_an_end_that_closes_says_all_that_it_has_sent_before(listener):
    mine, theirs = meet(listener)
    for number in range(100):
        theirs.send(Cancel(number))
    theirs.close()
    got = receive(mine, 101)
    assert len(got) == 100 and all(one.id + 1 == next_.id for one, next_ in pairwise(got))
    assert mine.lost == "the peer closed it"


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
    held = [os.dup(0)]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[0]))
        mine, theirs = meet(listener)
        assert min(mine.end._by_descriptor) > 1023
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
