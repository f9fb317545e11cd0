"""Random operations over 1 to 16 ranks: no page is lost or owned twice, nothing claimed goes, all ranks agree.

After every operation ``World.check`` recounts pages, pins and queues from scratch; every computed chunk reads its whole
context back through the table; what a claim finds is what a naive search over all paths of the tree finds.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix.cache.claim import Claim
from helix.cache.retention import Retention
from tests.helix.cache.world import World, path_of

OPERATIONS = {
    "claim": 5, "admit": 6, "admit_all": 3, "drop": 1, "move": 1, "compute": 8, "extend": 4, "finish": 5, "release": 2,
    "discard": 1, "offload_ahead": 1, "pass_time": 1, "clear": 1,
}  # fmt: skip
Operation = tuple[str, int]  # its name, and a number from which it draws what it needs


class Driver:
    """Does operations on a world, several sequences at a time, and checks what each must do."""

    def __init__(self, kvp: int, block_size: int, num_pages: int, host_pages: int, number: int) -> None:
        self.partial = number % 4 > 0
        chosen = {
            "host_pages": host_pages,
            "partial_reuse": self.partial,
            "offload_min_priority": (0, 35, 36)[number % 3],
        }
        self.world = World(kvp, block_size, num_pages, chosen)
        self.room = kvp * num_pages * block_size
        self.claims: list[list[Claim]] = []
        self.reached: Counter[str] = Counter()
        self.now = 0.0

    def run(self, operations: list[Operation]) -> Counter[str]:
        for name, number in operations:
            getattr(self, name)(Random(number))
            self.world.check(self.claims)
        self.end()
        return self.reached

    def claim(self, random: Random) -> None:
        """Few beginnings and few endings, so that all is shared, wholly or in part."""
        longest = min(self.room, 6 * self.world.block_size * min(self.world.kvp, 3))
        stem = Random(random.randrange(3)).choices(range(3), k=longest)
        cut = random.randint(0, longest)
        tokens = (stem[:cut] + random.choices(range(2), k=longest))[: random.randint(1, longest)]
        salt = "other" if random.random() < 0.1 else ""
        retention = ()
        if random.random() < 0.3:
            duration = random.choice([None, 5.0, 20.0])
            start = random.randrange(longest)
            retention = (Retention(start=start, priority=random.randrange(101), duration_s=duration),)
        expected = self.naive_match(tokens, salt)
        claims = self.world.claim(self.world.keys(tokens, salt), retention)
        assert claims[0].num_tokens == expected
        self.claims.append(claims)

    def naive_match(self, tokens: list[int], salt: str) -> int:
        size, limit = self.world.block_size, len(tokens) - 1
        best = 0
        for block in self.world.cache.blocks.tree.walk():
            root, path = path_of(block)
            if root == salt.encode():
                common = next((i for i in range(min(len(path), limit)) if path[i] != tokens[i]), min(len(path), limit))
                best = max(best, common if self.partial else common // size * size)
        return best

    def admit(self, random: Random) -> None:
        if not self.claims:
            self.claim(random)
        claims = self.claims.pop(random.randrange(len(self.claims)))
        promised, whole = claims[0].num_tokens, len(claims[0].chain) * self.world.block_size
        alone = not self.claims and not self.world.running
        running = self.world.admit(claims)
        if running is None:
            assert not alone, "a request that fits the pool, and is alone, is admitted"
            self.world.drop(claims)
            self.reached["put back"] += 1
        else:
            assert running.num_computed in (promised, whole), "what was promised is reused"
            self.reached["gave up a part"] += running.num_computed < promised

    def admit_all(self, random: Random) -> None:
        for _ in range(random.randint(0, 2)):
            self.claim(random)
        while self.claims:
            self.admit(random)

    def drop(self, random: Random) -> None:
        if self.claims:
            self.world.drop(self.claims.pop())

    def move(self, random: Random) -> None:
        self.world.move()

    def compute(self, random: Random) -> None:
        self.world.move()
        for running in random.sample(self.world.running, len(self.world.running) // 2 or len(self.world.running)):
            if running.num_computed < len(running.tokens):
                self.world.compute(running, random.choice([1, 3, None]))

    def extend(self, random: Random) -> None:
        for running in self.world.running:
            more = random.choices(range(2), k=random.randint(1, 3))
            if len(running.tokens) + len(more) <= self.room:
                self.world.extend(running, more)

    def release(self, random: Random) -> None:
        """Preempt one, wherever it stands; movements that it caused may still be to come."""
        if self.world.running:
            self.world.release(random.choice(self.world.running))

    def finish(self, random: Random) -> None:
        if self.world.running:
            running = random.choice(self.world.running)
            self.world.move()
            if running.num_computed < len(running.tokens):
                self.world.compute(running)
            self.world.release(running)

    def discard(self, random: Random) -> None:
        if self.world.running:
            self.world.release(random.choice(self.world.running), keep=False)

    def offload_ahead(self, random: Random) -> None:
        self.world.for_all(lambda cache: cache.offload_ahead())

    def pass_time(self, random: Random) -> None:
        self.now += random.randint(1, 10)
        self.world.for_all(lambda cache: cache.advance(self.now))

    def clear(self, random: Random) -> None:
        if not self.world.running and not self.claims and random.random() < 0.2:
            self.world.for_all(lambda cache: cache.clear())
            assert not self.world.cache.blocks.tree.roots

    def end(self) -> None:
        """Let everything go: nothing is pinned, every page can be had, and the events tell what is left."""
        world = self.world
        while self.claims:
            world.drop(self.claims.pop())
        world.move()
        for running in list(world.running):
            world.release(running)
        world.check()
        assert all(block.pins == 0 for block in world.cache.blocks.tree.walk())
        assert [world.cache.num_available(rank) for rank in range(world.kvp)] == [world.num_pages] * world.kvp
        check_events(world)
        self.reached.update(world.cache.counters.as_dict())


def check_events(world: World) -> None:
    """Whoever follows the events knows exactly what is cached, and where."""
    followed: dict[str, Any] = {}
    for event in world.events[0]:
        if event.event == "stored":
            assert event.hash not in followed
            followed[event.hash] = event
        elif event.event == "moved":
            assert followed[event.hash].tier != event.tier
            followed[event.hash] = event
        else:
            assert followed.pop(event.hash).tier == event.tier
    late: dict[str, Any] = {}
    world.cache.listen(lambda event: late.__setitem__(event.hash, event))
    assert {name: event.tier for name, event in followed.items()} == {name: e.tier for name, e in late.items()}


SIZES = {
    "kvp": [1, 1, 2, 2, 3, 4, 8, 16],
    "block_size": [1, 2, 4],
    "num_pages": [1, 2, 4, 6, 12, 24],
    "host_pages": [0, 0, 2, 8, 40],
}
names: Callable[[], st.SearchStrategy[str]] = lambda: st.sampled_from(  # noqa: E731
    [name for name, weight in OPERATIONS.items() for _ in range(weight)]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SIZES.items()}),
    number=st.integers(0, 11),
    operations=st.lists(st.tuples(names(), st.integers(0, 1 << 16)), min_size=5, max_size=60),
)
def test_all_holds_after_any_operations(sizes: dict[str, int], number: int, operations: list[Operation]) -> None:
    Driver(**sizes, number=number).run(operations)


@pytest.mark.parametrize(
    "seeds", [range(500), pytest.param(range(500, 4500), marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=len
)
def test_all_holds_after_hundreds_of_long_random_sequences_of_operations(seeds: range) -> None:
    reached: Counter[str] = Counter()
    for seed in seeds:
        random = Random(seed)
        sizes = {name: random.choice(values) for name, values in SIZES.items()}
        chosen = random.choices([*OPERATIONS], [*OPERATIONS.values()], k=random.randint(20, 60))
        operations = [(name, random.randrange(1 << 30)) for name in chosen]
        try:
            reached += Driver(**sizes, number=random.randrange(12)).run(operations)
        except Exception:
            pytest.fail(f"seed {seed}: {sizes}", pytrace=True)
    kinds = ("reused", "copied", "onboarded", "offloaded", "evicted")
    assert all(reached[f"blocks_{kind}"] > len(seeds) // 5 for kind in kinds), reached
    assert min(reached["put back"], reached["gave up a part"]) > len(seeds) // 200, reached
