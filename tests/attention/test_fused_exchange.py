import pytest
import torch
import torch.distributed as dist

from attention.fused_exchange import FusedExchange
from attention.merge import merge_reference
from parallel.all_reduce_norm import AllReduceNorm
from parallel.layout import split_evenly
from parallel.symmetric import Fault, Faults
from tests.attention.cases import stacked
from tests.one_gpu import LocalWorld


def partials(seed, rank, splits, rows, heads, head_dim, dtype):
    """Random partials: empty splits with garbage in them, an empty shard, a row that nobody sees, extreme lse."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    part = torch.randn(splits, rows, heads, head_dim, generator=generator)
    lse = torch.randn(splits, rows, heads, generator=generator) * 3
    kind = torch.randint(0, 9, lse.shape, generator=generator)
    lse[kind == 0] = -torch.inf
    lse[kind == 1] = -1e4
    if rank == 1:
        lse[:] = -torch.inf
    lse[:, 0] = -torch.inf
    part[torch.isneginf(lse)] = torch.nan
    return part.to(torch.float32 if splits > 1 else dtype), lse


def exchange_body(world, tpa, shapes, dtype):
    """Each shape's merged heads on this rank, run three times (other data between), eagerly and from a graph."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    kvp = world // tpa
    groups = [dist.new_group(list(range(first, first + kvp))) for first in range(0, world, kvp)]
    results = []
    for splits, rows, heads, head_dim in shapes:
        faults = Faults(device)
        exchange = FusedExchange(
            groups[rank // kvp], num_heads=heads, head_dim=head_dim, num_layers=3, dtype=dtype, device=device,
            faults=faults, timeout_s=20.0, pdl=True,
        )  # fmt: skip
        data = [[t.to(device) for t in partials(i, rank % kvp, splits, rows, heads, head_dim, dtype)] for i in range(3)]

        def step(exchange=exchange, data=data):
            exchange.begin_step()
            return [exchange(stacked(part, lse), layer=layer) for layer, (part, lse) in enumerate(data)]

        eager = [step() for _ in range(4)][-1]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True)), "graph differs from eager"
        assert int(faults.word) == 0
        results.append([merged.cpu() for merged in eager])
    dist.barrier()
    return results


# (splits, rows, heads, head_dim)
SHAPES = [
    (1, 1, 16, 128),
    (1, 64, 64, 128),
    (1, 7, 7, 64),
    (33, 1, 16, 128),
    (5, 3, 28, 128),
    (264, 2, 8, 64),
    (1, 256, 16, 256),
    (1, 1500, 16, 128),
    (2, 16, 128, 512),
]


def sinks_of(heads):
    return torch.linspace(-4.0, 6.0, heads)


def check(merged, kvp, layer, shape, dtype, *, sinks=False):
    """Compare what each rank merged of one layer with the oracle; ranks of other KVP groups follow the first's."""
    splits, rows, heads, head_dim = shape
    parts = [partials(layer, rank, splits, rows, heads, head_dim, dtype) for rank in range(kvp)]
    if sinks:  # one partial more, without a value
        parts.append((torch.zeros(1, rows, heads, head_dim), sinks_of(heads).expand(1, rows, heads)))
    expected, _ = merge_reference(
        torch.cat([part.float() for part, _ in parts]).double(), torch.cat([lse for _, lse in parts]).double()
    )
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for rank, each in enumerate(merged):
        start, stop = split_evenly(heads, kvp, rank % kvp)
        torch.testing.assert_close(each.double().cpu(), expected[:, start:stop], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "tpa"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fused_exchange_equals_the_oracle_eagerly_and_in_graphs(ranks, world, tpa, dtype):
    pool = ranks(world)
    if pool.device_type != "cuda":
        pytest.skip(f"needs {world} GPUs")
    results = pool.run(exchange_body, world, tpa, SHAPES, dtype)
    for index, shape in enumerate(SHAPES):
        for layer in range(3):
            check([result[index][layer] for result in results], world // tpa, layer, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kvp", [3, 5, 8])
@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 128), (1, 8, 28, 128), (33, 1, 8, 128), (5, 1, 9, 64), (132, 1, 8, 64), (1, 1, 32, 512)]
)
@pytest.mark.parametrize(("dtype", "sinks"), [(torch.bfloat16, True), (torch.float32, False), (torch.float32, True)])
def test_up_to_eight_ranks_of_one_gpu_equal_the_oracle(monkeypatch, kvp, shape, dtype, sinks):
    world, device = LocalWorld(kvp, monkeypatch, "attention.fused_exchange"), torch.device("cuda")
    splits, rows, heads, head_dim = shape
    faults = Faults(device)
    exchanges = [
        FusedExchange(
            group, num_heads=heads, head_dim=head_dim, num_layers=3, dtype=dtype, device=device, faults=faults,
            timeout_s=20.0,
        )
        for group in world.ranks
    ]  # fmt: skip
    data = [
        [[t.cuda() for t in partials(layer, rank, splits, rows, heads, head_dim, dtype)] for layer in range(3)]
        for rank in range(kvp)
    ]

    def step(rank):
        exchanges[rank].begin_step()
        own = sinks_of(heads)[slice(*split_evenly(heads, kvp, rank))].cuda() if sinks else None
        return [exchanges[rank](stacked(*data[rank][layer]), layer=layer, sinks=own) for layer in range(3)]

    delays = torch.Generator().manual_seed(kvp)
    first, *others = [world.run(step, delays=delays) for _ in range(6)]
    assert Faults.decode(int(faults.word)) is None
    for layer in range(3):
        check([merged[layer] for merged in first], kvp, layer, shape, dtype, sinks=sinks)
        for other in others:
            assert all(torch.equal(a[layer], b[layer]) for a, b in zip(first, other, strict=True))


