"""The data plane: pages end up where the movements, done one by one, would put them. The GPU runs what the CPU runs."""

from random import Random

import pytest
import torch

from attention.pages import PageLayout
from helix.cache.movements import CopyTokens, Handover, Movement, Offload, Onboard
from helix.cache.mover import PageMover, _runs
from helix.cache.pages import PagedCache

LAYERS, PAGES, HOSTS, BLOCK = 3, 12, 9, 4
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


LAYOUTS = [
    PageLayout(2, BLOCK, 8, torch.float32),
    PageLayout(2, BLOCK, 8, torch.bfloat16, in_8_bits=True),
    PageLayout(1, BLOCK, 40, torch.float32, rank=32, in_8_bits=True),  # latents, with padding between planes
]


def paged_cache(device: str, layout: PageLayout = LAYOUTS[0]) -> PagedCache:
    cache = PagedCache(layout, num_layers=LAYERS, num_pages=PAGES, device=torch.device(device))
    cache.pages.random_(generator=torch.Generator(device).manual_seed(0))
    return cache


def random_movements(random: Random, count: int) -> list[Movement]:
    moves: list[Movement] = []
    written: set[int] = set()
    for _ in range(count):
        kind = random.randrange(4)
        if kind == 0:
            moves.append(Offload(0, random.randrange(PAGES), random.randrange(HOSTS)))
            written.add(moves[-1].host_page)
        elif kind == 1 and written:
            moves.append(Onboard(0, random.choice(sorted(written)), random.randrange(PAGES)))
        elif kind == 2:
            source, target = random.sample(range(PAGES), 2)
            moves.append(CopyTokens(0, source, target, random.randint(1, BLOCK)))
        else:
            moves.append(Handover(0, random.randrange(PAGES)))
    return moves


def naive(pages: torch.Tensor, host: torch.Tensor, layout: PageLayout, moves: list[Movement]) -> None:
    """Do them one by one on CPU tensors."""
    planes = layout.views(pages.view(torch.uint8))
    for move in moves:
        match move:
            case Offload(_, page, host_page):
                host[host_page] = pages[:, page]
            case Onboard(_, host_page, page):
                pages[:, page] = host[host_page]
            case CopyTokens(_, source, target, count):
                for plane in planes:
                    plane[:, target, :, :, :count] = plane[:, source, :, :, :count]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(20))
def test_any_list_of_movements_means_what_it_means_one_by_one(device: str, seed: int) -> None:
    random = Random(seed)
    cache = paged_cache(device, LAYOUTS[seed % len(LAYOUTS)])
    mover = PageMover(cache, HOSTS, 0)
    mover.host.zero_()
    pages, host = cache.pages.cpu().clone(), mover.host.clone()
    for _ in range(8):
        moves = random_movements(random, random.randint(0, 25))
        mover.execute(moves)
        naive(pages, host, cache.layout, moves)
    mover.synchronize()
    assert torch.equal(cache.pages.cpu(), pages)
    assert torch.equal(mover.host, host)


@pytest.mark.parametrize("device", DEVICES)
def test_other_ranks_movements_are_left_to_them(device: str) -> None:
    cache = paged_cache(device)
    before = cache.pages.clone()
    PageMover(cache, HOSTS, 1).execute([CopyTokens(0, 0, 1, 4), Offload(2, 0, 0), Handover(0, 1)])
    assert torch.equal(cache.pages, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_leaves_the_rest_of_its_target_alone(layout: PageLayout) -> None:
    cache = paged_cache("cpu", layout)
    before = [plane.float() for plane in layout.views(cache.pages.clone().view(torch.uint8))]
    PageMover(cache, 0, 0).execute([CopyTokens(0, 2, 5, 3)])
    for plane, old in zip(cache.planes, before, strict=True):
        new = plane.float()[:, 5]
        assert torch.equal(new[:, :, :, :3].nan_to_num(), old[:, 2, :, :, :3].nan_to_num())
        assert torch.equal(new[:, :, :, 3:].nan_to_num(), old[:, 5, :, :, 3:].nan_to_num())


def test_neighbouring_pages_travel_together() -> None:
    assert _runs([3, 4, 5, 9, 2, 3, 1]) == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert _runs([7]) == [(0, 1)]


class Unordered(PageMover):
    """The double of the stress test: nothing waits for anything."""

    def _begin(self) -> None:
        pass

    def _wait(self, stream, side, places) -> None:
        pass

    def _end(self, handed, written) -> None:
        pass


def stress(kind: type[PageMover], rounds: int) -> int:
    """Play decode beside movements on a GPU and count the pages that hold other values than they should.

    In every round "compute" writes pages that were handed to it, and movements follow that read what was just written
    and write what was just read. Large pages make every copy long enough to be overtaken.
    """
    device = torch.device("cuda")
    cache = PagedCache(PageLayout(8, 64, 128, torch.bfloat16), num_layers=4, num_pages=16, device=device)
    cache.pages.zero_()
    mover = kind(cache, 16, 0)
    mover.host.zero_()
    torch.cuda.synchronize()
    random = Random(0)
    values, hosts = [0] * 16, [0] * 16  # what each page holds: one number, everywhere
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(rounds):
        value = number % 200 + 1
        page, other, third = random.sample(range(16), 3)
        host = random.randrange(16)
        if number % 8 == 0:
            torch.cuda._sleep(2_000_000)  # about a millisecond: computing is late, and whoever does not wait is early
        # computing writes a page, it goes to the host at once, and its page is written anew
        cache.pages[:, page].fill_(value)
        values[page] = value
        moves: list[Movement] = [Offload(0, page, host), Handover(0, page)]
        hosts[host] = values[page]
        moves += [Onboard(0, host, other), CopyTokens(0, other, third, 64)]
        values[other] = values[third] = hosts[host]
        mover.execute(moves)
        cache.pages[:, page].fill_(value + 1)
        values[page] = value + 1
        for each in (page, other, third):
            wrong += (cache.pages[:, each] != values[each]).any()
    torch.cuda.synchronize()
    for each in range(16):
        wrong += (cache.pages[:, each] != values[each]).any()
        wrong += int((mover.host[each] != hosts[each]).any())
    return int(wrong)


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_thousand_rounds_of_movements_beside_computing_lose_nothing() -> None:
    assert stress(PageMover, 10_000) == 0


@pytest.mark.gpu
def test_without_waits_the_same_rounds_go_wrong() -> None:
    assert stress(Unordered, 500) > 0
