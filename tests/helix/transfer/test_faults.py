"""What a fault leaves behind: no page that is wrong or lost, no hang, a message, and every other request complete.

Faults are made on purpose, in one rank of one group; the groups are processes with real NIXL between them.
"""

import logging
import os
import signal
import time
from random import Random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace

from helix.request import Request
from helix.sampling import SamplingParams
from helix.transfer import channel as channels
from helix.transfer.channel import ChannelLost
from helix.transfer.facts import Process
from helix.transfer.hearing import Hearing
from helix.transfer.protocol import RUNNING, Ask, End
from helix.transfer.receiver import Receiver
from parallel.launch import from_rank0
from tests.helix.transfer.relay import FORGED, OVERSIZED, TRUNCATED, Relay
from tests.helix.transfer.worlds import assert_idle, leave, make_llm

BLOCK = 16
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
_random = Random(5)
PROMPTS = [_random.choices(range(256), k=n) for n in (70, 33, 90, 64, 50)]


class Log(logging.Handler):
    """The records of a body, as text, until it stops. NIXL's first import closes all handlers there are."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("helix.transfer").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def stop(self):
        logging.getLogger("helix.transfer").removeHandler(self)

    def __str__(self):
        return "\n".join(self.lines)


def requests():
    return [Request(prompt_token_ids=list(ids), sampling=GREEDY) for ids in PROMPTS]


def told(outputs):
    return [(output.token_ids, output.error) for output in outputs]


def aggregated_body(path):
    return told(make_llm(path, None, None, (1, 1)).generate(requests()))


@pytest.fixture(scope="module")
def expected(model, ranks_of_one):
    return ranks_of_one.run(aggregated_body, model)[0]


@pytest.fixture(scope="module")
def ranks_of_one(rank_pools):
    from tests.ranks import RankPool

    return rank_pools.setdefault(1, RankPool(1))


def serve(llm):
    """Serve to the end and return why it ended, and what was logged."""
    log = Log()
    try:
        llm.serve()
        reason = ""
    except ChannelLost as problem:
        reason = str(problem)
    log.stop()
    assert_idle(llm)
    return reason, str(log)


def plain_prefill_body(ports, path, layout, *_):
    return serve(make_llm(path, ports[0], "prefill", layout))


def slow_prefill_body(ports, path, layout, *_):
    """Requests are on their way for so long that others decode meanwhile."""
    llm = make_llm(path, ports[0], "prefill", layout)
    plain = llm._sender._send

    def send():
        time.sleep(0.05)
        plain()

    llm._sender._send = send
    return serve(llm)


def decode_and_log(llm, asked=None):
    """Outputs, log, counters; afterwards it waits until every page has come back."""
    log = Log()
    outputs = llm.generate(asked or requests())
    counters = llm._receiver.counters.as_dict()
    released = 0
    for _ in range(1000):  # the same on all ranks
        if not llm._receiver._quarantined:
            break
        time.sleep(0.01)
        llm.generate([Request(prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=1))])
        released += llm._receiver.counters.pages_released
    counters["pages_released"] += released
    log.stop()
    return told(outputs), str(log), counters


def plain_decode_body(ports, path, _, layout, settings=None, *__):
    llm = make_llm(path, ports[0], "decode", layout, **(settings or {}))
    result = decode_and_log(llm)
    leave(llm)
    return result


# --- a sender that dies -----------------------------------------------------------------------------------------------


def dying_prefill_body(ports, path, layout, *_):
    """Rank 1 (or the only one) is killed when it has written the second chunk of the third request."""
    llm = make_llm(path, ports[0], "prefill", layout)
    kind, state = type(llm._sender._peers[0]), {"writes": 0}
    plain = kind.write

    def write(peer, blocks, source_pages, target_pages, tokens):
        made = plain(peer, blocks, source_pages, target_pages, tokens)
        asked = [sending.ask.id for sending in llm._sender._sendings if sending.posted == tokens[0]]
        state["writes"] += 2 in asked
        if state["writes"] == 2 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    kind.write = write
    llm.serve()


@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 2)), ((1, 1), (2, 1))], ids=str)
def test_requests_complete_when_a_sender_is_killed(groups, model, expected, prefill, decode):
    pools = groups(prefill[0] * prefill[1], decode[0] * decode[1])
    _, decoded = pools.run(dying_prefill_body, plain_decode_body, model, prefill, decode, fails="prefill")
    log = decoded[0][1]
    assert "prefill rank" in log and "is lost" in log and "is computed by the decode group" in log
    for outputs, _, counters in decoded:
        assert outputs == expected
        assert counters["requests"] + counters["retried"] == len(PROMPTS) and counters["retried"] >= 1
        assert counters["pages_quarantined"] == counters["pages_released"] > 0


def test_without_retry_requests_fail_alone_when_a_sender_is_killed(groups, model, expected):
    settings = {"retry": False, "max_batch": 1}  # one after the other: the first two are through
    _, decoded = groups(1, 1).run(
        dying_prefill_body, plain_decode_body, model, (1, 1), (1, 1), settings, fails="prefill"
    )
    outputs, _, counters = decoded[0]
    assert outputs[:2] == expected[:2]
    assert all(tokens == [] for tokens, _ in outputs[2:])
    assert "the transfer of its prompt failed: prefill rank 0 is lost: " in outputs[2][1]
    assert "the transfer of its prompt failed: the prefill group is gone" in outputs[3][1]
    assert counters["failed"] == 3 and counters["pages_quarantined"] == counters["pages_released"] > 0


def leaving_prefill_body(ports, path, layout, *_):
    """It ends its connection before anything is asked of it."""
    llm = make_llm(path, ports[0], "prefill", layout)
    llm._sender._channel.close()
    return serve(llm)


def log_of_the_rest_body(ports, path, _, layout, retry):
    """What is logged when the loss is noticed, and while further requests come."""
    llm = make_llm(path, ports[0], "decode", layout, retry=retry)
    log = Log()
    llm.generate(requests()[:1])
    noticed = len(log.lines)
    outputs = told(llm.generate(requests()))
    log.stop()
    return outputs, log.lines[:noticed], log.lines[noticed:]


@pytest.mark.parametrize(("retry", "fate"), [(True, "is computed by the decode group"), (False, "fails")])
def test_a_lost_prefill_group_is_told_once_by_rank_0_and_not_with_every_request(groups, model, expected, retry, fate):
    _, [(outputs, first, rest), other] = groups(1, 2).run(
        leaving_prefill_body, log_of_the_rest_body, model, (1, 1), (2, 1), retry
    )
    assert other == (outputs, [], [])
    assert first.count(f"the prefill group is gone: every further request {fate}") == 1
    assert rest == []
    gone = ([], "the transfer of its prompt failed: the prefill group is gone")
    assert outputs == (expected if retry else [gone] * len(PROMPTS))


def jump_when(hearing, is_time):
    """Let ``transfer.timeout_s`` pass for a rank's hearing with every look whose arguments say so; no test waits."""
    plain, jumped = hearing.listen, [0.0]
    hearing._clock = lambda: time.monotonic() + jumped[0]

    def listen(awaited, **flags):
        jumped[0] += 1000.0 if is_time(awaited, flags) else 0.0
        return plain(awaited, **flags)

    hearing.listen = listen


