"""The doctor: what is wrong is said of the ranks that it concerns, and ranks on CPUs are timed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from scripts.doctor import Scope, scopes_of, within
from scripts.rank_facts import Gpu, RankFacts, problems_of, slow_groups

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
Facts = list[RankFacts]


def two_nodes() -> Facts:
    """Two nodes of two ranks with a GPU each, and nothing wrong."""
    return [
        RankFacts(rank, f"n{rank // 2}", rank // 2, rank % 2, 2, Gpu("H", f"GPU-{rank}", 99, 100, (1, 1)), 2, VERSIONS)
        for rank in range(4)
    ]


def change(rank: int, **values: object) -> Callable[[Facts], Facts]:
    return lambda facts: [replace(each, **values) if each.rank == rank else each for each in facts]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (change(1, gpu=Gpu("H", "GPU-0", 99, 100, (1, 1))), "ranks 0-1 on n0 have the same GPU (GPU-0); start"),
        (change(3, gpu=None, visible=0), "ranks 3 see no GPU (n1), others do; ask the scheduler"),
        (lambda facts: [replace(each, local_world_size=3) for each in facts], "n0 has 2 GPUs for 3 ranks; start 2"),
        (lambda facts: facts[:3], "unequal numbers of ranks (2 on node 0, 1 on node 1)"),
        (change(2, gpu=Gpu("G", "GPU-2", 99, 100, (1, 1))), "GPUs differ (H on ranks 0-1, 3; G on ranks 2)"),
        (change(2, gpu=Gpu("H", "GPU-2", 70, 100, (1, 1))), "rank 2 on n1: 30% of its GPU's memory is taken already"),
        (change(2, gpu=Gpu("H", "GPU-2", 99, 100, (0, 1))), "ranks 2 do not reach all GPUs of their node directly"),
        (change(0, versions=VERSIONS | {"torch": "2.13.0"}), "torch differs: 2.13.0 on ranks 0, 2.11.0 on ranks 1-3"),
        (change(3, settings={"NCCL_P2P_DISABLE": "1"}), "NCCL_P2P_DISABLE differs: unset on ranks 0-2, 1 on ranks 3"),
        (change(3, clock_s=60.0), "clocks of n0 and n1 are 60.0 s apart"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_ranks(spoil: Callable[[Facts], Facts], line: str) -> None:
    assert problems_of(two_nodes()) == []
    found = problems_of(spoil(two_nodes()))
    assert len(found) == 1 + ("2 GPUs for" in line)  # of both nodes
    assert line in found[0]
    assert "; " in found[0]  # the way out


def test_interfaces_may_differ_between_hosts() -> None:
    assert problems_of(change(3, settings={"GLOO_SOCKET_IFNAME": "eth1"})(two_nodes())) == []


def test_ranks_of_a_node_and_their_like_on_other_nodes_are_timed() -> None:
    inside, between = Scope("inside a node", [[0, 1], [2, 3]]), Scope("between nodes", [[0, 2], [1, 3]])
    assert scopes_of(two_nodes()) == [inside, between]
    assert scopes_of(two_nodes()[:2]) == [Scope("inside a node", [[0, 1]])]
    assert scopes_of([two_nodes()[0], two_nodes()[2]]) == [Scope("between nodes", [[0, 2]])]


def test_a_group_far_slower_than_the_median_is_named() -> None:
    [line] = slow_groups("exchange", {"ranks 0, 1": 10.0, "ranks 2, 3": 11.0, "ranks 4, 5": 40.0})
    assert line.startswith("exchange of ranks 4, 5 takes 3.6 times the median")
    assert slow_groups("exchange", {"ranks 0, 1": 10.0, "ranks 2, 3": 40.0}) == []  # which of two is the slow one?


def test_what_does_not_end_is_left_in_time() -> None:
    with pytest.raises(ValueError, match="timing NCCL did not end within timeout_s = 0.05: a link is down"):
        within(0.05, "timing NCCL", lambda: time.sleep(1))


def test_ranks_on_cpus_are_looked_at() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*launch, "-m", "scripts.doctor", "repeats=2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [each["rank"] for each in result["ranks"]] == [0, 1]
    [link] = result["links"]
    assert (link["where"], link["over"], link["ranks each"]) == ("inside a node", "gloo", 2)
    assert link["all-reduce GB/s"] > 0 < link["exchange us"]
    assert result["wrong"] == []
