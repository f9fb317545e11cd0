"""Checkpoints of states without a model: whoever begins behind a block finds the states as they were there."""

import pytest

from helix.cache.checkpoints import MOST_ON_THE_WAY, Checkpoints
from helix.cache.control import CacheControl
from helix.cache.movements import CopyState, MoveState
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
            for rows, checkpoint in chunk.keeps:
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
        assert not any(checkpoints._on_the_way.values()) and not checkpoints._passing
    assert reused and preemptions and onboarded and bool(passed) == (passes and chunk > 64)


def test_chunks_pass_places_from_whole_units_on_and_end_at_them_elsewhere():
    plain, passing = (Checkpoints(99, 128, 16, passes=passes) for passes in (False, True))
    assert [plain.end(start, 700, 1000) for start in (0, 128, 130)] == [128, 256, 256]
    assert passing.end(0, 700, 1000) == 640, "a whole unit, so that the next one passes as well"
    assert (passing.end(0, 1000, 1000), passing.end(130, 1000, 1000)) == (1000, 256)
    keeps, _ = passing.keep_on_the_way(128, 1000, 1000, 0)
    assert [rows for rows, _ in keeps] == [128, 256, 384, 512, 640, 768, 832], "the last whole unit among them"
    assert passing.end(0, 100_000, 200_000) == 128 * MOST_ON_THE_WAY
    assert passing.end(0, 30, 1000) == 30 and not passing.keep_on_the_way(30, 60, 1000, 1)[0]
    assert not passing.copies_behind(128, 896, 1000, 0) and passing.copies_behind(130, 256, 1000, 1)
