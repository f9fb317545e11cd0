"""Two worlds of rank processes that meet on loopback: one prefills, the other decodes, with real NIXL between them."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from scripts.make_checkpoint import make_checkpoint
from tests.ranks import RankFailure, RankPool


@contextmanager
def reserved_ports(count: int = 3) -> Iterator[list[int]]:
    """Give ports that nobody else can have meanwhile: they are bound, and whoever asks for one by number may listen."""
    with ExitStack() as stack:
        ports: list[int] = []
        for _ in range(count):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            ports.append(holder.getsockname()[1])
        yield ports


@dataclass
class Groups:
    """A prefill pool and a decode pool."""

    prefill: RankPool
    decode: RankPool

    def run(
        self,
        prefill_body: Callable[..., Any],
        decode_body: Callable[..., Any],
        *args: Any,
        fails: str = "",
        timeout_s: float = 120.0,
    ) -> tuple[list[Any], list[Any]]:
        """Run both bodies at once with ports of their own and ``args``; return what each group's ranks returned.

        The group that ``fails`` names, prefill or decode, must fail; its results are then empty.
        """
        problems = dict[str, RankFailure]()
        results: dict[str, list[Any]] = {"prefill": [], "decode": []}

        def call(name: str, pool: RankPool, other: RankPool, body: Callable[..., Any]) -> None:
            try:
                results[name] = pool.run(body, ports, *args, timeout_s=timeout_s)
            except RankFailure as failure:
                problems[name] = failure
                if name != fails:
                    other.kill()  # it may wait long for a group that is gone

        threads = [
            threading.Thread(target=call, args=("prefill", self.prefill, self.decode, prefill_body)),
            threading.Thread(target=call, args=("decode", self.decode, self.prefill, decode_body)),
        ]
        with reserved_ports() as ports:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for name, problem in problems.items():
            if name != fails:
                problem.add_note(f"({name} group; failed: {', '.join(problems)})")
                raise problem
        assert not fails or fails in problems, f"the {fails} group did not fail"
        return results["prefill"], results["decode"]


@pytest.fixture(scope="session")
def prefill_pools() -> Iterator[dict[int, RankPool]]:
    """The session's rank processes that prefill, by world size."""
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def groups(ranks: Callable[[int], RankPool], prefill_pools: dict[int, RankPool]) -> Callable[[int, int], Groups]:
    """``groups(2, 4)``: 2 ranks that prefill and 4 that decode."""

    def make(num_prefill: int, num_decode: int) -> Groups:
        if num_prefill not in prefill_pools:
            prefill_pools[num_prefill] = RankPool(num_prefill)
        return Groups(prefill_pools[num_prefill], ranks(num_decode))

    return make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny checkpoint."""

    @cache
    def make() -> str:
        path = tmp_path_factory.mktemp("transfer") / "model"
        make_checkpoint(path, layers=2)
        return str(path)

    return make()
