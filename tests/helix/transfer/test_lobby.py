"""A prefill group is let in whole or not at all, and another in its place once it is lost; no pools, no processes."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from helix.transfer.channel import Listener, connect
from helix.transfer.facts import Process
from helix.transfer.hearing import Ended, Hearing, Joined, Lost, Said
from helix.transfer.lobby import Lobby
from helix.transfer.protocol import Bye, End, First, Hello, Pool, Progress, Ready, Refuse, Welcome

SECRET = b"a secret of some length"
FACTS = {"cache.block_size": 16}
POOL = Pool(b"md", np.array([4096]), 512, 3, "DRAM", 0)
PROCESS = Process.current()


@pytest.fixture
def lobby():
    made = Lobby(Listener("127.0.0.1", 0, SECRET), FACTS, Welcome(1, 1, [[POOL]]))
    made.came = []
    yield made
    for channel in made.came:
        channel.close()
    made.listener.close()


def ranks(lobby, count):
    """Connections of so many ranks; meanwhile somebody listens, as rank 0 does."""
    made = []
    for _ in range(count):
        thread = threading.Thread(target=lambda: made.append(connect("127.0.0.1", lobby.listener.port, SECRET, 5.0)))
        thread.start()
        while thread.is_alive():
            lobby.listener.pump()
            time.sleep(0.002)
        thread.join()
    lobby.came += made
    return made


def hello(rank, kvp=2, facts=FACTS, process=PROCESS):
    return Hello(rank, kvp, 1, facts, process)


def until(call, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not (found := call()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return found


def answer(lobby, channel):
    """The first message that a rank gets while rank 0 looks after the lobby."""

    def look():
        assert lobby.poll() is None
        return channel.receive()

    return until(look)[0]


def test_a_group_is_let_in_in_the_order_of_its_ranks_once_all_of_it_are_ready(lobby):
    one, two = ranks(lobby, 2)
    one.send(hello(1))
    assert until(lobby.poll, 0.1) is None and "1 prefill ranks have come" in lobby.late(3.0)
    two.send(hello(0, process=replace(PROCESS, pid=7)))
    assert type(answer(lobby, one)) is Welcome and type(answer(lobby, two)) is Welcome
    one.send(Ready())
    assert until(lobby.poll, 0.1) is None and "2 prefill ranks have come" in lobby.late(3.0)
    assert "1 of them are ready" in lobby.late(3.0)
    two.send(Ready())
    party = until(lobby.poll)
    assert [writer.process.pid for writer in party.writers] == [7, PROCESS.pid]
    party.writers[0].channel.send(Bye())
    assert until(two.receive) == [Bye()]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Progress(1, 2), "it began with a Progress"),
        (hello(0), "rank 0 has come already"),
        (hello(2, 4), "it is one of 4 ranks, and ranks of 2 have come"),
    ],
)
def test_a_rank_that_does_not_belong_is_sent_away_alone(lobby, message, reason):
    first, wrong, second = ranks(lobby, 3)
    first.send(hello(0))
    assert until(lobby.poll, 0.1) is None
    wrong.send(message)
    assert answer(lobby, wrong) == Refuse(reason)
    assert until(lambda: wrong.receive() or wrong.lost) == "the peer closed it"
    second.send(hello(1))
    assert type(answer(lobby, first)) is Welcome


def test_a_group_that_does_not_agree_or_breaks_up_is_sent_away_and_the_next_one_is_let_in(lobby):
    first, other = ranks(lobby, 2)
    first.send(hello(0))
    assert until(lobby.poll, 0.1) is None
    other.send(hello(1, facts={"cache.block_size": 64}))
    with pytest.raises(ValueError, match="cache.block_size = 16 in the decode group and 64 in the prefill group"):
        until(lobby.poll)
    assert type(until(first.receive)[0]) is Refuse
    pair = ranks(lobby, 2)
    for rank, channel in enumerate(pair):
        channel.send(hello(rank))
    assert type(answer(lobby, pair[0])) is Welcome
    pair[1].close()
    with pytest.raises(ValueError, match="prefill rank 1 left before it was ready: the peer closed it"):
        until(lobby.poll)
    [last] = ranks(lobby, 1)
    last.send(hello(0, 1))
    assert type(answer(lobby, last)) is Welcome
    last.send(Ready())
    assert len(until(lobby.poll).writers) == 1


def test_a_lost_group_is_followed_by_another_which_tells_what_has_become_of_it(lobby):
    """Its process was another machine's: rank 0 cannot look it up, and the newcomer there can."""
    gone = Process("another machine", 12, 34)
    old, other, new = ranks(lobby, 3)
    old.send(hello(0, process=gone))
    other.send(hello(1))
    for channel in (old, other):
        answer(lobby, channel)
        channel.send(Ready())
    hearing = Hearing(until(lobby.poll).writers, lobby, timeout_s=100.0, vocabulary=256)

    def listen(seeds=()):
        return hearing.listen(dict(seeds), waits=False, stands=False, idle=False)

    new.send(hello(0, 1))
    assert until(listen, 0.2) == [], "while the first group is there nobody else is let in"
    old.close()
    assert until(listen) == [Lost(0, "the peer closed it")]
    [welcome] = until(lambda: [*listen(), *new.receive()])
    assert welcome.lost == [gone, PROCESS]
    new.send(Ready([gone]))
    assert until(listen) == [Ended(0), Joined(2, 1)]
    assert until(listen, 0.2) == [], "that the rest of the first group is sent away is not the loss of this one"
    assert until(lambda: other.receive() or other.lost) == "the peer closed it"
    hearing.tell(Bye())
    assert until(new.receive) == [Bye()]
    first = First(5, 3, 9)
    new.send(first)
    new.send(End(5, "done"))
    said = until(lambda: listen({5: 9}.items()))
    while len(said) < 2:  # one look may come between the two messages
        said += until(listen)
    assert [(type(each), each.writer, type(each.message)) for each in said] == [(Said, 2, First), (Said, 2, End)]
