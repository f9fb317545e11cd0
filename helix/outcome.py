"""What chosen tokens mean for their sequence: which of them are kept, and whether one was the last.

Stop strings are the text's to find.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .logprobs import SampledTokens, on_host
from .request import LENGTH, STOP, Chunk, Sequence, StreamEvent, TokenLogprobs
from .speculative.verify import num_accepted


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of what a chunk's rows chose.

    Attributes:
        events: one a token that was kept; the last has the output if that ended the sequence.
        accepted: drafts that the rows confirmed.
        is_stuck: the row behind them may choose no token: its mask is empty.
    """

    events: list[StreamEvent]
    accepted: int
    is_stuck: bool = False


def dealt(tokens: SampledTokens, chunks: list[Chunk]) -> Iterator[tuple[Chunk, list[int], list[TokenLogprobs] | None]]:
    """Yield chunks that sample, each with the tokens that its rows chose, and log-probabilities where any asks."""
    ids, row = tokens.token_ids.tolist(), 0
    nums = [chunk.seq.sampling.logprobs or 0 for chunk in chunks for _ in range(1 + len(chunk.drafts))]
    logprobs = None if tokens.logprobs is None else on_host(tokens, nums)
    for chunk in chunks:
        rows = slice(row, row + 1 + len(chunk.drafts))
        yield chunk, ids[rows], None if logprobs is None else logprobs[rows]
        row = rows.stop


def take_choices(
    chunk: Chunk, ids: list[int], logprobs: list[TokenLogprobs] | None, eos_token_ids: Collection[int]
) -> Taken:
    """Append to a sequence the drafts that a chunk's rows confirm and the token that follows them, up to its end."""
    seq, events = chunk.seq, list[StreamEvent]()
    accepted = num_accepted(chunk.drafts, ids)
    for at in range(1 + accepted):
        if chunk.masks is not None and not chunk.masks[at].any():
            return Taken(events, accepted, is_stuck=True)
        if seq.output.logprobs is not None and logprobs is not None:
            seq.output.logprobs.append(logprobs[at])
        events.append(take_token(seq, ids[at], eos_token_ids))
        if events[-1].output is not None:
            break
    return Taken(events, accepted)


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
