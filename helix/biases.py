"""What is added to a row's logits first: logit_bias, and -inf for what bad words and min_tokens rule out."""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Many

from .request import Sequence


def biases_of(seq: Sequence, eos_token_ids: Collection[int], drafts: Many[int] = ()) -> dict[int, float]:
    """Return token id -> value for the row that chooses what follows a sequence's known tokens and some drafts.

    Args:
        eos_token_ids: what ends the sequence beside its own stop_token_ids; ruled out before ``min_tokens``.
    """
    params = seq.sampling
    if not params.has_biases:
        return {}
    found = {token: float(value) for token, value in params.logit_bias.items()}
    made = len(seq.token_ids) + len(drafts) - seq.prompt_len
    banned = [*eos_token_ids, *params.stop_token_ids] if made < params.min_tokens else []
    longest = max(map(len, seq.bad_word_ids), default=1) - 1
    last = [*seq.token_ids[max(seq.prompt_len, len(seq.token_ids) - longest) :], *drafts]
    banned += [word[-1] for word in seq.bad_word_ids if _ends_with(last, word[:-1])]
    return found | dict.fromkeys(banned, -math.inf)


def _ends_with(tokens: Many[int], end: tuple[int, ...]) -> bool:
    return tuple(tokens[len(tokens) - len(end) :]) == end if len(end) <= len(tokens) else False
