"""The decode group's side: ask the prefill group for prompts, go on with what arrives, survive what does not.

It stands in front of the engine and takes its place in ``LLM``. Every rank of the group runs it on the same sequences;
rank 0 alone is connected to the prefill ranks, and what it hears comes to all ranks through the door. The life of a
request:

 1. Its cached prefix is claimed and its pages are allocated as the scheduler does it, for all candidates before any.
 2. When every rank has done what it still had to do with those pages, rank 0 asks every prefill rank for the rest. That
    is so once a step has landed that was given to the device after them: its collectives come after all of it, on every
    rank. Where nothing runs, all ranks wait for their devices and for each other.
 3. The prefill ranks write. Each of them, a *writer*, reports one end state.
 4. All done: the blocks enter the prefix tree, the first token is appended, the sequence decodes.
 5. Otherwise its pages are free again, except where a writer's end is unknown: those are quarantined until that writer
    reports an end after all, or its process is known to have ended. The request is computed here, or fails alone.

A page is therefore never published before every writer is done, and never free while one may still write it.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque

from parallel.launch import from_rank0, minimum

from ..config import TransferConfig
from ..engine import Engine
from ..metrics import RunMetrics
from ..request import Sequence, StreamEvent, order_of
from .counters import TransferCounters
from .hearing import Ended, Heard, Hearing, Joined, Lost, News, Said, Silence, Stuck, decode_news, encode_news
from .inbound import Arrivals, Inbound, Quarantines
from .protocol import DONE, FAILED, UNKNOWN, Ask, Bye, Cancel, End, First
from .transport import Transport

CLOSE_S = 5.0
OPEN, SILENT, GONE = "open", "silent", "gone"
_log = logging.getLogger(__name__)


class Receiver:
    """The decode group's requests. Every method is collective over the decode group.

    Args:
        engine: decodes; computes prompts too, where a transfer fails.
        config: the settings.
        num_writers: prefill ranks.
        hearing: rank 0's connections to them.
        transports: this rank's pools.
        speaks: this rank's warnings are those of all; elsewhere they are logged for debugging alone.
    """

    def __init__(
        self,
        engine: Engine,
        config: TransferConfig,
        *,
        num_writers: int,
        hearing: Hearing,
        transports: list[Transport],
        speaks: bool,
    ) -> None:
        self._engine, self._config = engine, config
        self._log_level = logging.WARNING if speaks else logging.DEBUG
        self._all_writers = frozenset(range(num_writers))
        self._hearing, self._transports = hearing, transports
        self._arrivals = Arrivals.of(engine)
        self._link = OPEN
        self._waiting: list[Sequence] = []
        self._held: deque[tuple[Inbound, int]] = deque()  # not asked for yet, and the steps given to the device before
        self._inbound: dict[int, Inbound] = {}
        self._quarantined = Quarantines(engine.scheduler, self._arrivals)
        self._next_id = 0
        self._aborting = False
        self.counters = TransferCounters()

    @property
    def metrics(self) -> RunMetrics:
        """The counters since they were last reset."""
        return self._engine.metrics

    @property
    def has_work(self) -> bool:
        """True while any sequence waits, is on its way, or runs."""
        return bool(self._waiting or self._held or self._inbound or self._engine.has_work)

    @property
    def trouble(self) -> str:
        """What is wrong with the prefill group, and what becomes of requests by it; empty where nothing is."""
        fate = "is computed by the decode group" if self._config.retry else "fails"
        return f"{self._obstacle}: every further request {fate}" if self._obstacle else ""

    @property
    def _obstacle(self) -> str:
        """Why nothing can be asked for; empty where something can, at once or once what is asked for has come."""
        if self._link != OPEN:
            return f"the prefill group is {self._link}"
        if self._arrivals.count is None or len(self._quarantined) < self._arrivals.count:
            return ""
        beside = f"scheduler.max_batch = {self._arrivals.count} sequences"
        return f"a lost prefill rank may still write the {self._arrivals.what} of {beside}"

    def reset_metrics(self) -> RunMetrics:
        """Start a new set of counters and return it."""
        metrics = self._engine.reset_metrics()
        self.counters = TransferCounters()
        metrics.transfer = self.counters.as_dict
        return metrics

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; one whose prompt is to be scored, or lacks little, is computed here."""
        self._engine.note_arrival(seq)
        is_short = self._engine.scheduler.num_missing(seq) < self._config.min_tokens
        if seq.scores_prompt or is_short:
            self.counters.short += is_short
            self._engine.compute(seq)
        else:
            insort(self._waiting, seq, key=order_of)

    def find(self, index: int) -> Sequence | None:
        """Return the sequence of an index; None where it has ended, or never was."""
        return self._engine.find(index)

    def abort(self, index: int) -> list[StreamEvent]:
        """End a request; pages that are being written for it stay out of use until their writers have ended."""
        seq = self._engine.find(index)
        if seq is not None and seq in self._waiting:
            self._waiting.remove(seq)
        for number, inbound in self._inbound.items():
            if inbound.seq is seq:
                self._hearing.tell(Cancel(number))
        return self._engine.abort(index)

    def advance(self, now: float) -> None:
        """Tell the time, in seconds of one clock for all ranks."""
        self._engine.advance(now)

    def listen(self) -> bytes:
        """Return rank 0's news of the prefill group."""
        return encode_news(self._listen())

    def hear(self, news: bytes) -> list[StreamEvent]:
        """Act on news, rank 0's own, and return what is new of the sequences that go on or end by them."""
        if self._inbound or self._quarantined:
            self._progress()
        return [event for each in decode_news(news) for event in self._act(each)]

    def step(self) -> list[StreamEvent]:
        """Ask, and compute one step; return what is new of the sequences that got a token or ended."""
        events = self._ask()
        if self._engine.has_work:
            events += self._engine.step(may_wait=bool(self._held or self._inbound or self._quarantined))
        return events

    def abort_all(self) -> None:
        """Drop every sequence. Waits until the writers have ended, or for ``timeout_s``; the rest is quarantined."""
        self._waiting.clear()
        self._let_go_of_held()
        failed = self._engine.in_step  # another rank may be anywhere: nothing collective now
        self._aborting = True
        for number, inbound in list(self._inbound.items()):
            self._hearing.tell(Cancel(number))
            if failed:
                self._end_early(number, inbound, set(inbound.waits_for), "")
        while self._inbound:
            self.hear(from_rank0(self.listen))  # beside the door
        self._aborting = False
        self._engine.abort_all()

    def close(self) -> None:
        """Say goodbye to the prefill group, let it leave first, and let nobody write here any more."""
        self._hearing.tell(Bye())
        deadline = time.monotonic() + CLOSE_S
        while not from_rank0(lambda: self._hearing.have_left(deadline)):
            self._progress()
        for transport in self._transports:
            transport.close()

    def _progress(self) -> None:
        for transport in self._transports:
            transport.progress()

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self) -> list[StreamEvent]:
        """Hold pages for waiting sequences and ask the prefill group for their prompts."""
        engine, obstacle = self._engine, self._obstacle
        if obstacle:
            held = [inbound.seq for inbound, _ in self._held if not inbound.seq.has_ended]
            self._let_go_of_held()
            asking = [*held, *self._waiting]
            self._waiting.clear()
            return [event for seq in asking for event in self._give_up(seq, obstacle)]
        self._hold()
        if self._held and not engine.scheduler.running:
            engine.synchronize()
            minimum(0)
        while self._held and (not engine.scheduler.running or self._held[0][1] < engine.num_landed):
            self._ask_for(self._held.popleft()[0])
        return []

    def _hold(self) -> None:
        """Give waiting sequences pages and batch slots, in their order, and start what moves into these pages.

        Sequences that the scheduler has to resume come first: while one waits, nothing is held.
        """
        scheduler = self._engine.scheduler
        if scheduler.waiting:
            return
        most = self._arrivals.num_free
        for seq, table in scheduler.admit(self._waiting, len(self._waiting) if most is None else most):
            scheduler.hold(seq, table, arrives=True)
            self._held.append((Inbound(seq, self._arrivals.take()), self._engine.num_departed))
        self._engine.mover.execute(scheduler.cache.take_movements())

    def _ask_for(self, inbound: Inbound) -> None:
        """Ask the prefill group for a held sequence; one that has ended meanwhile gives back what it holds."""
        if inbound.seq.has_ended:
            self._let_go(inbound)
            return
        if not self._inbound:
            self._hearing.begin_to_wait()
        inbound.waits_for.update(self._all_writers)
        self._inbound[self._next_id] = inbound
        self._hearing.tell(Ask.of(self._next_id, inbound.seq, inbound.arrival or 0))
        self._next_id += 1

    def _let_go_of_held(self) -> None:
        while self._held:
            self._let_go(self._held.popleft()[0])

    def _let_go(self, inbound: Inbound) -> None:
        """Take back all that a held sequence has that nobody writes."""
        self._engine.scheduler.let_go(inbound.seq, inbound.seq.blocks.num_reused)
        self._arrivals.give(inbound.arrival)

    # --- listening ----------------------------------------------------------------------------------------------------

    def _listen(self) -> list[News]:
        if not (self._inbound or self._quarantined):  # of a group that is lost meanwhile, those who watch are told
            if self.has_work and self._link != GONE:
                return []
            return self._hearing.listen({}, waits=False, stands=False, idle=False)
        scheduler = self._engine.scheduler
        stands = bool(scheduler.waiting or self._waiting) and not (scheduler.running or self._held or self._inbound)
        return self._hearing.listen(
            {number: inbound.seq.seed for number, inbound in self._inbound.items() if inbound.first is None},
            waits=bool(self._inbound),
            stands=stands and bool(self._quarantined),
            idle=not scheduler.running,
        )

    # --- acting on what was heard; alike on all ranks -----------------------------------------------------------------

    def _act(self, news: News) -> list[StreamEvent]:
        match news:
            case Said(writer, End() as end):
                return self._end(writer, end)
            case Said(_, First() as first):
                if inbound := self._inbound.get(first.id):
                    inbound.first, inbound.first_heard = first, time.perf_counter()
            case Lost(writer, reason):
                return self._cut(GONE, f"prefill rank {writer} is lost: {reason}")
            case Silence():
                return self._cut(SILENT, f"the prefill group has been silent for {self._config.timeout_s:g} s")
            case Stuck():
                seq = (self._engine.scheduler.waiting or self._waiting)[0]
                self._engine.scheduler.remove(seq)
                self._waiting = [each for each in self._waiting if each is not seq]
                pages = self._quarantined.num_pages
                return self._fail(seq, f"it does not fit beside {pages} pages that a lost prefill rank may still write")
            case Ended(writer):
                for number in list(self._quarantined):
                    self._lift(number, writer)
            case Joined(first_writer, count):
                self._all_writers = frozenset(range(first_writer, first_writer + count))
                self._link = OPEN
                self._warn("a prefill group of %d ranks has joined", count)
                self._warn_of_trouble()
            case Heard():
                self._warn("the prefill group is heard again")
                self._link = OPEN if self._link == SILENT else self._link
        return []

    def _warn(self, message: str, *values: object) -> None:
        """Log what every rank finds alike."""
        _log.log(self._log_level, message, *values)

    def _warn_of_trouble(self) -> None:
        if self.trouble:
            self._warn("%s", self.trouble)

    def _cut(self, link: str, reason: str) -> list[StreamEvent]:
        """Ask for nothing more, say once what becomes of requests, and wait for no writer: its end is unknown."""
        self._warn("%s", reason)
        if self._link not in (link, GONE):
            self._link = link
            self._warn_of_trouble()
        events: list[StreamEvent] = []
        for number, inbound in list(self._inbound.items()):
            self._hearing.tell(Cancel(number))
            events += self._end_early(number, inbound, inbound.unknown | inbound.waits_for, reason)
        return events

    def _end(self, writer: int, end: End) -> list[StreamEvent]:
        """Note a writer's end state; the last one decides."""
        inbound, quarantine = self._inbound.get(end.id), self._quarantined.get(end.id)
        if quarantine is not None and writer in quarantine.writers:
            if end.state != UNKNOWN:
                self._lift(end.id, writer)
            return []
        if inbound is None or writer not in inbound.waits_for:
            self._warn("dropped an End from prefill rank %d for request %d, which has ended", writer, end.id)
            return []
        inbound.waits_for.remove(writer)
        if end.state == UNKNOWN:
            inbound.unknown.add(writer)
        if end.state != DONE:
            if not inbound.problems and inbound.waits_for:
                self._hearing.tell(Cancel(end.id))
            inbound.problems.append(end.reason or end.state)
        if inbound.waits_for:
            return []
        if inbound.first is None and not inbound.problems:
            inbound.problems.append("its first token never came")
        if inbound.problems or self._aborting or inbound.seq.has_ended:
            return self._end_early(end.id, inbound, inbound.unknown, (inbound.problems or [FAILED])[0])
        del self._inbound[end.id]
        return self._publish(inbound)

    def _end_early(self, number: int, inbound: Inbound, unknown: set[int], reason: str) -> list[StreamEvent]:
        """Free or quarantine the pages of a transfer that is not done, and give its request up."""
        del self._inbound[number]
        seq = inbound.seq
        if unknown:
            count = self._quarantined.put(number, inbound, unknown)
            self.counters.pages_quarantined += count
            until = f"until {len(unknown)} prefill ranks have ended"
            self._warn("request %d: %d pages are quarantined %s", number, count, until)
            if self._link == OPEN:
                self._warn_of_trouble()
        else:
            self._let_go(inbound)
        if self._aborting or seq.has_ended:
            return []
        if self._config.retry:
            self._warn("request %s is computed by the decode group: %s", seq.output.id or seq.index, reason)
        return self._give_up(seq, reason)

    def _lift(self, number: int, writer: int) -> None:
        """Note that a writer cannot write a quarantined transfer's pages any more."""
        freed = self._quarantined.lift(number, writer)
        if freed is not None:
            self.counters.pages_released += freed
            self._warn("request %d: its %d quarantined pages are free again", number, freed)

    def _publish(self, inbound: Inbound) -> list[StreamEvent]:
        """Go on with a prompt that has arrived whole."""
        seq, first = inbound.seq, inbound.first
        assert first is not None
        self.counters.requests += 1
        self.counters.tokens_received += seq.prompt_len - seq.blocks.num_reused
        self.counters.tokens_cached += seq.blocks.num_reused
        self.counters.handover_s.add(time.perf_counter() - inbound.first_heard)
        self._arrivals.land(inbound.arrival, seq)
        return self._engine.go_on(seq, first.token, first.logprobs)

    def _give_up(self, seq: Sequence, reason: str) -> list[StreamEvent]:
        """Compute a request here whose transfer failed, or end it."""
        if not self._config.retry:
            return self._fail(seq, f"the transfer of its prompt failed: {reason}")
        self.counters.retried += 1
        self._engine.compute(seq)
        return []

    def _fail(self, seq: Sequence, reason: str) -> list[StreamEvent]:
        self.counters.failed += 1
        return [self._engine.fail(seq, reason)]