def stress_body(rounds, timeout_s):
    """Exchanges with random delays before each launch; mismatches are counted on the device."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    layers, heads, head_dim = 5, 8, 128
    faults = Faults(device)
    exchange = FusedExchange(
        dist.group.WORLD, num_heads=heads, head_dim=head_dim, num_layers=layers, dtype=torch.bfloat16, device=device,
        faults=faults, timeout_s=timeout_s, pdl=True,
    )  # fmt: skip
    rows = [1, 4, 2, 3, 4]
    data = [
        [t.to(device) for t in partials(i, rank, 1, rows[i], heads, head_dim, torch.bfloat16)] for i in range(layers)
    ]
    exchange.begin_step()
    expected = [exchange(stacked(*each), layer=layer).clone() for layer, each in enumerate(data)]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    rounds_done = torch.zeros((), dtype=torch.int64, device=device)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.bfloat16, device=device)
    graphs = []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(16):  # graphs with different delays between launches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            exchange.begin_step()
            # a power of two scales exactly; it changes every round, so that what an earlier round left would show
            scale = scales.index_select(0, (rounds_done.add_(1) % 5).view(1))
            for layer, (part, lse) in enumerate(data):
                if int(torch.randint(0, 4, (), generator=generator)) == 0:
                    torch.cuda._sleep(int(torch.randint(0, 20000, (), generator=generator)))
                merged = exchange(stacked(part * scale, lse), layer=layer)
                wrong += (merged != expected[layer] * scale).any()
        graphs.append(graph)
    for number in torch.randint(0, 16, (rounds // layers,), generator=generator).tolist():
        graphs[number].replay()
    torch.cuda.synchronize()
    dist.barrier()
    return int(wrong), int(faults.word)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_million_exchanges_with_random_delays_match(ranks, world):
    assert ranks(world).run(stress_body, 1_000_000, 60.0, timeout_s=280) == [(0, 0)] * world


def missing_body(timeout_s):
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    faults = Faults(device)
    exchange = FusedExchange(
        dist.group.WORLD, num_heads=8, head_dim=64, num_layers=9, dtype=torch.bfloat16, device=device, faults=faults,
        timeout_s=timeout_s,
    )  # fmt: skip
    part, lse = (t.to(device) for t in partials(0, 0, 1, 2, 8, 64, torch.bfloat16))
    exchange.begin_step()
    for layer in range(9):
        if rank != 1 or layer < 7:
            exchange(stacked(part, lse), layer=layer)
    torch.cuda.synchronize()
    fault = Faults.decode(int(faults.word))
    still_works = float(torch.ones(8, device=device).sum())
    dist.barrier()
    return fault, still_works, world


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_a_rank_that_never_arrives_is_named_with_its_layer(ranks):
    first, second = ranks().run(missing_body, 2.0, timeout_s=60)
    assert first[0] == Fault(peer=1, operation=1, layer=7)
    assert second[0] is None
    assert first[1] == second[1] == 8.0


def lost_body():
    """Rank 1 is lost before the exchange of a layer, whose all-reduce the other KVP group is waiting in by then."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    faults = Faults(device)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    part, lse = (t.to(device) for t in partials(0, 0, 1, 2, 8, 64, torch.bfloat16))
    x, weight = torch.ones(2, 256, dtype=torch.bfloat16, device=device), torch.ones(256, device=device).bfloat16()
    for timeout_s in (60.0, 3.0):  # the first compiles
        exchange = FusedExchange(
            groups[rank // 2], num_heads=8, head_dim=64, num_layers=1, dtype=torch.bfloat16, device=device,
            faults=faults, timeout_s=timeout_s,
        )  # fmt: skip
        all_reduce = AllReduceNorm(
            dist.group.WORLD, hidden_size=256, dtype=torch.bfloat16, device=device, fused=True, faults=faults,
            timeout_s=timeout_s,
        )  # fmt: skip
        dist.barrier()
        if rank == 1 and timeout_s == 3.0:
            continue
        exchange.begin_step()
        exchange(stacked(part, lse))
        all_reduce(x, x.clone(), weight, 1e-5)
    torch.cuda.synchronize()
    fault = Faults.decode(int(faults.word))
    dist.barrier()
    return fault


@pytest.mark.gpu
@pytest.mark.ranks(4)
def test_a_rank_lost_before_an_exchange_is_named_by_the_other_group_too(ranks):
    in_all_reduce = Fault(peer=1, operation=0, layer=0)
    assert ranks().run(lost_body, timeout_s=60) == [Fault(peer=1, operation=1, layer=0), None, *[in_all_reduce] * 2]
