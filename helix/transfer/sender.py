"""The prefill group's loop: compute what is asked for, write its blocks as they fill, and report how that ended.

Every rank of the group hears the same messages in the same order, each over a connection of its own, and runs the same
scheduler. What must happen alike on all ranks:

 1. Once a loop the ranks reduce, in one small collective, how many messages each has heard and how many of its
    transfers have ended, in the order in which they were asked for.
 2. A message is acted on in the loop in which the last rank is known to have it. A rank whose connection is lost
    reduces the count to LOST, and all give up together.
 3. Pages of a prompt are released in the loop in which all ranks' writes of it have ended; until then they are its own.

Everything else (posting writes, polling them, reporting an end state) is one rank's own business.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np

from parallel.launch import minimums

from ..commands import Add
from ..engine import Engine
from ..request import Request, Sequence, StreamEvent
from ..sampling import SamplingParams
from .channel import Channel, ChannelLost, wait_for
from .mapped_peer import Copies
from .protocol import DONE, FAILED, RUNNING, UNKNOWN, Ask, Bye, Cancel, End, First, Message, Progress, State
from .regions import Side, shared_blocks
from .stores import Bounded
from .transport import AnyPeer, Transport, Write

LOST = -1
IDLE_S = 0.02
POLL_S = 0.001
GIVE_UP_S = 5.0  # how long writes to a group that is gone may take to end
Prepare = Callable[[int, Request, SamplingParams], Add]
"""Settles a request, under its index and settings; ValueError says why it cannot run."""
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sending:
    """One prompt on its way.

    Attributes:
        seq: its sequence here; None where it cannot run.
        posted: tokens below it are written, or on their way, or cached at the receiver.
        writes: those on their way.
        stopping: why this rank writes no more of it; empty while it does.
        broken: a write of this rank may still land, though it failed.
        state: this rank's end state, once it is reported.
    """

    ask: Ask
    seq: Sequence | None = None
    posted: int = 0
    writes: list[Write | Copies] = field(default_factory=list)
    stopping: str = ""
    broken: bool = False
    state: State | None = None


class Sender:
    """One prefill rank. Every method is collective over the prefill group.

    Args:
        engine: computes the prompts.
        rank: this process's, in the prefill group.
        channel: to the decode group's rank 0.
        source, target: both groups; each prompt has a ``first_owner`` of its own.
        bounded: this rank's layers of bounded memory; None where the model has none.
        peers: of pages, and of these where there are any, the decode ranks that this rank writes to.
        num_pages: the least of a decode rank's pages of either.
        transports: this rank's pools.
        prepare: settles a request.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rank: int,
        channel: Channel,
        source: Side,
        target: Side,
        bounded: Bounded | None,
        peers: list[list[AnyPeer]],
        num_pages: list[int],
        transports: list[Transport],
        prepare: Prepare,
    ) -> None:
        self._engine, self._rank, self._channel, self._prepare = engine, rank, channel, prepare
        self._source, self._target, self._bounded, self._num_pages = source, target, bounded, num_pages
        self._peers, self._bounded_peers = peers[0], [each for others in peers[1:] for each in others]
        self._transports = transports
        self._inbox: deque[Message] = deque()
        self._num_done = 0
        self._sendings: deque[Sending] = deque()  # in the order of their requests, from the first that holds pages
        self._num_released = 0
        self._last_id = -1
        self._lost: str | None = None
        self._give_up_at: float | None = None
        self._closing = False

    def run(self) -> None:
        """Serve the decode group until it says goodbye.

        Raises:
            ChannelLost: on all ranks, when the decode group is gone.
        """
        while not self._closing or self._sendings:
            self._wait()
            self._hear()
            if self._engine.has_work:
                self._tell_first(self._engine.step(may_wait=bool(self._sendings)))
            self._send()
        for peer in (*self._peers, *self._bounded_peers):
            peer.close()
        for transport in self._transports:
            transport.close()
        self._channel.close()
        if self._lost is not None:
            raise ChannelLost(f"the decode group is gone: {self._lost}")

    def _wait(self) -> None:
        """Sleep while nothing is computed: briefly while writes are under way or prompts wait for pages."""
        if not self._engine.scheduler.running:
            wait_for([self._channel], POLL_S if self._sendings else IDLE_S)

    # --- what is heard ------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        self._inbox += self._channel.receive()
        lost = self._channel.lost and not self._inbox and not self._closing
        num_heard = LOST if lost else self._num_done + len(self._inbox)
        now_us = int(time.monotonic() * 1e6)  # the least of the ranks' clocks is one clock for all
        heard, ended, now_us = minimums([num_heard, self._num_ended(), now_us])
        self._engine.advance(now_us / 1e6)
        self._release(ended)
        if heard == LOST:
            self._lose()
            return
        while self._num_done < heard:
            self._num_done += 1
            self._act(self._inbox.popleft())

    def _act(self, message: Message) -> None:
        if isinstance(message, Ask):
            self._ask(message)
        elif isinstance(message, Cancel):
            for sending in self._sendings:
                if sending.ask.id == message.id:
                    self._stop(sending, "the decode group cancelled it")
        elif isinstance(message, Bye):
            self._closing = True
        else:
            _log.warning("dropped a %s: it is none of a decode group's messages", type(message).__name__)

    def _ask(self, ask: Ask) -> None:
        if ask.id <= self._last_id:
            _log.warning("dropped a duplicate of request %d", ask.id)
            return
        self._last_id = ask.id
        sending = Sending(ask)
        self._sendings.append(sending)
        try:
            ask.check_places(self._source.block_size, self._target.layout.kvp, self._num_pages[0])
            if self._bounded is not None:
                self._bounded.check(ask, self._num_pages[1])
            sending.seq = self._prepare(ask.id, *_request_of(ask)).sequence()
        except (ValueError, TypeError) as problem:  # TypeError: settings of another name or type
            level = logging.WARNING if self._rank == 0 else logging.DEBUG  # every rank finds it alike
            _log.log(level, "request %d cannot run in the prefill group: %s", ask.id, problem)
            sending.stopping = f"the prefill group cannot run it: {problem}"
            return
        sending.seq.keeps_pages = True
        sending.seq.keeps_slot = self._bounded is not None
        sending.posted = ask.start
        self._engine.add(sending.seq)

    def _stop(self, sending: Sending, reason: str) -> None:
        """Compute and write no more of a prompt; what is under way ends first. Called alike on all ranks."""
        self._engine.abort(sending.ask.id)
        sending.stopping = sending.stopping or reason

    def _lose(self) -> None:
        if self._lost is None:
            self._lost = self._channel.lost or "another rank of this group lost its connection"
            self._give_up_at = time.monotonic() + GIVE_UP_S
            for sending in self._sendings:
                self._stop(sending, "the decode group is gone")
        self._closing = True

    # --- what is told -------------------------------------------------------------------------------------------------

    def _tell_first(self, events: list[StreamEvent]) -> None:
        """Tell the first tokens that a step made, and how far other prompts are; rank 0 does."""
        if self._rank != 0:
            return
        tokens = {event.index: event.token_ids[-1] for event in events if event.token_ids}
        for sending in self._sendings:
            seq, number = sending.seq, sending.ask.id
            if seq is not None and number in tokens:
                logprobs = seq.output.logprobs[-1] if seq.output.logprobs else None
                self._channel.send(First(number, tokens[number], seq.seed, logprobs))
            elif seq is not None and not seq.output.finish_reason and seq.num_computed:
                self._channel.send(Progress(number, seq.num_computed))

    # --- what is written ----------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Post writes of the blocks that are computed since, poll those under way, report what has ended.

        What counts as computed is of steps that the device has ended: the host has waited for their tokens.
        """
        due = [sending for sending in self._sendings if self._computed(sending) > sending.posted]
        for sending in due:
            self._post(sending, self._computed(sending))
        for sending in self._sendings:
            if sending.state is None:
                self._poll(sending)

    def _computed(self, sending: Sending) -> int:
        """Return how many tokens could be written: whole blocks, and the end of the prompt."""
        seq = sending.seq
        if seq is None or sending.stopping or sending.broken or not seq.blocks.pages:
            return 0
        size = self._source.block_size
        return seq.num_computed if seq.num_computed == seq.prompt_len else seq.num_computed // size * size

    def _post(self, sending: Sending, stop: int) -> None:
        ask, seq = sending.ask, sending.seq
        assert seq is not None
        tokens, size = (sending.posted, stop), self._source.block_size
        first = sending.posted // size
        pages = np.array(seq.blocks.pages[first : -(-stop // size)], np.int64)  # of a long prompt these are few
        source = replace(self._source, first_owner=seq.blocks.first_owner)
        target = replace(self._target, first_owner=ask.first_owner)
        for peer in self._peers:
            blocks = shared_blocks(source, self._rank, target, peer.rank, tokens)
            if len(blocks):
                sending.writes.append(peer.write(blocks, pages[blocks - first], ask.pages[blocks], tokens))
        if self._bounded is not None and stop == seq.prompt_len:
            post = self._bounded.post(seq, ask)
            for peer in self._bounded_peers:
                sending.writes.append(peer.write(post.blocks, post.ours, post.theirs, post.tokens))
        sending.posted = stop

    def _poll(self, sending: Sending) -> None:
        """Report the end state of a transfer on this rank once no write of it is under way."""
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            for write in sending.writes:
                write.abandon()
        polled, sending.writes = [(write, write.poll()) for write in sending.writes], []
        for write, state in polled:
            if state == RUNNING:
                sending.writes.append(write)
            elif state == UNKNOWN and not sending.broken:
                sending.broken, sending.stopping = True, sending.stopping or write.reason
                _log.warning("request %d: %s", sending.ask.id, write.reason)
        all_posted = sending.posted == len(sending.ask.token_ids)
        if sending.writes or not (all_posted or sending.stopping):
            return
        sending.state = UNKNOWN if sending.broken else FAILED if sending.stopping else DONE
        self._channel.send(End(sending.ask.id, sending.state, "" if sending.state == DONE else sending.stopping))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _num_ended(self) -> int:
        """Return how many transfers have ended on this rank, counted in order."""
        return self._num_released + sum(1 for _ in takewhile(lambda each: each.state is not None, self._sendings))

    def _release(self, ended: int) -> None:
        """Release the pages of the transfers that have ended on every rank."""
        while self._num_released < ended:
            self._num_released += 1
            sending = self._sendings.popleft()
            self._engine.abort(sending.ask.id)  # its writes broke off on every rank before its prompt was computed
            if sending.seq is not None:
                self._engine.scheduler.let_go(sending.seq, sending.seq.num_computed)


def _request_of(ask: Ask) -> tuple[Request, SamplingParams]:
    """Return what is to be computed: a request that ends with its first token."""
    sampling = SamplingParams(**ask.sampling)
    sampling = replace(sampling, max_tokens=1, min_tokens=min(sampling.min_tokens, 1), seed=ask.seed, stop=[])
    return Request(prompt_token_ids=ask.token_ids.tolist(), cache_salt=ask.salt, retention=ask.retention), sampling
