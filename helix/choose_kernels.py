"""The choice of tokens on a GPU, in three kernels whose settings are data: nothing is sorted.

Noise makes the draw an argmax, so a filter need not be known as a set: the draw is the best token of all, if the filter
keeps it, else the best of those that are more likely, and so on. Whether top-p keeps a token says the mass of those
above it, one sum. Mostly the first one is kept (by top-p 0.95 in 95% of all cases), so a row takes

1. ``_propose_kernel``: the best token with noise and the largest logit, of each chunk of a row,
2. ``_weigh_kernel``: the mass of all and of what lies above the best, of each chunk,
3. ``_settle_kernel``, a program a row: is it kept? Else that program searches alone.

Top-k and min-p keep few tokens, and often not the best of all. Rows that have them first get a bound that no token they
keep lies below, from the largest logits of groups of tokens (``_bound_kernel``); the second kernel then writes out the
tokens from the bound up, and the third needs to look at no others, where they are not too many.

Mass is counted in integers (``mass.py``), so how a row is cut and who does what changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .mass import mass_of
from .noise import gumbel_of

CHUNK = 2048
NO_TOP_K = 2**31 - 1
NOISE, FILTERED = 1, 2
"""Flags of a row: it draws; a filter may rule out what it draws."""
_NOISE, _FILTERED = tl.constexpr(NOISE), tl.constexpr(FILTERED)
_SEARCH_CHUNK = 4096
_GROUP = 128  # tokens whose largest logit is one value
_FEW = 2048  # the most tokens that a row writes out
_PIVOTS = 16
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _ordered(value):
    """A float32's bits as an int32 in the order of its value; 0.0 and -0.0 are equal."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(order):
    """The float32 of an ordered int32."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _key(score, at, last_id):
    return (_ordered(score).to(tl.int64) << 32) | (last_id - at).to(tl.int64)


@triton.jit
def _score(value, at, floats, integers, row, rows, first_id):
    """What is compared: a row with noise has value / T + noise."""
    inverse = tl.load(floats + row)
    noise = gumbel_of(tl.load(integers + 2 * rows + row), tl.load(integers + 3 * rows + row), first_id + at)
    return tl.fma(value, tl.zeros_like(value) + inverse, noise)


@triton.jit(do_not_specialize=["columns", "rows", "first_id", "last_id", "chunks"])
def _propose_kernel(
    logits, keys, tops, groups, floats, integers, columns, row_stride, rows, first_id, last_id, chunks,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """keys[row, chunk]: the best token with its score; tops[row, chunk] and groups[row, group]: the largest logit."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    there = at < columns
    value = tl.load(logits + row.to(tl.int64) * row_stride + at, mask=there, other=float("-inf")).to(tl.float32) + 0.0
    flags = tl.load(integers + row)
    if flags & _NOISE:
        key = _key(_score(value, at, floats, integers, row, rows, first_id), at, last_id)
        tl.store(tops + row * chunks + chunk, tl.max(value, 0))
        if flags & _FILTERED:
            n = tl.arange(0, CHUNK // GROUP)
            largest = tl.max(tl.reshape(value, [CHUNK // GROUP, GROUP]), 1)
            tl.store(groups + (row * chunks + chunk) * (CHUNK // GROUP) + n, largest)
    else:
        key = _key(value, at, last_id)
    tl.store(keys + row * chunks + chunk, tl.max(tl.where(there, key, _LOWEST), 0))


@triton.jit
def _best(keys, tops, row, chunks, last_id, CHUNKS_PAD: tl.constexpr):
    """The row's best token, and its largest logit."""
    chunk = tl.arange(0, CHUNKS_PAD)
    key = tl.max(tl.load(keys + row * chunks + chunk, mask=chunk < chunks, other=_LOWEST), 0)
    top = tl.max(tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), 0)
    return key, top


@triton.jit
def _kth_of(orders, k, PIVOTS: tl.constexpr):
    """The k-th largest of some ordered values, or one as good: as many reach it as reach the k-th largest."""
    low = tl.full([], -(1 << 31), tl.int64)
    high = tl.full([], 1 << 31, tl.int64)
    reached = tl.full([], 1 << 40, tl.int64)
    n = tl.arange(0, PIVOTS).to(tl.int64)
    while (high - low > 1) & (reached > k):
        pivots = low + (high - low) * (n + 1) // (PIVOTS + 1)
        count = tl.sum((orders[None, :] >= pivots[:, None]).to(tl.int32), 1).to(tl.int64)
        enough = count >= k
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), 0))
        reached = tl.minimum(reached, tl.min(tl.where(enough, count, reached), 0))
    return low


@triton.jit(do_not_specialize=["columns", "rows", "num_groups"])
def _bound_kernel(
    groups, bounds, floats, integers, columns, rows, num_groups, GROUPS_PAD: tl.constexpr, PIVOTS: tl.constexpr
):
    """bounds[row, 0]: an ordered value that all tokens reach which top-k and min-p may keep; [row, 1]: 0."""
    row = tl.program_id(0)
    bound = tl.full([], -(1 << 31), tl.int64)
    if tl.load(integers + row) & _FILTERED:
        k = tl.load(integers + rows + row)
        scale, limit = tl.load(floats + rows + row), tl.load(floats + 2 * rows + row)
        n = tl.arange(0, GROUPS_PAD)
        largest = tl.load(groups + row * num_groups + n, mask=n < num_groups, other=float("-inf"))
        if (k < columns) & (k <= num_groups):
            orders = tl.where(n < num_groups, _ordered(largest).to(tl.int64), _LOWEST)
            bound = _kth_of(orders, k, PIVOTS)
        if limit < float("inf"):
            lowest = tl.max(largest, 0) - (limit * 1.001 + 0.001) / scale
            bound = tl.maximum(bound, _ordered(lowest).to(tl.int64))
    tl.store(bounds + 2 * row, bound)
    tl.store(bounds + 2 * row + 1, tl.zeros([], tl.int64))


@triton.jit(do_not_specialize=["columns", "rows", "last_id", "chunks", "is_bounded"])
def _weigh_kernel(
    logits, keys, tops, sums, bounds, few, floats, integers, columns, row_stride, rows, last_id, chunks, is_bounded,
    CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """sums[row, chunk]: the mass of all, the mass above the row's best token, and how many are above it.

    Where rows have bounds, few[row]: the tokens from the bound up, in any order, and bounds[row, 1]: how many.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(integers + row) & _FILTERED:
        key, top = _best(keys, tops, row, chunks, last_id, CHUNKS_PAD)
        logits += row.to(tl.int64) * row_stride
        best = tl.load(logits + (last_id - (key & 0xFFFFFFFF))).to(tl.float32)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        mass = mass_of((top - value) * tl.load(floats + rows + row))
        above = value > best
        sums += (row * chunks + chunk) * 3
        tl.store(sums, tl.sum(mass, 0))
        tl.store(sums + 1, tl.sum(tl.where(above, mass, 0), 0))
        tl.store(sums + 2, tl.sum(above.to(tl.int64), 0))
        if is_bounded:
            bound = tl.load(bounds + 2 * row)
            reaches = (at < columns) & (_ordered(value).to(tl.int64) >= bound) & (bound > -(1 << 31))
            number = tl.sum(reaches.to(tl.int32), 0)
            if number > 0:
                place = tl.atomic_add(bounds + 2 * row + 1, number.to(tl.int64))
                place += tl.cumsum(reaches.to(tl.int32), 0).to(tl.int64) - 1
                tl.store(few + row.to(tl.int64) * FEW + place, _key(value, at, last_id), mask=reaches & (place < FEW))


@triton.jit
def _kth(logits, columns, k, CHUNK: tl.constexpr, PIVOTS: tl.constexpr):
    """An ordered value that as many reach as reach the k-th largest: a search of PIVOTS steps at a time."""
    low = tl.full([], -(1 << 31), tl.int64)  # all reach it
    high = tl.full([], 1 << 31, tl.int64)  # none does
    reached = columns.to(tl.int64)
    n = tl.arange(0, PIVOTS).to(tl.int64)
    while (high - low > 1) & (reached > k):
        pivots = low + (high - low) * (n + 1) // (PIVOTS + 1)
        counts = tl.zeros([PIVOTS, CHUNK], tl.int32)
        for begin in range(0, columns, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            value = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            order = tl.where(at < columns, _ordered(value).to(tl.int64), _LOWEST)
            counts += (order[None, :] >= pivots[:, None]).to(tl.int32)
        count = tl.sum(counts, 1).to(tl.int64)
        enough = count >= k
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), 0))
        reached = tl.minimum(reached, tl.min(tl.where(enough, count, reached), 0))
    return low


@triton.jit
def _search(
    logits, floats, integers, top_p, limit, columns, row, rows, first_id, last_id, key, top, total, above,
    CHUNK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The key of the best token that the filters keep; total and above are those of the best of all, ``key``."""
    scale = tl.load(floats + rows + row)
    k = tl.load(integers + rows + row).to(tl.int64)
    floor = tl.full([], -(1 << 31), tl.int64)
    best = tl.load(logits + (last_id - (key & 0xFFFFFFFF))).to(tl.float32)
    if k < columns:
        floor = _kth(logits, columns, k, CHUNK // 4, PIVOTS)
        sums = tl.zeros([CHUNK], tl.int64)
        for begin in range(0, columns, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            value = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            sums += tl.where(_ordered(value).to(tl.int64) >= floor, mass_of((top - value) * scale), 0)
        total = tl.sum(sums, 0)
    needed = top_p * total.to(tl.float64)
    kept = (_ordered(best).to(tl.int64) >= floor) & ((top - best) * scale <= limit) & (above.to(tl.float64) < needed)
    while not kept:
        keys = tl.full([CHUNK], _LOWEST, tl.int64)
        for begin in range(0, columns, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            value = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32) + 0.0
            chosen = (value > best) & (_ordered(value).to(tl.int64) >= floor) & ((top - value) * scale <= limit)
            scored = _key(_score(value, at, floats, integers, row, rows, first_id), at, last_id)
            keys = tl.maximum(keys, tl.where(chosen, scored, _LOWEST))
        key = tl.max(keys, 0)
        best = tl.load(logits + (last_id - (key & 0xFFFFFFFF))).to(tl.float32)
        sums = tl.zeros([CHUNK], tl.int64)
        for begin in range(0, columns, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            value = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            sums += tl.where(value > best, mass_of((top - value) * scale), 0)
        kept = tl.sum(sums, 0).to(tl.float64) < needed
    return key


@triton.jit
def _search_few(
    few, number, floats, integers, top_p, limit, columns, row, rows, first_id, last_id, top, total,
    FEW: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """What ``_search`` returns, where all tokens that top-k and min-p keep are among the ``few``."""
    scale = tl.load(floats + rows + row)
    k = tl.load(integers + rows + row)
    n = tl.arange(0, FEW)
    token = tl.load(few + row.to(tl.int64) * FEW + n, mask=n < number, other=_LOWEST)
    order = token >> 32
    at = tl.where(n < number, last_id - (token & 0xFFFFFFFF), 0).to(tl.int32)
    value = tl.where(n < number, _value(order.to(tl.int32)), float("-inf"))
    far = (top - value) * scale
    mass = mass_of(far)
    if k < columns:
        floor = _kth_of(order, k, PIVOTS)
        mass = tl.where(order >= floor, mass, 0)
        far = tl.where(order >= floor, far, float("inf"))
        total = tl.sum(mass, 0)
    needed = top_p * total.to(tl.float64)
    scored = _key(_score(value, at, floats, integers, row, rows, first_id), at, last_id)
    scored = tl.where((n < number) & (far <= limit) & (far < float("inf")), scored, _LOWEST)
    key = tl.max(scored, 0)
    best = tl.max(tl.where(scored == key, value, float("-inf")), 0)
    while tl.sum(tl.where(value > best, mass, 0), 0).to(tl.float64) >= needed:
        key = tl.max(tl.where(value > best, scored, _LOWEST), 0)
        best = tl.max(tl.where(scored == key, value, float("-inf")), 0)
    return key


@triton.jit(do_not_specialize=["columns", "rows", "first_id", "last_id", "chunks", "is_bounded"])
def _settle_kernel(
    logits, keys, tops, sums, bounds, few, tokens, floats, doubles, integers, columns, row_stride, rows, first_id,
    last_id, chunks, is_bounded,
    CHUNKS_PAD: tl.constexpr, CHUNK: tl.constexpr, PIVOTS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """tokens[row]: the best token that the row's filters keep."""
    row = tl.program_id(0)
    key, top = _best(keys, tops, row, chunks, last_id, CHUNKS_PAD)
    if tl.load(integers + row) & _FILTERED:
        logits += row.to(tl.int64) * row_stride
        chunk = tl.arange(0, CHUNKS_PAD)
        there = chunk < chunks
        weighed = sums + (row * chunks + chunk) * 3
        total = tl.sum(tl.load(weighed, mask=there, other=0), 0)
        above = tl.sum(tl.load(weighed + 1, mask=there, other=0), 0)
        count = tl.sum(tl.load(weighed + 2, mask=there, other=0), 0)
        best = tl.load(logits + (last_id - (key & 0xFFFFFFFF))).to(tl.float32)
        top_p, limit = tl.load(doubles + row), tl.load(floats + 2 * rows + row)
        k = tl.load(integers + rows + row).to(tl.int64)
        is_sure = (k >= columns) | (top_p > 1.0)  # what top-k leaves need not be weighed
        kept = (count < k) & ((top - best) * tl.load(floats + rows + row) <= limit)
        kept = kept & (above.to(tl.float64) < top_p * total.to(tl.float64)) & is_sure
        number = tl.zeros([], tl.int64)
        if is_bounded:
            number = tl.load(bounds + 2 * row + 1)
        if (not kept) & (number > 0) & (number <= FEW):
            key = _search_few(
                few, number, floats, integers, top_p, limit, columns, row, rows, first_id, last_id, top, total,
                FEW, PIVOTS,
            )  # fmt: skip
        elif not kept:
            key = _search(
                logits, floats, integers, top_p, limit, columns, row, rows, first_id, last_id, key, top, total, above,
                CHUNK, PIVOTS,
            )  # fmt: skip
    tl.store(tokens + row, last_id - (key & 0xFFFFFFFF))


def best_keys(
    logits: torch.Tensor, floats: torch.Tensor, integers: torch.Tensor, first_id: int, last_id: int
) -> torch.Tensor:
    """Return [R] int64, a key of each row's best token among a slice of the vocabulary; no row has filters.

    ``last_id`` is that of the whole vocabulary, ``first_id`` that of the slice; the largest key of all slices is the
    token ``last_id`` - (key & 0xffffffff). Other arguments are those of ``choose``.
    """
    keys, _, _ = _propose(logits, floats, integers, first_id, last_id)
    return keys.amax(1)


def _propose(
    logits: torch.Tensor, floats: torch.Tensor, integers: torch.Tensor, first_id: int, last_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = logits.shape
    chunks = -(-columns // CHUNK)
    keys = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
    tops = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    groups = torch.empty((rows, chunks * (CHUNK // _GROUP)), dtype=torch.float32, device=logits.device)
    _propose_kernel[(rows, chunks)](
        logits, keys, tops, groups, floats, integers, columns, logits.stride(0), rows, first_id, last_id - first_id,
        chunks, CHUNK=CHUNK, GROUP=_GROUP,
    )  # fmt: skip
    return keys, tops, groups


def choose(
    logits: torch.Tensor, floats: torch.Tensor, doubles: torch.Tensor, integers: torch.Tensor, *, bounds: bool = True
) -> torch.Tensor:
    """Return the token ids [R] int64 that rows of the whole vocabulary choose.

    Args:
        logits: [R, V] on CUDA, of any float type.
        floats: [3, R] float32: 1 / T, 1 / (T ln 2), and how many binary orders below the best min-p keeps.
        doubles: [R] float64: top-p, inf for none.
        integers: [4, R] int64: flags, top-k (or NO_TOP_K), seeds and positions.
        bounds: whether any row has top-k or min-p.
    """
    rows, columns = logits.shape
    device, stride = logits.device, logits.stride(0)
    keys, tops, groups = _propose(logits, floats, integers, 0, columns - 1)
    chunks, num_groups = keys.shape[1], groups.shape[1]
    pad = triton.next_power_of_2(chunks)
    bound = torch.empty((rows, 2), dtype=torch.int64, device=device)
    few = torch.empty((rows, _FEW if bounds else 1), dtype=torch.int64, device=device)
    sums = torch.empty((rows, chunks, 3), dtype=torch.int64, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if bounds:
        _bound_kernel[(rows,)](
            groups, bound, floats, integers, columns, rows, num_groups,
            GROUPS_PAD=triton.next_power_of_2(num_groups), PIVOTS=_PIVOTS, num_warps=16,
        )  # fmt: skip
    _weigh_kernel[(rows, chunks)](
        logits, keys, tops, sums, bound, few, floats, integers, columns, stride, rows, columns - 1, chunks, int(bounds),
        CHUNK=CHUNK, CHUNKS_PAD=pad, FEW=_FEW,
    )  # fmt: skip
    _settle_kernel[(rows,)](
        logits, keys, tops, sums, bound, few, tokens, floats, doubles, integers, columns, stride, rows, 0, columns - 1,
        chunks, int(bounds), CHUNKS_PAD=pad, CHUNK=_SEARCH_CHUNK, PIVOTS=_PIVOTS, FEW=_FEW, num_warps=16,
    )  # fmt: skip
    return tokens
