"""Bytes written by one process arrive in another's pages, where they belong and nowhere else. Real NIXL, two ranks.

The bodies run on the CPU, and on GPUs where there are two.
"""

import os
import signal
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.distributed as dist

from attention.pages import PageLayout
from helix.cache.pages import PagedCache
from helix.transfer.protocol import DONE, RUNNING, UNKNOWN
from helix.transfer.regions import CacheMap
from helix.transfer.transport import Transport

BLOCK, PAGES, LAYERS, HEADS, DIM = 8, 6, 3, 4, 2
RECEIVER, SENDER = 0, 1


def make_cache(device, heads, seed):
    cache = PagedCache(
        PageLayout(heads[1] - heads[0], BLOCK, DIM, torch.float32), num_layers=LAYERS, num_pages=PAGES, device=device
    )
    [values] = cache.planes
    values.copy_(torch.arange(values.numel()).view(values.shape) + seed)
    return cache


def map_of(pool, heads):
    return CacheMap.of(PageLayout(heads[1] - heads[0], BLOCK, DIM, torch.float32), pool.layers, heads)


def share(mine):
    box = [None, None]
    dist.all_gather_object(box, mine)
    return box


def finish(write, transport, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while (state := write.poll()) == RUNNING and time.monotonic() < deadline:
        transport.progress()
    return state


def write_body(source_heads, target_heads, tokens, name):
    """The pages of the receiver or the sender before and after, and how the sender's write ended."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    heads = target_heads if rank == RECEIVER else source_heads
    cache = make_cache(device, heads, 0 if rank == RECEIVER else 10_000)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    transport = Transport(f"{name}-{rank}", cache.pages)
    before = cache.planes[0].cpu().clone()
    pools = share(transport.pool)
    blocks = np.array([0, 1, 2], np.int64)
    if rank == SENDER:
        maps = map_of(transport.pool, source_heads), map_of(pools[RECEIVER], target_heads)
        peer = transport.connect_by_nixl(pools[RECEIVER], *maps, rank=RECEIVER)
        write = peer.write(blocks, np.array([5, 0, 1]), np.array([2, 3, 4]), tokens)
        state, ended = finish(write, transport), torch.ones(1)
        dist.broadcast(ended, SENDER)
        peer.close()
    else:
        work = dist.broadcast(torch.zeros(1), SENDER, async_op=True)
        while not work.is_completed():
            transport.progress()
        state = None
    after = cache.planes[0].cpu().clone()
    dist.barrier()
    transport.close()
    return before, after, state


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("source_heads", "target_heads", "tokens"),
    [
        ((0, 4), (0, 4), (0, 24)),
        ((0, 4), (0, 4), (3, 21)),
        ((0, 4), (2, 4), (0, 24)),
        ((0, 2), (0, 4), (8, 20)),
        ((1, 3), (2, 4), (5, 6)),
    ],
)
def test_what_is_written_arrives_where_it_belongs_and_nowhere_else(ranks, source_heads, target_heads, tokens):
    name = f"t{source_heads}{target_heads}{tokens}"
    (before, after, _), (sent, unchanged, state) = ranks(2).run(write_body, source_heads, target_heads, tokens, name)
    assert state == DONE
    assert torch.equal(sent, unchanged)
    expected = before.clone()
    for position in range(*tokens):
        block, at = divmod(position, BLOCK)
        source_page, target_page = [5, 0, 1][block], [2, 3, 4][block]
        for head in range(max(source_heads[0], target_heads[0]), min(source_heads[1], target_heads[1])):
            expected[:, target_page, :, head - target_heads[0], at] = sent[
                :, source_page, :, head - source_heads[0], at
            ]
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def lost_body(pool, pid):
    """What a sender sees of writes to a receiver before and after its process has ended."""
    heads = (0, HEADS)
    transport = Transport("sender", make_cache(torch.device("cpu"), heads, 0).pages)
    peer = transport.connect(pool, map_of(transport.pool, heads), map_of(pool, heads), rank=0)
    blocks, pages = np.arange(2), np.arange(2)
    first = finish(peer.write(blocks, pages, pages, (0, 16)), transport)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    write = peer.write(blocks, pages, pages, (0, 16))
    second = finish(write, transport)
    write.abandon()
    peer.close()
    return first, second, write.reason


def idle_body(pool):
    """What a sender that never writes prints of NIXL's at its end; it does not go through ``sys.stderr``."""
    heads = (0, HEADS)
    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            transport = Transport("idle", make_cache(torch.device("cpu"), heads, 0).pages)
            peer = transport.connect(pool, map_of(transport.pool, heads), map_of(pool, heads), rank=0)
            peer.close()
            transport.close()
            del peer
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        return printed.read().decode()


def be_a_receiver(pipe):
    transport = Transport("receiver", make_cache(torch.device("cpu"), (0, HEADS), 0).pages)
    pipe.send(transport.pool)
    while True:
        transport.progress()
        time.sleep(0.001)


@contextmanager
def other_process():
    """A receiver's pool, and its process, which ends with this."""
    context = get_context("forkserver")
    pipe, its = context.Pipe()
    process = context.Process(target=be_a_receiver, args=(its,), daemon=True)
    process.start()
    try:
        yield pipe.recv(), process.pid
    finally:
        process.kill()
        process.join()


def test_a_write_to_a_process_that_has_ended_is_unknown_and_says_to_whom(ranks):
    with other_process() as (pool, pid):
        [(first, second, reason)] = ranks(1).run(lost_body, pool, pid)
    assert (first, second) == (DONE, UNKNOWN)
    assert "a write to decode rank 0" in reason


def test_a_sender_that_never_wrote_leaves_in_silence(ranks):
    with other_process() as (pool, _):
        assert ranks(1).run(idle_body, pool) == [""]
