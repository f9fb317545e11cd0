import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import all_gather, all_reduce_, all_to_all
from parallel.grid import HelixGrid
from parallel.launch import agree, from_rank0, gather_values, minimum, minimums, start, stop
from parallel.layout import Layout


def collectives_body():
    rank, size = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.device_count() >= size else "cpu"
    group = dist.group.WORLD
    summed = all_reduce_(torch.full((3,), float(rank), device=device), group).cpu()
    gathered = all_gather(torch.full((2, 3), rank, device=device).T, group).cpu()
    swapped = all_to_all(torch.arange(size, device=device).unsqueeze(1) * 10 + rank, group).cpu()
    return summed.tolist(), gathered[:, 0, 0].tolist(), swapped[:, 0].tolist()


def test_collectives_sum_gather_and_swap(ranks):
    for rank, (summed, gathered, swapped) in enumerate(ranks(4).run(collectives_body)):
        assert summed == [6.0] * 3
        assert gathered == [0, 1, 2, 3]
        assert swapped == [rank * 10 + sender for sender in range(4)]


def test_a_group_of_one_costs_nothing():
    tensor = torch.arange(3.0)
    assert all_reduce_(tensor, None) is tensor
    assert torch.equal(all_gather(tensor, None), tensor.unsqueeze(0))


def agree_body(bad_ranks):
    def step():
        if dist.get_rank() in bad_ranks:
            raise ValueError(f"no file on rank {dist.get_rank()}")
        return dist.get_rank()

    try:
        return agree(step)
    except ValueError as error:
        return str(error)


def test_a_problem_of_one_rank_is_raised_on_all_with_its_message(ranks):
    assert ranks(4).run(agree_body, []) == [0, 1, 2, 3]
    assert ranks(4).run(agree_body, [2, 3]) == ["no file on rank 2"] * 4


def defect_body(collective, culprit):
    """What each rank raises when a step of one rank fails otherwise than by bad input."""

    def step():
        if dist.get_rank() == culprit:
            raise KeyError("a defect")

    with pytest.raises(Exception) as raised:
        collective(step)
    return raised.type.__name__, str(raised.value)


@pytest.mark.parametrize(("collective", "culprit"), [(agree, 1), (from_rank0, 0)], ids=["agree", "from_rank0"])
def test_a_defect_of_one_rank_ends_all_and_keeps_its_type_there(ranks, collective, culprit):
    ends = [("RuntimeError", f"rank {culprit} failed: 'a defect'")] * 2
    ends[culprit] = ("KeyError", "'a defect'")
    assert ranks(2).run(defect_body, collective, culprit) == ends


def rank0_body(fails):
    def step():
        if fails:
            raise OSError("disk gone")
        return {"from": dist.get_rank()}

    try:
        return from_rank0(step)
    except ValueError as error:
        return str(error)


def test_rank_0_decides_for_all(ranks):
    assert ranks(2).run(rank0_body, False) == [{"from": 0}] * 2
    assert ranks(2).run(rank0_body, True) == ["disk gone"] * 2


def values_body():
    rank = dist.get_rank()
    return minimum(10 - rank), minimums([rank, 5 - rank, -rank]), gather_values(rank**2)


def test_minimum_and_values_are_the_same_everywhere(ranks):
    assert ranks(4).run(values_body) == [(7, [0, 2, -3], [0, 1, 4, 9])] * 4


def test_a_world_of_one_needs_no_group():
    assert (agree(lambda: 5), from_rank0(lambda: 6), minimum(7), gather_values(8)) == (5, 6, 7, [8])
    assert minimums([3, 1]) == [3, 1]


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="runtime.device = 'tpu' must be one of auto, cpu, cuda"):
        start("tpu")


def split_world(rank, world_size, split, port):
    """What one process sees of a world of its own making that is split in two."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    launch = start("cpu", timeout_s=60, split=split)
    assert start("cpu", timeout_s=60, split=split) == launch
    if launch.part and launch.speaks:
        launch.store.set("address", "here")
    found = launch.store.get("address").decode()
    values = gather_values(100 * launch.part + launch.rank)
    grid = HelixGrid.create(Layout(kvp=launch.world_size))
    stop()
    return launch.part, launch.rank, launch.world_size, values, grid.rank, found


def test_the_parts_of_a_split_world_are_worlds_and_find_each_other():
    context = get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        jobs = [pool.submit(split_world, rank, 3, 1, str(store.port)) for rank in range(3)]
        seen = [job.result(timeout=60) for job in jobs]
    assert seen == [(0, 0, 1, [0], 0, "here"), (1, 0, 2, [100, 101], 0, "here"), (1, 1, 2, [100, 101], 1, "here")]


@pytest.mark.parametrize("split", [1, 2])
def test_a_split_that_leaves_no_ranks_is_refused(split, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=f"transfer.prefill_ranks = {split} must leave ranks that decode, but 1 start"):
        start("cpu", split=split)
