import pytest
import torch
import torch.distributed as dist

from parallel.layout import split_evenly
from parallel.sharded_argmax import ShardedArgmax
from parallel.symmetric import Faults
from tests.one_gpu import LocalWorld

ROWS = (1, 5, 64, 5, 300)


def logits_of(seed, rows, vocab_size, dtype):
    """Random logits with ties across slices, zeros of both signs, infinities."""
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    logits[0] = -1.0
    logits[1 % rows] = 0.0
    logits[1 % rows, : vocab_size // 2] = -0.0
    logits[2 % rows, [vocab_size - 1, vocab_size // 3]] = 9.0
    logits[3 % rows] = -torch.inf
    return logits


def body(vocab_size, dtype, fused):
    rank, world = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    start, stop = split_evenly(vocab_size, world, rank)
    faults = Faults(device) if fused else None
    argmax = ShardedArgmax(
        dist.group.WORLD, vocab=(start, stop), vocab_size=vocab_size, device=device, fused=fused, faults=faults,
        timeout_s=20.0,
    )  # fmt: skip
    results = []
    for seed, rows in enumerate(ROWS):
        results.append(argmax(logits_of(seed, rows, vocab_size, dtype)[:, start:stop].to(device)).cpu())
        dist.barrier()  # stands for the layers of the next step
    assert faults is None or int(faults.word) == 0
    return results


def check(results, vocab_size, dtype, rows=ROWS):
    for seed, count in enumerate(rows):
        logits = logits_of(seed, count, vocab_size, dtype)
        lowest_of_equals = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        for tokens in (result[seed] for result in results):
            assert torch.equal(tokens, lowest_of_equals)


@pytest.mark.parametrize(("world", "vocab_size"), [(2, 3), (4, 5), (4, 101)])
def test_every_rank_chooses_the_lowest_of_the_largest(ranks, world, vocab_size):
    check(ranks(world).run(body, vocab_size, torch.float32, False), vocab_size, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_kernels_choose_the_same_over_a_large_vocabulary(ranks, world, dtype, fused):
    pool = ranks(world)
    if pool.device_type != "cuda":
        pytest.skip(f"needs {world} GPUs")
    check(pool.run(body, 151_552, dtype, fused), 151_552, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_up_to_eight_ranks_of_one_gpu_choose_the_same(monkeypatch, world_size):
    world, device = LocalWorld(world_size, monkeypatch, "parallel.sharded_argmax"), torch.device("cuda")
    vocab_size, faults = 151_552, Faults(device)
    slices = [split_evenly(vocab_size, world_size, rank) for rank in range(world_size)]
    choosers = [
        ShardedArgmax(
            group, vocab=vocab, vocab_size=vocab_size, device=device, fused=True, faults=faults, timeout_s=20.0
        )
        for group, vocab in zip(world.ranks, slices, strict=True)
    ]
    results = [[] for _ in range(world_size)]
    for seed, rows in enumerate((1, 5, 64, 5, 30)):
        logits = [logits_of(seed, rows, vocab_size, torch.bfloat16)[:, slice(*vocab)].cuda() for vocab in slices]
        chosen = world.run(lambda rank, logits=logits: choosers[rank](logits[rank]), delays=torch.Generator())
        for result, tokens in zip(results, chosen, strict=True):
            result.append(tokens.cpu())
    assert Faults.decode(int(faults.word)) is None
    check(results, vocab_size, torch.bfloat16, rows=(1, 5, 64, 5, 30))
