"""Window pages without a model: rows read what was written at its position; pages are shared, given up, never lost."""

import random

import pytest

from helix.cache.control import CacheControl
from helix.cache.pool import BlockTable
from helix.cache.tree import NOWHERE, Block
from helix.cache.window_checkpoints import WindowCheckpoints
from helix.cache.windows import WindowPages, WindowTable, pages_for
from helix.config import SchedulerConfig
from helix.request import RequestOutput, Sequence
from helix.sampling import SamplingParams
from helix.scheduler import Scheduler
from parallel.placement import BlockCyclic


class World:
    """A scheduler with windows whose pages hold what was written: the tokens up to each position."""

    def __init__(self, seed, window, block_size, kvp):
        self.rng, self.window, self.size = random.Random(seed), window, block_size
        reserve = pages_for(window, block_size, max_batch=3, max_run=2, prefill_chunk=24)
        self.windows = WindowPages(window, block_size, reserve + self.rng.randrange(reserve))
        checkpoints, place = WindowCheckpoints(self.windows, 64, block_size), BlockCyclic(block_size, kvp)
        pages, host_pages = 320 // (block_size * kvp) + 1, seed % 2 * 640 // (block_size * kvp)
        cache = CacheControl(place, pages, host_pages=host_pages, partial_reuse=False, checkpoints=checkpoints)
        config = SchedulerConfig(max_batch=3, prefill_chunk=24)
        self.scheduler = Scheduler(config, cache, windows=self.windows)
        self.held = {}
        self.num_reused = self.num_made = 0

    def token(self, tokens):
        return hash(tuple(tokens)) % 7  # of integers: alike in every process

    def arrive(self):
        beginning = [self.rng.randrange(2)] * self.rng.randrange(1, 130)
        prompt = beginning + [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 30))]
        seq = Sequence(
            index=self.num_made, token_ids=prompt, prompt_len=len(prompt), sampling=SamplingParams(), seed=0,
            max_len=len(prompt) + self.rng.randrange(1, 40), output=RequestOutput(None),
        )  # fmt: skip
        self.num_made += 1
        self.scheduler.add(seq)

    def launch(self, step):
        """Write what a step's rows write, and hold what each reads against the tokens that it should see."""
        self.num_reused += sum(seq.num_computed for seq in step.admitted)
        for chunk in step.chunks:
            tokens, table = list(chunk.seq.token_ids), chunk.seq.blocks.window
            while len(tokens) < chunk.stop:
                tokens.append(self.token(tokens))
            for position in range(chunk.start, chunk.stop):
                page, offset = table.pages[position // self.size - table.first], position % self.size
                self.held[page, offset] = tuple(tokens[: position + 1])
            for position in range(chunk.start, chunk.stop):
                for seen in range(max(position + 1 - self.window, 0), position + 1):
                    page, offset = table.pages[seen // self.size - table.first], seen % self.size
                    assert self.held[page, offset] == tuple(tokens[: seen + 1])

    def land(self, step, in_flight):
        going_on = []
        for chunk in step.chunks:
            if chunk.seq.has_ended:
                self.scheduler.remove(chunk.seq)
            else:
                going_on.append(chunk)
        self.scheduler.commit(going_on)
        for chunk in going_on:
            seq = chunk.seq
            if chunk.samples:
                seq.token_ids.append(self.token(seq.token_ids))
                if len(seq.token_ids) == seq.max_len or self.rng.random() < 0.02:
                    seq.output.finish_reason = "stop"
                    if in_flight is None or all(other.seq is not seq for other in in_flight.chunks):
                        self.scheduler.remove(seq)

    def run(self, num_arrivals):
        flight = None
        for _ in range(5000):
            if self.num_made < num_arrivals and self.rng.random() < 0.15:
                self.arrive()
            if flight is None:
                if not self.scheduler.has_work:
                    continue
                flight = self.scheduler.schedule()
                self.launch(flight)
            ahead = self.scheduler.look_ahead(flight) if self.rng.random() < 0.7 else None
            if ahead is not None:
                self.launch(ahead)
            self.land(flight, ahead)
            flight = ahead
        assert not self.scheduler.has_work and flight is None


@pytest.mark.parametrize(("window", "block_size", "kvp"), [(24, 16, 1), (70, 16, 2), (5, 1, 1), (200, 16, 1)])
def test_random_runs_read_what_was_written_at_their_positions(window, block_size, kvp):
    reused = preemptions = onboarded = 0
    for seed in range(3):
        world = World(seed, window, block_size, kvp)
        world.run(30)
        total = world.windows.num_free
        cache = world.scheduler.cache
        reused, preemptions = reused + world.num_reused, preemptions + cache.counters.preemptions
        onboarded += cache.counters.blocks_onboarded
        cache.clear()
        assert world.windows.num_free == len(world.windows._holders) >= total and not any(world.windows._holders)
    assert reused and preemptions and onboarded


def test_checkpoints_give_up_their_pages_to_sequences_and_lose_none():
    windows = WindowPages(24, 16, 8)
    checkpoints, root = WindowCheckpoints(windows, 64, 16), Block(b"", None, NOWHERE, NOWHERE, 0)
    tables = []
    for number in range(5):  # each ends behind its third block: pages of blocks 1 and 2 stay, while there is room
        block = root
        for depth in range(3):
            block = Block(bytes([number, depth]), block, 0, 0, depth)
        table = BlockTable(0, tail=block)
        windows.extend(table.window, 50)
        windows.trim(table.window, 50)
        checkpoints.keep_end(table, 50)
        windows.release(table.window)
        tables.append(table)
    assert [checkpoints.has(table.tail) for table in tables] == [False, False, True, True, True]
    late = BlockTable(0, tail=tables[2].tail)
    checkpoints.restore(late, 0)
    assert (late.window.first, len(late.window.pages)) == (1, 2)
    windows.extend(late.window, 48 + 6 * 16)  # takes all that others hold, not its own
    assert late.window.stop == 9 and len({*late.window.pages}) == 8
    windows.release(late.window)
    checkpoints.clear()
    assert windows.num_free == 8


@pytest.mark.parametrize(("window", "block_size", "chunk"), [(24, 16, 33), (128, 64, 2048), (5, 1, 3), (1, 64, 64)])
def test_a_long_sequence_holds_pages_of_its_window_and_a_chunk_alone(window, block_size, chunk):
    most = pages_for(window, block_size, max_batch=1, max_run=2, prefill_chunk=chunk)
    pages, table, held = WindowPages(window, block_size, most), WindowTable(), 0
    for start in range(0, 100_000, chunk):
        pages.extend(table, start + chunk)
        held = max(held, len(table.pages))
        assert table.first * block_size <= max(start + 1 - window, 0)  # what the chunk's first row sees has pages
        pages.trim(table, start + chunk)
    assert held <= (window + chunk) // block_size + 3
    pages.release(table)
    assert pages.num_free == most and table.stop == table.first