def unknown_end_body(ports, path, _, layout):
    """The decode group cannot look the killed writer up, as on another machine, and has few pages."""
    Process.has_ended = lambda self: False
    llm = make_llm(path, ports[0], "decode", layout, num_pages=8, max_batch=1)
    jump_when(llm._receiver._hearing, lambda awaited, flags: flags["stands"])
    log = Log()
    outputs = told(llm.generate(requests()))
    log.stop()
    control = llm.engine.scheduler.cache
    quarantined = [pages for each in llm._receiver._quarantined.values() for pages in each.pages]
    assert control.num_available(0) == llm.num_pages - len(quarantined)
    return outputs, str(log), len(quarantined)


def test_pages_that_a_lost_writer_may_still_write_are_never_used_again(groups, model, expected):
    _, decoded = groups(1, 1).run(dying_prefill_body, unknown_end_body, model, (1, 1), (1, 1), fails="prefill")
    outputs, log, quarantined = decoded[0]
    assert quarantined == 6, "the blocks of 90 tokens"
    assert outputs[:2] == expected[:2]
    assert all("does not fit beside 6 pages that a lost prefill rank may still write" in o[1] for o in outputs[2:])
    assert "are free again" not in log


# --- a receiver that dies ---------------------------------------------------------------------------------------------


