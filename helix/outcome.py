"""What one more token means for its sequence: its text, and whether it was the last."""

from __future__ import annotations

from collections.abc import Collection

from .request import LENGTH, STOP, Sequence, StreamEvent


def take_token(seq: Sequence, token: int, eos_token_ids: Collection[int]) -> StreamEvent:
    """Append a token to its sequence and return what is new; its output is there, with a reason, if that ends it."""
    params, output = seq.sampling, seq.output
    seq.token_ids.append(token)
    output.token_ids.append(token)
    is_eos = token in eos_token_ids and not params.ignore_eos
    text = ""
    if is_eos or token in params.stop_token_ids:
        output.finish_reason = STOP
    else:
        text = seq.detokenizer.push(token)
        if seq.detokenizer.stopped is not None:
            output.finish_reason = STOP
        elif len(seq.token_ids) >= seq.max_len:
            output.finish_reason = LENGTH
    if output.finish_reason:
        text += seq.detokenizer.finish()
        output.text = seq.detokenizer.text
    return StreamEvent(seq.index, [token], text, output if output.finish_reason else None)
