"""What every room's tests share: the rank processes, the marker for GPUs, Triton's interpreter without one."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from tests.gpus import rotated
from tests.ranks import RankPool

if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count() > 1:  # counted without touching CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ["CUDA_VISIBLE_DEVICES"] = rotated(visible.split(","), os.environ["PYTEST_XDIST_WORKER"])

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any room is imported

# Ranks and kernels share the machine's cores: how long one example takes says nothing.
hypothesis.settings.register_profile("helix", deadline=None)
hypothesis.settings.load_profile("helix")


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[dict[int, RankPool]]:
    """The session's rank processes by world size, each set started by its first test."""
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(request: pytest.FixtureRequest, rank_pools: dict[int, RankPool]) -> Callable[..., RankPool]:
    """``ranks(4)`` is a pool of 4 rank processes; ``ranks()`` takes the number from the test's marker ``ranks(n)``."""

    def pool(world_size: int | None = None) -> RankPool:
        world_size = world_size or marked_ranks(request.node)
        if world_size is None:
            raise ValueError("ranks() needs a number, or the marker @pytest.mark.ranks(n) on its test")
        skip_without_gpus(request.node, world_size)
        if world_size not in rank_pools:
            rank_pools[world_size] = RankPool(world_size)
        return rank_pools[world_size]

    return pool


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where its GPUs are missing."""
    skip_without_gpus(item, marked_ranks(item) or 1)


def marked_ranks(item: pytest.Item) -> int | None:
    """Return n of the test's marker ``ranks(n)``."""
    marker = item.get_closest_marker("ranks")
    return marker.args[0] if marker else None


def skip_without_gpus(item: pytest.Item, num_gpus: int) -> None:
    """Skip a test marked ``gpu`` on a machine with fewer than ``num_gpus`` GPUs."""
    if item.get_closest_marker("gpu") and torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA GPUs, this machine has {torch.cuda.device_count()}")