def dying_decode_body(ports, path, _, layout):
    """The last rank is killed while requests are on their way."""
    llm = make_llm(path, ports[0], "decode", layout)
    plain, steps = Receiver.step, [0]

    def step(receiver):
        steps[0] += bool(receiver._inbound)
        if steps[0] == 3 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(receiver)

    Receiver.step = step
    llm.generate(requests())


@pytest.mark.parametrize("decode", [(1, 1), (2, 1)], ids=str)
def test_the_prefill_group_ends_with_a_message_and_no_lost_page_when_a_receiver_is_killed(groups, model, decode):
    pools = groups(2, decode[0])
    served, _ = pools.run(plain_prefill_body, dying_decode_body, model, (2, 1), decode, fails="decode")
    assert len(served) == 2
    for reason, _ in served:
        assert reason.startswith("the decode group is gone: ")


# --- late writes ------------------------------------------------------------------------------------------------------


class LateWrite:
    """A write that begins long after it was asked for: when a file is there."""

    def __init__(self, begin, begins):
        self._begin, self._begins, self._write, self.reason = begin, begins, None, ""

    def poll(self):
        if self._write is None and self._begins.exists():
            self._write = self._begin()
        return RUNNING if self._write is None else self._write.poll()

    def abandon(self):
        raise AssertionError("the decode group is there")


def late_prefill_body(ports, path, layout, _, begins):
    """Everything that the first request writes comes late."""
    llm = make_llm(path, ports[0], "prefill", layout)
    kind = type(llm._sender._peers[0])
    plain = kind.write

    def write(peer, *args):
        first = next((s for s in llm._sender._sendings if s.ask.id == 0), None)
        if first is not None and first.posted == args[-1][0] and len(first.ask.token_ids) >= args[-1][1]:
            return LateWrite(lambda: plain(peer, *args), begins)
        return plain(peer, *args)

    kind.write = write
    try:
        return serve(llm)
    finally:
        kind.write = plain


def late_decode_body(ports, path, _, layout, begins):
    """The first request times out; then others fill every page that is not quarantined, until the late write lands."""
    llm = make_llm(path, ports[0], "decode", layout, num_pages=16, max_batch=1)
    log, receiver, control = Log(), llm._receiver, llm.engine.scheduler.cache
    jump_when(receiver._hearing, lambda awaited, flags: flags["waits"] and not awaited)  # all but the writes has come
    outputs = told(llm.generate(requests()[:1]))
    [quarantine] = receiver._quarantined.values()
    mine = [page for rank, page in quarantine.pages if rank == llm.grid.kvp_rank]
    before = llm.runner.cache.pages[:, mine].clone()
    rounds = 0
    while receiver._quarantined:
        outputs = told(llm.generate(requests()))
        rounds += 1
        held = {(block.rank, block.page) for block in control.blocks.tree.walk()}
        assert not receiver._quarantined or not held & set(quarantine.pages)
        begins.touch()
    landed = not torch.equal(before, llm.runner.cache.pages[:, mine])
    after = told(llm.generate(requests()))
    log.stop()
    leave(llm)
    return outputs, after, str(log), rounds, landed


