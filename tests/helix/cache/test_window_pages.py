"""Window pages without a model: rows read what was written at its position; pages are shared, given up, never lost."""

import pytest

from helix.cache.checkpoints import Kept
from helix.cache.control import CacheControl
from helix.cache.pool import BlockTable
from helix.cache.tree import NOWHERE, Block
from helix.cache.window_checkpoints import WindowCheckpoints
from helix.cache.windows import WindowPages, WindowTable, pages_for
from helix.config import SchedulerConfig
from helix.scheduler import Scheduler
from parallel.placement import BlockCyclic
from tests.helix.cache.steps import Walk


class World(Walk):
    """A scheduler with windows whose pages hold what was written: the tokens up to each position."""

    def __init__(self, seed, window, block_size, kvp):
        super().__init__(seed, 130)
        self.window, self.size = window, block_size
        reserve = pages_for(window, block_size, max_batch=3, max_run=2, prefill_chunk=24)
        self.windows = WindowPages(window, block_size, reserve + self.rng.randrange(reserve))
        checkpoints, place = WindowCheckpoints(self.windows, 64, block_size), BlockCyclic(block_size, kvp)
        pages, host_pages = 320 // (block_size * kvp) + 1, seed % 2 * 640 // (block_size * kvp)
        cache = CacheControl(place, pages, host_pages=host_pages, partial_reuse=False, checkpoints=checkpoints)
        config = SchedulerConfig(max_batch=3, prefill_chunk=24)
        self.scheduler = Scheduler(config, cache, windows=self.windows)
        self.held = {}

    def launch(self, step):
        """Write what a step's rows write, and hold what each reads against the tokens that it should see."""
        for chunk in step.chunks:
            tokens, table = self.tokens_of(chunk), chunk.seq.blocks.window
            for position in range(chunk.start, chunk.stop):
                page, offset = table.pages[position // self.size - table.first], position % self.size
                self.held[page, offset] = tuple(tokens[: position + 1])
            for position in range(chunk.start, chunk.stop):
                for seen in range(max(position + 1 - self.window, 0), position + 1):
                    page, offset = table.pages[seen // self.size - table.first], seen % self.size
                    assert self.held[page, offset] == tuple(tokens[: seen + 1])


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


def test_a_prompt_leaves_checkpoints_in_passing():
    windows = WindowPages(24, 16, 20)
    checkpoints, blocks = WindowCheckpoints(windows, 64, 16), [Block(b"", None, NOWHERE, NOWHERE, 0)]
    for depth in range(16):
        blocks.append(Block(bytes([depth]), blocks[-1], 0, 0, depth))
    table = BlockTable(0, tail=blocks[12])
    windows.extend(table.window, 200)
    assert checkpoints.end(0, 200, 200) == 200  # one chunk
    checkpoints.commit(table, Kept(0, 0, 200, 200))
    assert [number for number, block in enumerate(blocks) if checkpoints.has(block)] == [4, 8, 12]
    seen = table.window.pages[6:8]
    windows.trim(table.window, 200)
    windows.extend(table.window, 257)
    table.tail = blocks[16]
    checkpoints.commit(table, Kept(0, 256, 257, 257))
    assert not checkpoints.has(table.tail), "a row that decodes leaves none, though its window is there"
    windows.release(table.window)
    late = BlockTable(0, tail=blocks[8])
    checkpoints.restore(late, 0)
    assert (late.window.first, late.window.pages) == (6, seen) and windows.num_free == 20 - 6


@pytest.mark.parametrize(
    ("window", "block_size", "chunk", "length"),
    [(24, 16, 33, 100_000), (128, 64, 2048, 1 << 20), (5, 1, 3, 100_000), (1, 64, 64, 100_000)],
    ids=["24", "as gpt-oss", "5", "1"],
)
def test_a_long_sequence_holds_pages_of_its_window_and_a_chunk_alone(window, block_size, chunk, length):
    most = pages_for(window, block_size, max_batch=1, max_run=2, prefill_chunk=chunk)
    pages, table, held = WindowPages(window, block_size, most), WindowTable(), 0
    for start in range(0, length, chunk):
        pages.extend(table, start + chunk)
        held = max(held, len(table.pages))
        assert table.first * block_size <= max(start + 1 - window, 0)  # what the chunk's first row sees has pages
        pages.trim(table, start + chunk)
    assert held <= (window + chunk) // block_size + 3
    pages.release(table)
    assert pages.num_free == most and table.stop == table.first
