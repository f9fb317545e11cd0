"""What one more token means for its sequence: whether it was the last. Stop strings are the text's to find."""

from __future__ import annotations

from collections.abc import Collection

from .request import LENGTH, STOP, Sequence, StreamEvent


def take_token(seq: Sequence, token: int, eos_token_ids: Collection[int]) -> StreamEvent:
    """Append a token to its sequence and return what is new; its output is there, with a reason, if that ends it."""
    params, output = seq.sampling, seq.output
    seq.token_ids.append(token)
    output.token_ids.append(token)
    is_eos = token in eos_token_ids and not params.ignore_eos
    is_stop = is_eos or token in params.stop_token_ids
    if is_stop and len(output.token_ids) > params.min_tokens:
        output.finish_reason = STOP
        output.stop_reason = None if is_eos else token
    elif len(seq.token_ids) >= seq.max_len:
        output.finish_reason = LENGTH
    return StreamEvent(seq.index, [token], "", output if output.finish_reason else None)