def test_a_late_write_after_a_time_out_finds_no_page_in_use(groups, model, expected, tmp_path):
    served, decoded = groups(1, 2).run(
        late_prefill_body, late_decode_body, model, (1, 1), (2, 1), tmp_path / "begins", timeout_s=60
    )
    assert served[0][0] == ""
    for outputs, after, _, rounds, landed in decoded:
        assert outputs == after == expected
        assert rounds > 0 and landed, "the late write landed, and was not used"
    log = decoded[0][2]
    assert "has been silent for 120 s" in log and "is heard again" in log
    assert "pages are quarantined" in log and "quarantined pages are free again" in log


def idle_decode_body(ports, path, _, layout):
    llm = make_llm(path, ports[0], "decode", layout)
    llm.generate(requests()[:1])
    llm._receiver._hearing._clock = lambda: time.monotonic() + 1000.0
    outputs, _, counters = decode_and_log(llm)
    leave(llm)
    return outputs, counters["retried"]


def test_a_group_that_was_not_asked_for_long_is_not_silent(groups, model, expected):
    _, decoded = groups(1, 1).run(plain_prefill_body, idle_decode_body, model, (1, 1), (1, 1))
    assert decoded == [(expected, 0)]


# --- messages that do not belong --------------------------------------------------------------------------------------


def sending_body(ports, path, _, layout, kind):
    """The decode group's rank 0 sends, beside each request, what it should not."""
    llm = make_llm(path, ports[0], "decode", layout)
    plain = Hearing.tell

    def tell(hearing, message):
        if isinstance(message, Ask) and kind == "wrong pages" and message.id == 1:
            message = replace(message, pages=message.pages[:-1])
        if isinstance(message, Ask) and kind == "pages of others" and message.id == 1:
            message = replace(message, pages=message.pages + 1_000_000)
        if isinstance(message, Ask) and kind == "other settings" and message.id == 1:
            message = replace(message, sampling={"temperature": "hot"})
        plain(hearing, message)
        if isinstance(message, Ask) and kind == "duplicate":
            plain(hearing, message)
        if isinstance(message, Ask) and kind == "malformed":
            channels.encode, packed = (lambda _: b"\x93\x01\x02"), channels.encode
            plain(hearing, message)
            channels.encode = packed
        if isinstance(message, Ask) and kind == "not a request":
            plain(hearing, End(0, "done"))

    Hearing.tell = tell
    try:
        result = decode_and_log(llm)
    finally:
        Hearing.tell = plain
    leave(llm)
    return result


@pytest.mark.parametrize(
    ("kind", "complaint", "retried"),
    [
        ("duplicate", "dropped a duplicate of request 0", 0),
        ("malformed", "dropped a malformed message from 127.0.0.1", 0),
        ("not a request", "dropped a End: it is none of a decode group's messages", 0),
        ("wrong pages", "request 1 cannot run in the prefill group: 2 pages for 3 blocks", 1),
        ("pages of others", "request 1 cannot run in the prefill group: page 10000", 1),
        ("other settings", "request 1 cannot run in the prefill group: sampling.temperature = 'hot'", 1),
    ],
)
def test_a_message_that_does_not_belong_is_dropped_and_every_request_completes(
    groups, model, expected, kind, complaint, retried
):
    served, decoded = groups(2, 2).run(plain_prefill_body, sending_body, model, (2, 1), (1, 2), kind)
    by_each = not complaint.startswith("request")  # what is wrong with a request, rank 0 tells for all
    assert [(reason, complaint in log) for reason, log in served] == [("", True), ("", by_each)]
    for outputs, _, counters in decoded:
        assert outputs == expected
        assert (counters["retried"], counters["pages_quarantined"]) == (retried, 0)


