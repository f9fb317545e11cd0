"""What is added to a row's logits first: logit_bias, and -inf for what bad words and min_tokens rule out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .request import Chunk


@dataclass(frozen=True)
class Biases:
    """What a row's logits get.

    Attributes:
        added: token id -> value.
        banned: a token id that is ruled out, and the token that must stand before it; -1 where any may.
    """

    added: dict[int, float] = field(default_factory=dict)
    banned: list[tuple[int, int]] = field(default_factory=list)


def biases_of(chunk: Chunk, ahead: int, eos_token_ids: Collection[int]) -> Biases:
    """Return the biases of the row that chooses what follows a chunk and ``ahead`` of its drafts.

    A chunk's last token may be one that only the device knows. What bad words need of it is left to the device.

    Args:
        eos_token_ids: what ends the sequence beside its own stop_token_ids; ruled out before ``min_tokens``.
    """
    seq, params = chunk.seq, chunk.seq.sampling
    made = chunk.stop + ahead - seq.prompt_len
    banned = dict.fromkeys((*eos_token_ids, *params.stop_token_ids) if made < params.min_tokens else ())
    longest = max(map(len, seq.bad_word_ids), default=1) - 1
    last = [*seq.token_ids[max(seq.prompt_len, chunk.stop - longest) : chunk.stop], *chunk.drafts[:ahead]]
    is_known = chunk.stop <= len(seq.token_ids)
    pairs = [(token, -1) for token in banned]
    for *begin, end in seq.bad_word_ids:
        if not begin or (is_known and _ends_with(last, begin)):
            pairs.append((end, -1))
        elif not is_known and _ends_with(last, begin[:-1]) and made >= len(begin):
            pairs.append((end, begin[-1]))
    return Biases(dict(params.logit_bias), pairs)


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return not end or list(tokens[-len(end) :]) == list(end)
