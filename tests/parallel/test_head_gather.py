import pytest
import torch
import torch.distributed as dist

from parallel.head_gather import HeadGather
from parallel.layout import split_evenly
from parallel.symmetric import Faults
from tests.one_gpu import LocalWorld


def queries(seed, rows, heads, width, dtype):
    """Random heads, some of them the NaN that an empty slot holds."""
    q = torch.randn(rows, heads, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[rows // 2, heads // 2] = -1
    return q


def body(heads):
    """What a rank has of heads of two sizes after their gather by the collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu, own = torch.device("cpu"), slice(*split_evenly(heads, world, rank))
    gather = HeadGather(dist.group.WORLD, num_heads=heads, head_dim=6, dtype=torch.float32, device=cpu, max_rows=9)
    return gather.heads, [gather(queries(width, 5, heads, width, torch.float32)[:, own]) for width in (6, 4)]


@pytest.mark.parametrize(("world", "heads"), [(2, 4), (4, 7)])
def test_every_rank_has_all_heads(ranks, world, heads):
    for rank, (own, gathered) in enumerate(ranks(world).run(body, heads)):
        assert own == split_evenly(heads, world, rank)
        for q in gathered:
            torch.testing.assert_close(
                q, queries(q.shape[2], 5, heads, q.shape[2], torch.float32), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.gpu
@pytest.mark.parametrize(("world_size", "heads"), [(2, 128), (3, 16), (8, 128), (5, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_up_to_eight_ranks_of_one_gpu_have_all_heads(monkeypatch, world_size, heads, dtype):
    world, device = LocalWorld(world_size, monkeypatch, "parallel.head_gather"), torch.device("cuda")
    faults = Faults(device)
    gathers = [
        HeadGather(
            group, num_heads=heads, head_dim=576, dtype=dtype, device=device, max_rows=8, fused=True, faults=faults,
            timeout_s=20.0,
        )
        for group in world.ranks
    ]  # fmt: skip
    for seed, rows in enumerate((1, 8, 3, 1)):
        q = queries(seed, rows, heads, 576, dtype).cuda()
        mine = [q[:, slice(*gather.heads)].contiguous() for gather in gathers]
        results = world.run(lambda rank, mine=mine: gathers[rank](mine[rank]), delays=torch.Generator())
        for result in results:
            torch.testing.assert_close(result, q, rtol=0, atol=0, equal_nan=True)
    assert Faults.decode(int(faults.word)) is None