def forging_prefill_body(ports, path, layout, _, __, kind):
    """One rank's connection carries, between its messages, what the peer must not believe."""
    relay = Relay(ports[0]) if dist.get_rank() == 1 else None
    llm = make_llm(path, relay.port if relay else ports[0], "prefill", layout)
    channel = llm._sender._channel
    plain = channel.send

    def send(message):
        plain(message)
        if isinstance(message, End) and message.id == 0 and relay is not None:
            relay.settle()
            if kind == "repeated":
                plain(message)
            else:
                relay.far.sendall({"forged": FORGED, "oversized": OVERSIZED, "truncated": TRUNCATED}[kind])
            if kind == "truncated":
                relay.hang_up()

    channel.send = send
    served = serve(llm)
    if kind != "repeated":
        assert served[0].startswith("the decode group is gone: ")
        os._exit(2)  # as the command does
    return served


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("forged", "a message that was not signed by the peer"),
        ("oversized", "sent a message of more than 268435456 bytes"),
        ("truncated", "it ended: the peer is gone"),
        ("repeated", "for request 0, which has ended"),
    ],
)
def test_what_a_connection_must_not_carry_corrupts_nothing(groups, model, expected, kind, complaint):
    ends = "" if kind == "repeated" else "prefill"
    _, decoded = groups(2, 2).run(
        forging_prefill_body, plain_decode_body, model, (1, 2), (2, 1), None, kind, fails=ends
    )
    assert all(outputs == expected for outputs, _, _ in decoded)
    assert complaint in decoded[0][1]
    assert ("is lost" in decoded[0][1]) == (kind != "repeated")
    for _, _, counters in decoded:
        assert counters["pages_quarantined"] == counters["pages_released"]


# --- requests that one group cannot run, or nobody wants any more -----------------------------------------------------


def small_prefill_body(ports, path, layout, *_):
    return serve(make_llm(path, ports[0], "prefill", layout, num_pages=5))


@pytest.mark.parametrize("retry", [True, False], ids=["retry", "no retry"])
def test_a_request_that_the_prefill_group_cannot_hold_is_retried_or_fails_alone(groups, model, expected, retry):
    served, decoded = groups(1, 1).run(
        small_prefill_body, plain_decode_body, model, (1, 1), (1, 1), {"retry": retry}, timeout_s=60
    )
    outputs, log, counters = decoded[0]
    assert served[0][0] == ""
    if retry:
        assert outputs == expected and counters["retried"] == 1
        assert "is computed by the decode group: the prefill group cannot run it: 90 prompt tokens" in log
    else:
        assert outputs[:2] + outputs[3:] == expected[:2] + expected[3:] and counters["failed"] == 1
        assert "the transfer of its prompt failed: the prefill group cannot run it: 90 prompt tokens" in outputs[2][1]


def cancelling_body(ports, path, _, layout):
    """A stream is closed while requests are on their way; the next one is whole."""
    llm = make_llm(path, ports[0], "decode", layout)
    stream = llm.stream(requests())
    first = next(stream)
    on_their_way = len(llm._receiver._inbound)
    stream.close()
    control = llm.engine.scheduler.cache
    assert not llm._receiver.has_work and not llm._receiver._quarantined
    assert [control.num_available(rank) for rank in range(llm.layout.kvp)] == [llm.num_pages] * llm.layout.kvp
    outputs = told(llm.generate(requests()))
    leave(llm)
    return first.token_ids, on_their_way, outputs


def test_requests_that_are_cancelled_leave_both_sides_as_they_were(groups, model, expected):
    served, decoded = groups(2, 2).run(slow_prefill_body, cancelling_body, model, (2, 1), (2, 1))
    assert all(reason == "" for reason, _ in served)
    for first, on_their_way, outputs in decoded:
        assert first == expected[0][0][:1] and on_their_way > 0
        assert outputs == expected


