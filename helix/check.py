"""Compare what the ranks decided, and from what: a run with ``runtime.check_ranks`` ends at the first difference."""

from __future__ import annotations

import hashlib

import numpy as np

from parallel.launch import gather_values

from .cache.movements import as_ints
from .logprobs import SampledTokens
from .request import Chunk
from .scheduler import Step


class RankMismatch(RuntimeError):
    """Two ranks took different decisions, or took the same from different requests."""


def compare_ranks(number: int, step: Step, tokens: SampledTokens | None = None) -> None:
    """Compare a digest of a step over all ranks: what goes in, what was decided, and the tokens that came out.

    Collective over the world.

    Args:
        number: of the step, for the message.
        step: what was decided.
        tokens: what was chosen, once that is known.

    Raises:
        RankMismatch: on all ranks, with the first rank that differs from rank 0.
    """
    digest = hashlib.blake2b(digest_size=7)
    for movement in step.movements:
        digest.update(np.array(as_ints(movement), np.int64).tobytes())
    for chunk in step.chunks:
        _digest_chunk(digest, chunk)
    if tokens is not None:
        digest.update(tokens.token_ids.cpu().numpy().tobytes())
    values = gather_values(int.from_bytes(digest.digest(), "little"))
    different = [rank for rank, value in enumerate(values) if value != values[0]]
    if different:
        raise RankMismatch(
            f"step {number}: rank {different[0]} decided otherwise than rank 0 "
            f"({len(different)} of {len(values)} ranks differ from it)"
        )


def _digest_chunk(digest: hashlib.blake2b, chunk: Chunk) -> None:
    seq = chunk.seq
    state = [
        seq.index,
        chunk.start,
        chunk.stop,
        seq.batch_slot,
        seq.blocks.first_owner,
        *seq.blocks.pages,
        -1,
        *seq.blocks.window.pages,
    ]
    inputs = [seq.seed, seq.max_len, seq.priority, *seq.token_ids[chunk.start : chunk.stop]]
    digest.update(np.array([*state, -1, *chunk.drafts, -1, *inputs], np.int64).tobytes())
    digest.update(repr((seq.sampling, seq.cache_salt, seq.retention)).encode("utf-8", "surrogatepass"))
