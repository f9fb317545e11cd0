"""The cache's brain over many simulated ranks: traffic, and how evenly running sequences fill the ranks.

A room is what a rank has left for new sequences. Its fill is the rest: pages of running sequences, shared ones once.
"""

import heapq
import statistics
from dataclasses import dataclass, field

import numpy as np
import pytest

from helix.cache.claim import Claim
from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.cache.pool import BlockTable
from parallel.placement import BlockCyclic

BLOCK = 64
GROWTH = 16  # blocks of tokens that a sequence decodes between two of its events


@dataclass
class Traffic:
    """Requests at random times, of lengths that are even on a logarithmic scale, that decode for a while."""

    seconds: float
    per_s: float
    shortest: int
    longest: int
    decoded: int
    tokens_per_s: float
    shared: int = 0  # tokens that all prompts begin with


@dataclass
class Fill:
    """What ranks held, at every tenth event from the first quarter of the traffic on."""

    uneven: list[float] = field(default_factory=list)  # max / mean
    mean: list[float] = field(default_factory=list)
    finished: int = 0
    most_running: int = 0
    evicted: int = 0


class Simulation:
    """One brain, which stands for that of every rank: they take the same decisions."""

    def __init__(self, kvp: int, num_pages: int, traffic: Traffic) -> None:
        self.place, self.traffic, self.fill = BlockCyclic(BLOCK, kvp), traffic, Fill()
        self.control = CacheControl(self.place, num_pages)
        self.draw = np.random.default_rng(17)
        self.prefix = self.tokens(traffic.shared)
        self.events: list[tuple[float, int, str]] = []
        self.waiting: list[Claim] = []
        self.running: dict[int, tuple[BlockTable, BlockKeys, int]] = {}  # table, keys, tokens at its end
        self.number = 0

    def tokens(self, count: int) -> list[int]:
        return self.draw.integers(0, 50_000, count).tolist()

    def at(self, time: float, number: int, what: str) -> None:
        heapq.heappush(self.events, (time, number, what))

    def run(self) -> Fill:
        traffic, time = self.traffic, 0.0
        while (time := time + self.draw.exponential(1 / traffic.per_s)) < traffic.seconds:
            self.number += 1
            self.at(time, self.number, "arrives")
        count = 0
        while self.events:
            now, number, what = heapq.heappop(self.events)
            if what == "arrives":
                length = int(traffic.shortest * (traffic.longest / traffic.shortest) ** self.draw.random())
                keys = BlockKeys(self.prefix + self.tokens(length - traffic.shared), BLOCK)
                self.waiting.append(self.control.claim(keys))
            elif self.grow(now, number):
                continue
            self.start(now)
            count += 1
            if count % 10 == 0 and traffic.seconds / 4 < now < traffic.seconds:
                self.note()
        self.check_empty()
        return self.fill

    def start(self, now: float) -> None:
        """Admit who waits, in turn; a prompt is computed at once."""
        while self.waiting:
            claim = self.waiting[0]
            length = len(claim.keys.token_ids)
            table = self.control.admit(claim, length)
            if table is None:
                return
            self.waiting.pop(0)
            self.control.commit(table, length)
            self.number += 1
            self.running[self.number] = table, claim.keys, length + self.traffic.decoded
            self.fill.most_running = max(self.fill.most_running, len(self.running))
            self.at(now + GROWTH * BLOCK / self.traffic.tokens_per_s, self.number, "grows")

    def grow(self, now: float, number: int) -> bool:
        """Decode some blocks, and return whether the sequence goes on; without pages it ends early."""
        table, keys, stop = self.running[number]
        length = min(stop, len(keys.token_ids) + GROWTH * BLOCK)
        if len(keys.token_ids) < stop and self.control.extend(table, length):
            keys.token_ids += self.tokens(length - len(keys.token_ids))
            self.control.commit(table, length)
            self.at(now + GROWTH * BLOCK / self.traffic.tokens_per_s, number, "grows")
            return True
        self.control.release(table, len(keys.token_ids))
        del self.running[number]
        self.fill.finished += 1
        return False

    def note(self) -> None:
        kvp = self.place.kvp
        fill = [self.control.num_pages - self.control.num_available(rank) for rank in range(kvp)]
        if not self.traffic.shared:  # every page of a running sequence counts once
            assert sum(fill) == sum(len(table.pages) for table, _, _ in self.running.values())
        if sum(fill):
            mean = sum(fill) / kvp
            self.fill.uneven.append(max(fill) / mean)
            self.fill.mean.append(mean)

    def check_empty(self) -> None:
        assert not self.waiting and not self.running
        assert all(self.control.num_available(rank) == self.control.num_pages for rank in range(self.place.kvp))


def test_unrelated_prompts_fill_few_ranks_evenly() -> None:
    fill = Simulation(16, 512, Traffic(600, 0.3, 2048, 65536, 1024, 20.0)).run()
    assert fill.finished > 100
    assert statistics.mean(fill.uneven) < 1.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shared", [0, 2048])
def test_traffic_on_1024_ranks(shared: int, record_property) -> None:
    """Requests of 64K to 1M tokens for two hours, most of which evict; a shared prefix begins on one rank for all."""
    traffic = Traffic(7200, 0.05, 65536, 1 << 20, 16384, 10.0, shared)
    fill = Simulation(1024, 1024, traffic).run()
    figures = {
        "requests": fill.finished, "most running": fill.most_running, "pages a rank": statistics.mean(fill.mean),
        "max/mean": statistics.mean(fill.uneven), "worst max/mean": max(fill.uneven),
    }  # fmt: skip
    record_property("figures", figures)
    print(f"shared {shared}: {figures}")
    if not shared:
        assert statistics.mean(fill.uneven) <= 1.02
