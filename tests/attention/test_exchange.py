import pytest
import torch
import torch.distributed as dist

from attention.exchange import CollectiveExchange, Heads, NoExchange, make_exchange
from attention.merge import merge_reference
from attention.partial import Partials
from parallel.layout import split_evenly
from tests.attention.cases import stacked


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
    exchange = CollectiveExchange(dist.group.WORLD, Heads(heads, head_dim, dtype, device, num_layers=1))
    out, lse = partials(rank, rows, heads, head_dim, dtype)
    return exchange(Partials(out.to(device), lse.to(device))).cpu()


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


CPU = Heads(num_heads=4, head_dim=8, dtype=torch.float32, device=torch.device("cpu"), num_layers=1)


def test_a_group_of_one_merges_its_parts():
    exchange = make_exchange("auto", group=None, heads=CPU)
    assert isinstance(exchange, NoExchange)
    part, lse = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    torch.testing.assert_close(exchange(stacked(part, lse)), merge_reference(part, lse)[0])
    assert torch.equal(exchange(stacked(part[:1], lse[:1])), part[0])


def auto_body():
    name = type(make_exchange("auto", group=dist.group.WORLD, heads=CPU)).__name__
    try:
        make_exchange("fused", group=dist.group.WORLD, heads=CPU)
    except ValueError as error:
        return name, str(error)


def test_fused_is_refused_where_it_cannot_run(ranks):
    name, error = ranks(2).run(auto_body)[0]
    assert name == "CollectiveExchange"
    assert error.startswith("attention.exchange = fused cannot run here: the KVP group shares no GPU memory")


def test_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="attention.exchange = 'magic' must be one of auto, collective, fused"):
        make_exchange("magic", group=None, heads=CPU)
