"""Pages that a kernel writes into a pool of another process arrive where they belong and nowhere else.

On a CPU the interpreter copies within one process; on a GPU two processes share one, or have one each.
"""

import itertools
import time
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from attention.pages import PageLayout
from helix.cache.pages import PagedCache
from helix.transfer import copy_regions as copying
from helix.transfer.copy_regions import copy_regions
from helix.transfer.mapped_peer import Copies, MappedPeer
from helix.transfer.peer_memory import Mapped, export
from helix.transfer.protocol import DONE, RUNNING, UNKNOWN
from helix.transfer.regions import CacheMap, build_regions

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
BLOCK, PAGES, LAYERS, DIM = 8, 6, 3, 16
BLOCKS, SOURCE_PAGES, TARGET_PAGES = np.array([0, 1, 2]), np.array([5, 0, 1]), np.array([2, 3, 4])
CASES = [((0, 4), (0, 4), (0, 24)), ((0, 4), (2, 4), (3, 21)), ((1, 3), (2, 4), (5, 6))]


def test_regions_of_any_size_and_place_are_copied_whole_and_nothing_else(monkeypatch):
    monkeypatch.setattr(copying, "PIECE_BYTES", 1 << 10)
    rng = np.random.default_rng(0)
    sizes = np.array([16, 4, 1, 1 << 10, (1 << 10) + 16, 5000, 4096 + 20, 16 * 211])
    apart = 1 << 13
    source = torch.from_numpy(rng.integers(0, 255, apart * len(sizes), np.uint8)).to(DEVICE)
    target = torch.full_like(source, 255)
    order, shift = rng.permutation(len(sizes)), np.array([0, 4, 3, 0, 32, 16, 4, 48])
    regions = np.stack((np.arange(len(sizes)) * apart + shift, order * apart + shift, sizes), 1).astype(np.int64)
    expected = target.cpu()
    for ours, theirs, size in regions.tolist():
        expected[theirs : theirs + size] = source[ours : ours + size].cpu()
    regions[:, 0] += source.data_ptr()
    regions[:, 1] += target.data_ptr()
    kept = copy_regions(regions, DEVICE)
    assert torch.equal(target.cpu(), expected) and kept


@pytest.mark.gpu
def test_no_number_of_pieces_compiles_anything_once_copies_are_compiled(monkeypatch):
    copying.compile_copies(DEVICE)
    names, memory = [], torch.zeros(2, 1 << 16, dtype=torch.uint8, device=DEVICE)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: names.append(about["fn"].name))
    for count, size in itertools.product((1, 2, 16, 17), (32, 33)):
        places = memory.data_ptr() + np.arange(count, dtype=np.int64) * 64
        copy_regions(np.stack((places, places + (1 << 16), np.full(count, size)), 1), DEVICE)
    torch.cuda.synchronize()
    assert not names


def make_cache(device, heads, seed):
    """A cache of 8 bits, whose scales are regions of a few bytes where a block is cut; and its map."""
    layout = PageLayout(heads[1] - heads[0], BLOCK, DIM, torch.bfloat16, in_8_bits=True)
    cache = PagedCache(layout, num_layers=LAYERS, num_pages=PAGES, device=device)
    values, scales = cache.planes
    numbers = torch.arange(values.numel(), device=device).view(values.shape) * 7 + seed
    values.view(torch.uint8).copy_(numbers % 251)
    scales.copy_(torch.arange(scales.numel(), device=device).view(scales.shape) + 0.5 + seed)
    layers = cache.pages.data_ptr() + np.arange(LAYERS) * cache.pages.stride(0) * cache.pages.element_size()
    return cache, CacheMap.of(layout, layers, heads)


def tokens_of(cache):
    """Bytes of every token: [L, P, 2, K, block_size, values and scale]."""
    values, scales = (plane.cpu() for plane in cache.planes)
    return torch.cat((values.view(torch.uint8), scales.unsqueeze(-1).view(torch.uint8)), -1)


def written(before, sent, source_heads, target_heads, tokens):
    """What the receiver's tokens are to be."""
    expected = before.clone()
    for position in range(*tokens):
        block, at = divmod(position, BLOCK)
        for head in range(max(source_heads[0], target_heads[0]), min(source_heads[1], target_heads[1])):
            expected[:, TARGET_PAGES[block], :, head - target_heads[0], at] = sent[
                :, SOURCE_PAGES[block], :, head - source_heads[0], at
            ]
    return expected


@pytest.mark.parametrize(("source_heads", "target_heads", "tokens"), CASES)
def test_pages_of_any_layout_are_written_by_the_kernel(source_heads, target_heads, tokens):
    source, source_map = make_cache(DEVICE, source_heads, 100)
    target, target_map = make_cache(DEVICE, target_heads, 0)
    expected = written(tokens_of(target), tokens_of(source), source_heads, target_heads, tokens)
    regions = build_regions(source_map, target_map, BLOCKS, SOURCE_PAGES, TARGET_PAGES, tokens)
    kept = copy_regions(regions, DEVICE)
    assert torch.equal(tokens_of(target), expected) and kept


def be_a_receiver(pipe, device, heads):
    cache, cache_map = make_cache(torch.device(device), heads, 0)
    torch.cuda.synchronize(cache.pages.device)
    pipe.send((export(cache.pages), cache_map, tokens_of(cache)))
    while pipe.recv():
        pipe.send(tokens_of(cache))


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", [0, 1])
def test_another_process_has_what_was_written_and_its_death_breaks_nothing_here(on_gpu):
    if on_gpu >= torch.cuda.device_count():
        pytest.skip("needs 2 CUDA GPUs")
    source_heads, target_heads, tokens = CASES[1]
    source, source_map = make_cache(DEVICE, source_heads, 100)
    context = get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=be_a_receiver, args=(its, f"cuda:{on_gpu}", target_heads), daemon=True)
    process.start()
    its.close()  # so that its death ends what waits for it
    try:
        handle, target_map, before = pipe.recv()
        peer = MappedPeer(Mapped(handle, DEVICE), source_map, target_map, DEVICE, rank=0)

        def write():
            made, deadline = peer.write(BLOCKS, SOURCE_PAGES, TARGET_PAGES, tokens), time.monotonic() + 20.0
            while (state := made.poll()) == RUNNING and time.monotonic() < deadline:
                pass
            return state

        assert write() == DONE
        pipe.send(True)
        assert torch.equal(pipe.recv(), written(before, tokens_of(source), source_heads, target_heads, tokens))
        process.kill()
        process.join()
        assert write() == DONE
        assert torch.equal(tokens_of(source), tokens_of(make_cache(DEVICE, source_heads, 100)[0]))
        peer.close()
    finally:
        process.kill()
        process.join()


def test_copies_that_are_given_up_stay_unknown():
    has_ended = False
    copies = Copies(SimpleNamespace(query=lambda: has_ended), [], "decode rank 3")  # type: ignore[arg-type]
    assert copies.poll() == RUNNING
    copies.abandon()
    has_ended = True
    assert copies.poll() == UNKNOWN and "decode rank 3" in copies.reason
