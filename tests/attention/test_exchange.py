import pytest
import torch
import torch.distributed as dist

from attention.exchange import CollectiveExchange, NoExchange, make_exchange
from attention.merge import merge_reference
from parallel.grid import split_evenly


def partials(rank: int, rows: int, heads: int, head_dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rank)
    out = torch.randn(rows, heads, head_dim, generator=generator).to(dtype)
    lse = torch.randn(rows, heads, generator=generator) * 3
    if rank == 1:
        out, lse = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)  # an empty shard
    lse[0] = -torch.inf  # a row that nobody sees
    return out, lse


def exchange_body(rows, heads, head_dim, dtype):
    size, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= size else torch.device("cpu")
    exchange = CollectiveExchange(dist.group.WORLD, heads, head_dim, device)
    out, lse = partials(rank, rows, heads, head_dim, dtype)
    return exchange(out.to(device), lse.to(device)).cpu()


@pytest.mark.parametrize(
    ("world", "heads", "dtype"),
    [
        (2, 4, torch.float32),
        (4, 7, torch.float32),
        (4, 8, torch.bfloat16),
        (4, 5, torch.float16),
        (8, 28, torch.float32),
    ],
)
def test_each_rank_gets_its_own_heads_merged(ranks, world, heads, dtype):
    rows, head_dim = 3, 16
    results = ranks(world).run(exchange_body, rows, heads, head_dim, dtype)
    outs, lses = zip(*(partials(rank, rows, heads, head_dim, dtype) for rank in range(world)), strict=True)
    expected = merge_reference(torch.stack(outs), torch.stack(lses))[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for rank, merged in enumerate(results):
        start, stop = split_evenly(heads, world, rank)
        torch.testing.assert_close(merged, expected[:, start:stop], rtol=tolerance, atol=tolerance)
        assert torch.equal(merged[0], torch.zeros_like(merged[0]))


def test_a_group_of_one_returns_its_partials():
    exchange = make_exchange("auto", group=None, num_heads=4, head_dim=8, device=torch.device("cpu"))
    assert isinstance(exchange, NoExchange)
    out = torch.randn(2, 4, 8)
    assert exchange(out, torch.zeros(2, 4)) is out


def test_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="attention.exchange = 'magic' must be one of auto, collective"):
        make_exchange("magic", group=None, num_heads=4, head_dim=8, device=torch.device("cpu"))
