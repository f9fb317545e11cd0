from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel import all_reduce_norm
from parallel.all_reduce_norm import AllReduceNorm
from parallel.symmetric import Fault, Faults
from tests.one_gpu import LocalWorld

EPS = 1e-5


def inputs(seed, rank, rows, hidden, dtype):
    generator = torch.Generator().manual_seed(seed)
    residual, weight = torch.randn(rows, hidden, generator=generator), torch.randn(hidden, generator=generator)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed + 1000 * (rank + 1)))
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def oracle(seed, world, rows, hidden, dtype):
    residual, weight = (t.double() for t in inputs(seed, 0, rows, hidden, dtype)[1:])
    stream = residual + sum(inputs(seed, rank, rows, hidden, dtype)[0].double() for rank in range(world))
    scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + EPS)
    return stream, stream * scale * weight


def body(shapes, dtype, fused, summands=1):
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= world else torch.device("cpu")
    results = []
    for rows, hidden in shapes:
        faults = Faults(device) if fused else None
        op = AllReduceNorm(
            dist.group.WORLD, hidden_size=hidden, dtype=dtype, device=device, fused=fused, faults=faults,
            timeout_s=20.0, pdl=fused,
        )  # fmt: skip
        for index in range(4):
            x, residual, weight = (t.to(device) for t in inputs(index, rank, rows, hidden, dtype))
            if summands > 1:
                shares = torch.randint(-8, 8, (summands - 1, rows, hidden), device=device).float()
                x = torch.cat((shares, (x.float() - shares.sum(0)).unsqueeze(0)))
            normed = op(x, residual, weight, EPS, index=index)
        results.append((residual.cpu(), normed.cpu()))
        assert faults is None or int(faults.word) == 0
    return results


def check(results, shapes, dtype):
    world = len(results)
    for index, (rows, hidden) in enumerate(shapes):
        for rank in range(1, world):
            assert all(torch.equal(a, b) for a, b in zip(results[rank][index], results[0][index], strict=True))
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        for ours, exact in zip(results[0][index], oracle(3, world, rows, hidden, dtype), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", [2, 4])
def test_collective_path_equals_the_oracle_on_every_rank(ranks, world):
    shapes = [(1, 64), (5, 112)]
    check(ranks(world).run(body, shapes, torch.float32, False), shapes, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "summands"),
    [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1), (torch.float16, 2), (torch.float32, 1)],
    ids=str,
)
def test_fused_kernel_equals_the_oracle_on_every_rank(ranks, world, dtype, summands):
    pool = ranks(world)
    if pool.device_type != "cuda":
        pytest.skip(f"needs {world} GPUs")
    shapes = [(1, 4096), (3, 3584), (32, 4096), (17, 64), (128, 4096), (600, 4096), (2, 8192)]
    check(pool.run(body, shapes, dtype, True, summands), shapes, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [3, 5, 8])
@pytest.mark.parametrize(("rows", "exact"), [(1, False), (7, True), (16, False)])  # the last goes through owners
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_up_to_eight_ranks_of_one_gpu_equal_the_oracle(monkeypatch, world_size, rows, exact, dtype):
    world, device = LocalWorld(world_size, monkeypatch, "parallel.all_reduce_norm"), torch.device("cuda")
    hidden, faults = 4096, Faults(device)
    ops = [
        AllReduceNorm(group, hidden_size=hidden, dtype=dtype, device=device, fused=True, faults=faults, timeout_s=20.0)
        for group in world.ranks
    ]
    data = [[[t.cuda() for t in inputs(i, rank, rows, hidden, dtype)] for i in range(4)] for rank in range(world_size)]

    def step(rank):
        results = []
        for index, (x, residual, weight) in enumerate(data[rank]):
            stream, weight = residual.clone(), weight.float() if exact else weight
            results.append((stream, ops[rank](x.clone(), stream, weight, EPS, index=index)))
        return results[3]

    delays = torch.Generator().manual_seed(rows)
    for _ in range(6):
        results = world.run(step, delays=delays)
        assert Faults.decode(int(faults.word)) is None
        check([[tuple(t.cpu() for t in result)] for result in results], [(rows, hidden)], dtype)


def two_shot_body(shapes, dtype, summands):
    results = []
    for limit in (0, 1 << 30):
        torch.manual_seed(dist.get_rank())  # of the summands
        with mock.patch.object(all_reduce_norm, "TWO_SHOT_BYTES", limit):
            results.append(body(shapes, dtype, True, summands))
    return results


