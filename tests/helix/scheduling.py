"""A scheduler without a model: what tests make of it, and how a step of it is done."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from helix.cache.control import CacheControl
from helix.cache.movements import CopyTokens, Movement
from helix.config import SchedulerConfig
from helix.request import Chunk, RequestOutput, Sequence, order_of
from helix.sampling import SamplingParams
from helix.scheduler import Scheduler
from parallel.placement import BlockCyclic


def make_scheduler(
    *, kvp: int = 1, block_size: int = 4, num_pages: int = 100, max_batch: int = 8, prefill_chunk: int = 16
) -> Scheduler:
    cache = CacheControl(BlockCyclic(block_size, kvp), num_pages)
    return Scheduler(SchedulerConfig(max_batch=max_batch, prefill_chunk=prefill_chunk), cache)


def make_sequence(index: int, prompt_len: int, num_tokens: int) -> Sequence:
    return Sequence(
        index=index,
        token_ids=[1000 * index + position for position in range(prompt_len)],
        prompt_len=prompt_len,
        sampling=SamplingParams(max_tokens=num_tokens),
        seed=index,
        max_len=prompt_len + num_tokens,
        output=RequestOutput(None),
    )


def spans(chunks: Many[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.seq.index, chunk.start, chunk.stop) for chunk in chunks]


def advance(scheduler: Scheduler, chunks: Many[Chunk]) -> list[Sequence]:
    """Do what the engine does with a step, and return the sequences that ended."""
    done = []
    scheduler.commit(list(chunks))
    for chunk in chunks:
        seq = chunk.seq
        if chunk.samples:
            seq.token_ids.append(1000 * seq.index + len(seq.token_ids))
            if len(seq.token_ids) == seq.max_len:
                scheduler.remove(seq)
                done.append(seq)
    return done


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    chunks = scheduler.schedule().chunks
    advance(scheduler, chunks)
    return spans(chunks)


@dataclass
class Run:
    """A run that checks every step; ``pages`` holds the token that was written to each (rank, page, offset)."""

    scheduler: Scheduler
    prefill_chunk: int
    max_batch: int
    pages: dict[tuple[int, int, int], int] = field(default_factory=dict)
    ended: list[Sequence] = field(default_factory=list)
    decisions: list[list[object]] = field(default_factory=list)

    def step(self) -> None:
        scheduler, before = self.scheduler, list(self.scheduler.running)
        num_preemptions = scheduler.cache.counters.preemptions
        planned = scheduler.schedule()
        chunks = planned.chunks
        self.move(planned.movements)
        assert chunks, "nothing to compute though there is work"
        self.check_order(before, scheduler.cache.counters.preemptions > num_preemptions)
        self.check_budget(chunks)
        self.check_slots()
        for chunk in chunks:
            self.compute(chunk)
        self.decisions.append(
            [
                (c.seq.index, c.start, c.stop, c.seq.batch_slot, c.seq.blocks.first_owner, *c.seq.blocks.pages)
                for c in chunks
            ]
        )
        self.ended += advance(scheduler, chunks)

    def check_order(self, before: list[Sequence], preempted: bool) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        for line in (running, waiting):
            assert [order_of(seq) for seq in line] == sorted(order_of(seq) for seq in line)
        if preempted:
            assert running == before[: len(running)], "who is preempted is the last, and nobody takes its place at once"
        else:
            assert set(before) <= set(running)

    def check_budget(self, chunks: list[Chunk]) -> None:
        prefill = [chunk.stop - chunk.start for chunk in chunks if chunk.stop - chunk.start > 1]
        assert sum(prefill) <= self.prefill_chunk
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= self.prefill_chunk + len(self.scheduler.running)
        computed = {chunk.seq.index for chunk in chunks}
        assert len(computed) == len(chunks)
        for seq in self.scheduler.running:
            if len(seq.token_ids) - seq.num_computed == 1:
                assert seq.index in computed, "decode rows always run"

    def check_slots(self) -> None:
        slots = [seq.batch_slot for seq in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.max_batch for slot in slots)
        assert all(seq.batch_slot == -1 and not seq.blocks.pages for seq in self.scheduler.waiting)

    def move(self, movements: list[Movement]) -> None:
        for each in movements:
            assert isinstance(each, CopyTokens), "there is no host tier here"
            for offset in range(each.num_tokens):
                self.pages[each.rank, each.target, offset] = self.pages[each.rank, each.source, offset]

    def compute(self, chunk: Chunk) -> None:
        """Write the chunk's tokens to its pages and read the whole context back, as attention would."""
        seq, place = chunk.seq, self.scheduler.cache.placement
        assert chunk.start == seq.num_computed < chunk.stop <= len(seq.token_ids)

        def slot(position: int) -> tuple[int, int, int]:
            block, offset = divmod(position, place.block_size)
            return place.owner(position, seq.blocks.first_owner), seq.blocks.pages[block], offset

        for position in range(chunk.start, chunk.stop):
            self.pages[slot(position)] = seq.token_ids[position]
        assert [self.pages.get(slot(position)) for position in range(chunk.stop)] == seq.token_ids[: chunk.stop]