def aborting_body(ports, path, _, layout):
    """Requests are aborted while they wait, while they are held or on their way, and while they run."""
    llm = make_llm(path, ports[0], "decode", layout, max_batch=2, check_ranks=False)
    receiver, engine, waits = llm._receiver, llm.engine, []
    plain = engine.synchronize
    engine.synchronize = lambda: (waits.append(len(engine.scheduler.running)), plain())
    receiver.reset_metrics()
    for index, request in enumerate(requests() * 2):
        receiver.add(llm.preparer.prepare(index, request, request.sampling).sequence())
    ended, seen = {}, set()

    def look(events):
        ended.update({event.index: event.output for event in events if event.output is not None})

    def places():
        held = {inbound.seq.index: "held" for inbound, _ in receiver._held}
        waiting = {seq.index: "waiting" for seq in receiver._waiting}
        asked = {each.seq.index: "asked" for each in receiver._inbound.values() if not each.seq.has_ended}
        return {**held, **waiting, **asked, **{seq.index: "running" for seq in engine.scheduler.running}}

    while receiver.has_work:
        look(receiver.hear(from_rank0(receiver.listen)))
        now = places()
        for index in (7, 0, 3, 9, 5):
            if index in now and now[index] not in seen:
                seen.add(now[index])
                look(receiver.abort(index))
                assert receiver.abort(index) == [] and ended[index].finish_reason == "abort"
        look(receiver.step())
    leave(llm)
    done = {index: output.token_ids for index, output in ended.items() if output.finish_reason == "length"}
    return seen, len(ended), done, waits, receiver._next_id


def test_requests_that_are_aborted_leave_no_page_wherever_they_are_and_asking_waits_for_no_running_step(
    groups, model, expected
):
    served, decoded = groups(2, 2).run(slow_prefill_body, aborting_body, model, (2, 1), (2, 1))
    assert all(reason == "" for reason, _ in served)
    for seen, num_ended, done, waits, num_asked in decoded:
        assert {"waiting", "asked", "running"} <= seen and num_ended == 10
        assert len(done) == 10 - len(seen)
        assert done == {index: expected[index % 5][0] for index in done}
        assert not any(waits) and len(waits) < num_asked, "with others running nobody stops the device"


def failing_step_body(ports, path, _, layout):
    """A decode step fails while other requests are on their way; the next call is whole."""
    llm = make_llm(path, ports[0], "decode", layout)
    mover = llm.engine.mover
    plain, on_their_way = mover.execute, []

    def execute(movements):
        if llm.engine.in_step and llm._receiver._inbound and not on_their_way:
            on_their_way.append(len(llm._receiver._inbound))
            raise RuntimeError("the step fails on every rank")
        plain(movements)

    mover.execute = execute
    with pytest.raises(RuntimeError, match="the step fails"):
        llm.generate(requests())
    outputs, log, _ = decode_and_log(llm)
    leave(llm)
    return outputs, log, on_their_way


def test_a_step_that_fails_beside_transfers_leaves_the_pool_whole(groups, model, expected):
    _, decoded = groups(1, 2).run(slow_prefill_body, failing_step_body, model, (1, 1), (2, 1))
    for outputs, _, on_their_way in decoded:
        assert on_their_way and on_their_way[0] > 0
        assert outputs == expected
    assert "quarantined pages are free again" in decoded[0][1]


def strangers_body(ports, path, _, layout, settings=None):
    """Strangers knock while the groups meet."""
    import socket
    import threading

    def knock():
        deadline, seen = time.monotonic() + 20, 0
        while seen < 3 and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", ports[0]), timeout=1) as sock:
                    sock.sendall(np.random.default_rng(seen).bytes(500))
                    seen += 1
            except OSError:
                time.sleep(0.01)

    thread = threading.Thread(target=knock)
    log = Log()
    thread.start()
    llm = make_llm(path, ports[0], "decode", layout)
    thread.join()
    log.stop()
    outputs = told(llm.generate(requests()))
    leave(llm)
    return outputs, str(log)


def slow_to_meet_body(ports, path, layout, *_):
    time.sleep(1.0)
    return plain_prefill_body(ports, path, layout)


def test_strangers_at_the_door_change_nothing(groups, model, expected):
    _, decoded = groups(1, 1).run(slow_to_meet_body, strangers_body, model, (1, 1), (1, 1))
    outputs, log = decoded[0]
    assert outputs == expected
    assert log.count("it is no prefill rank") == 3
