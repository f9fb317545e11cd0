"""Checkpoints of states without a model: whoever begins behind a block finds the states as they were there."""

import pytest

from helix.cache.checkpoints import MOST_ON_THE_WAY, Checkpoints, Kept
from helix.cache.control import CacheControl
from helix.cache.movements import EVERY_RANK, CopyState, MoveState
from helix.cache.pool import BlockTable
from helix.cache.tree import NOWHERE, Block
from helix.config import SchedulerConfig
from helix.scheduler import Scheduler
from parallel.placement import BlockCyclic
from tests.helix.cache.steps import Walk


class World(Walk):
    """A scheduler with states that are what they are of: the tokens before a position."""

    def __init__(self, seed, chunk, passes, kvp):
        super().__init__(seed, 400)
        self.checkpoints = Checkpoints(
            self.rng.randrange(1, 7), self.rng.choice((64, 128, 256)), 16, host_slots=seed % 2 * 3, passes=passes
        )
        cache = CacheControl(
            BlockCyclic(16, kvp), 60 // kvp, host_pages=seed % 2 * 40, partial_reuse=False, checkpoints=self.checkpoints
        )
        self.scheduler = Scheduler(SchedulerConfig(max_batch=3, prefill_chunk=chunk), cache)
        self.states, self.kept, self.num_onboarded, self.num_passed = {}, {}, 0, 0

    def launch(self, step):
        for movement in step.movements:
            if isinstance(movement, MoveState):
                self.kept[movement.target] = self.kept[movement.source]
            elif isinstance(movement, CopyState) and movement.keeps:
                self.kept[movement.checkpoint] = self.states[movement.slot]
            elif isinstance(movement, CopyState):
                self.states[movement.slot] = self.kept[movement.checkpoint]
                self.num_onboarded += movement.checkpoint >= self.checkpoints.num_slots
        for chunk in step.chunks:
            tokens, slot = self.tokens_of(chunk), chunk.seq.batch_slot
            assert not chunk.start or self.states[slot] == tokens[: chunk.start]
            for rows, checkpoint in chunk.kept.on_the_way:
                assert 0 < rows <= chunk.stop - chunk.start and rows % 64 == 0
                self.kept[checkpoint] = tokens[: chunk.start + rows]
                self.num_passed += rows < chunk.stop - chunk.start
            self.states[slot] = tokens[: chunk.stop]


@pytest.mark.parametrize(("chunk", "passes", "kvp"), [(21, True, 1), (200, True, 2), (130, False, 1), (500, True, 1)])
def test_random_runs_go_on_from_the_states_of_their_own_tokens(chunk, passes, kvp):
    reused = preemptions = onboarded = passed = 0
    for seed in range(6):
        world = World(seed, chunk, passes, kvp)
        world.run(40)
        checkpoints = world.checkpoints
        reused, passed = reused + world.num_reused, passed + world.num_passed
        onboarded += world.num_onboarded
        preemptions += world.scheduler.cache.counters.preemptions
        used = [*checkpoints._free, *checkpoints._slots.values()]
        on_host = [*checkpoints._host_free, *checkpoints._host_slots.values()]
        assert sorted(used + on_host) == list(range(checkpoints.num_slots + checkpoints.host_slots)), "none is lost"
        assert not any(checkpoints._kept.values())
    assert reused and preemptions and onboarded and bool(passed) == (passes and chunk > 64)


def test_chunks_pass_places_from_whole_units_on_and_end_at_them_elsewhere():
    plain, passing = (Checkpoints(99, 128, 16, passes=passes) for passes in (False, True))
    assert [plain.end(start, 700, 1000) for start in (0, 128, 130)] == [128, 256, 256]
    assert passing.end(0, 700, 1000) == 640, "a whole unit, so that the next one passes as well"
    assert (passing.end(0, 1000, 1000), passing.end(130, 1000, 1000)) == (1000, 256)
    assert [rows for rows, _ in passing.plan(128, 1000, 1000, 0)[0].on_the_way] == [
        128,
        256,
        384,
        512,
        640,
        768,
        832,
    ], "the last whole unit among them"
    assert passing.end(0, 100_000, 200_000) == 128 * MOST_ON_THE_WAY
    assert passing.end(0, 30, 1000) == 30 and passing.plan(30, 60, 1000, 1) == (Kept(1, 30, 60, 1000), [])
    assert passing.plan(128, 896, 1000, 0)[0].behind is None and passing.plan(130, 256, 1000, 1)[0].behind is not None


def test_a_place_is_due_where_a_sequence_leaves_the_tree():
    plain, passing = (Checkpoints(99, 512, 16, passes=passes) for passes in (False, True))
    assert plain.end(0, 700, 1000, 300) == 256 and plain.end(256, 700, 1000, 300) == 512
    assert [rows for rows, _ in passing.plan(0, 1000, 1000, 0, 300)[0].on_the_way] == [256, 512, 960]
    assert [rows for rows, _ in passing.plan(0, 1000, 1000, 1, 63)[0].on_the_way] == [512, 960], "less than a unit"
    assert [rows for rows, _ in passing.plan(256, 1000, 1000, 2, 300)[0].on_the_way] == [256, 704], "it is behind"
    assert [passing.last_below(position, 1000, 300) for position in (200, 290, 600, 999)] == [0, 256, 512, 960]


def test_what_is_kept_of_a_chunk_is_free_again_unless_it_is_committed():
    checkpoints = Checkpoints(3, 64, 16, passes=True)
    for _ in range(2):  # a step is made, not taken, and made again
        assert [rows for rows, _ in checkpoints.plan(0, 256, 1000, 0)[0].on_the_way] == [128, 192, 256], (
            "the last three"
        )
    assert not checkpoints._free
    checkpoints.leave(0)
    assert sorted(checkpoints._free) == [0, 1, 2]
    for _ in range(2):
        kept, moved = checkpoints.plan(64, 65, 65, 1)
        assert moved == [CopyState(EVERY_RANK, 1, kept.before, keeps=True)] and len(checkpoints._free) == 2
    root = Block(b"", None, NOWHERE, NOWHERE, 0)
    blocks = [root]
    for depth in range(4):
        blocks.append(Block(bytes([depth]), blocks[-1], 0, 0, depth))
    table = BlockTable(0, tail=blocks[4])
    assert checkpoints.commit(table, kept) == [] and checkpoints.has(blocks[4]) and len(checkpoints._free) == 2
    assert checkpoints.commit(table, kept) == [], "once"
    kept, moved = checkpoints.plan(3, 64, 200, 2)
    assert not moved and kept.behind is not None
    assert checkpoints.commit(table, kept) == [], "that block has one"
    assert len(checkpoints._free) == 2