@pytest.mark.gpu
@pytest.mark.ranks(4)
@pytest.mark.parametrize(("dtype", "summands"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float32, 1)], ids=str)
def test_two_shots_have_the_bits_of_one(ranks, dtype, summands):
    shapes = [(4, 4096), (7, 3584), (128, 4096), (65, 64), (5, 8192)]
    for two, one in ranks().run(two_shot_body, shapes, dtype, summands):
        assert all(torch.equal(a, b) for pair in zip(two, one, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("summands", [1, 3])
def test_a_group_of_one_adds_its_summands(summands):
    device, dtype = torch.device("cuda"), torch.bfloat16
    op = AllReduceNorm(None, hidden_size=4096, dtype=dtype, device=device)
    x, residual, weight = (t.to(device) for t in inputs(0, 0, 5, 4096, dtype))
    parts = x.float().expand(summands, 5, 4096).div(summands).contiguous() if summands > 1 else x
    expected = residual.double() + x.double()
    normed = op(parts, residual, weight, EPS)
    torch.testing.assert_close(residual.double(), expected, rtol=1e-2, atol=1e-2)
    scale = torch.rsqrt(expected.square().mean(-1, keepdim=True) + EPS)
    torch.testing.assert_close(normed.double(), expected * scale * weight.double(), rtol=3e-2, atol=3e-2)


def stress_body(rounds):
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    faults, hidden = Faults(device), 4096
    op = AllReduceNorm(
        dist.group.WORLD, hidden_size=hidden, dtype=torch.bfloat16, device=device, fused=True, faults=faults,
        timeout_s=60.0, pdl=True,
    )  # fmt: skip
    shapes = enumerate((1, 33, 2, 40))  # one shot and two in turn
    data = [[t.to(device) for t in inputs(i, rank, rows, hidden, torch.bfloat16)] for i, rows in shapes]
    expected = []
    for index, (x, residual, weight) in enumerate(data):
        stream = residual.clone()
        op(x, stream, weight, EPS, index=index)
        expected.append(stream)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    rounds_done = torch.zeros((), dtype=torch.int64, device=device)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.bfloat16, device=device)
    generator = torch.Generator().manual_seed(rank)
    graphs = []
    for _ in range(16):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # a power of two scales exactly; it changes every round, so that what an earlier round left would show
            scale = scales.index_select(0, (rounds_done.add_(1) % 5).view(1))
            for index, (x, residual, weight) in enumerate(data):
                if int(torch.randint(0, 4, (), generator=generator)) == 0:
                    torch.cuda._sleep(int(torch.randint(0, 20000, (), generator=generator)))
                stream = residual * scale
                op(x * scale, stream, weight, EPS, index=index)
                wrong += (stream != expected[index] * scale).any()
        graphs.append(graph)
    for number in torch.randint(0, 16, (rounds // 4,), generator=generator).tolist():
        graphs[number].replay()
    torch.cuda.synchronize()
    dist.barrier()
    return int(wrong), int(faults.word)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_million_all_reduces_with_random_delays_match(ranks, world):
    assert ranks(world).run(stress_body, 1_000_000, timeout_s=280) == [(0, 0)] * world


def missing_body(rows, hidden):
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    faults = Faults(device)
    patient, op = (
        AllReduceNorm(
            dist.group.WORLD, hidden_size=hidden, dtype=torch.bfloat16, device=device, fused=True, faults=faults,
            timeout_s=timeout_s,
        )
        for timeout_s in (60.0, 3.0)
    )  # fmt: skip
    x, residual, weight = (t.to(device) for t in inputs(0, rank, rows, hidden, torch.bfloat16))
    patient(x, residual, weight, EPS, index=0)  # compiles
    for index in range(6):
        if rank != 0 or index < 5:
            op(x, residual, weight, EPS, index=index)
    torch.cuda.synchronize()
    dist.barrier()
    return Faults.decode(int(faults.word))


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "rows", "hidden"), [(2, 1, 256), (4, 1, 256), (4, 40, 4096)])
def test_a_rank_that_never_arrives_is_named(ranks, world, rows, hidden):
    fault = Fault(peer=0, operation=0, layer=2)
    assert ranks(world).run(missing_body, rows, hidden, timeout_s=60) == [None, *[fault] * (world - 1)]


def test_a_fault_word_names_operation_layer_and_peer():
    assert Faults.decode(0) is None
    assert Faults.decode(((61 * 4 + 1) << 8) | 4) == Fault(peer=3, operation=1, layer=61)
