"""Which tokens a row may not choose: what bad words and min_tokens rule out."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Chunk


def banned(chunk: Chunk, ahead: int, eos_token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return what the row may not choose that follows a chunk and ``ahead`` of its drafts.

    Each is a token id, and the token that must stand before it for that; -1 where any may. A chunk's last token may be
    one that only the device knows: what bad words need of it is left to the device.

    Args:
        eos_token_ids: what ends the sequence beside its own stop_token_ids; ruled out before ``min_tokens``.
    """
    seq, params = chunk.seq, chunk.seq.sampling
    made = chunk.stop + ahead - seq.prompt_len
    ends = dict.fromkeys((*eos_token_ids, *params.stop_token_ids) if made < params.min_tokens else ())
    longest = max(map(len, seq.bad_word_ids), default=1) - 1
    last = [*seq.token_ids[max(seq.prompt_len, chunk.stop - longest) : chunk.stop], *chunk.drafts[:ahead]]
    is_known = chunk.stop <= len(seq.token_ids)
    pairs = [(token, -1) for token in ends]
    for *begin, end in seq.bad_word_ids:
        if not begin or (is_known and _ends_with(last, begin)):
            pairs.append((end, -1))
        elif not is_known and _ends_with(last, begin[:-1]) and made >= len(begin):
            pairs.append((end, begin[-1]))
    return pairs


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return not end or list(tokens[-len(end) :]) == list(end)
