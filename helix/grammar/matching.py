"""Rank 0's matchers: of each structured request, which tokens may come next. They run behind the tokens that are known.

A request's compiled grammar comes with it and is kept here until it ends; a matcher follows the request's output, so
that one that was preempted, or whose first token another group made, is caught up with when it is next asked.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence as Many
from dataclasses import dataclass
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..commands import Add
from ..request import Chunk, Sequence
from .vocabulary import Vocabulary, allows

ROW_S, SPARE_S = 0.005, 0.2
"""Of one core: what a row may take on average, and a request beyond that. Most take 0.1 ms, a grammar's first may take
40; those of an ambiguous one take ever longer, and all ranks wait meanwhile."""
TOO_SLOW = -1
NUM_KEPT = 32


@dataclass
class _Matched:
    """One request's grammar, its matcher once there is one, what that accepted, and what is left of SPARE_S."""

    compiled: Any
    kind: str
    matcher: Any = None
    num_accepted: int = 0
    blanks: bytes = b""  # at the end of it
    spare_s: float = SPARE_S


class Matchers:
    """Those of all requests that live. Rank 0's alone.

    Args:
        vocabulary: the model's.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._matched: dict[int, _Matched] = {}
        self._lock = Lock()
        self._shared: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def admit(self, add: Add) -> Add:
        """Keep the grammar of a request that is about to enter; return the command without it. From any thread.

        Of several with one grammar that enter one after the other, the first alone has to bring it.
        """
        if not add.sampling.structured_outputs:
            return add
        [key] = add.sampling.structured_outputs.items()
        with self._lock:
            compiled = self._shared.get(key)
            if compiled is None:
                if not add.grammar:
                    raise RuntimeError(f"request {add.index} came without its grammar, which nobody has brought")
                import xgrammar

                text = add.grammar.decode()
                compiled = self._shared[key] = xgrammar.CompiledGrammar.deserialize_json(text, self._vocabulary.info)
            self._kept[key] = compiled
            self._kept.move_to_end(key)
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
            self._matched[add.index] = _Matched(compiled, key[0])
        return msgspec.structs.replace(add, grammar=b"")

    def drop(self, index: int) -> None:
        """Forget a request that has ended."""
        self._matched.pop(index, None)

    def fill(self, chunks: Many[Chunk], masks: npt.NDArray[np.int32]) -> list[int]:
        """Write the masks of the rows of chunks that choose, one after the other, and return the drafts that may stay.

        A draft that the row before it may not choose ends its chunk's; the rows of those behind it are left unwritten.
        TOO_SLOW stands for a request whose grammar takes too long to match.

        Args:
            masks: [sum of num_choices, W], zeros.
        """
        counts, row = [], 0
        for chunk in chunks:
            rows = masks[row : row + chunk.num_choices]
            counts.append(self._fill(chunk, rows))
            row += len(rows)
        return counts

    def _fill(self, chunk: Chunk, masks: npt.NDArray[np.int32]) -> int:
        began, matched = time.thread_time(), self._matched[chunk.seq.index]
        num_tried = self._match(chunk, masks)
        spare_s = matched.spare_s + ROW_S * (1 + num_tried) - (time.thread_time() - began)
        matched.spare_s = min(spare_s, SPARE_S)
        return TOO_SLOW if spare_s < 0 else num_tried

    def _match(self, chunk: Chunk, masks: npt.NDArray[np.int32]) -> int:
        seq, vocabulary = chunk.seq, self._vocabulary
        matcher, num_tried = self._caught_up(seq), 0
        matched = self._matched[seq.index]
        in_json, blanks = matched.kind in ("json", "call"), matched.blanks
        last = seq.token_ids[-1] if len(seq.token_ids) > seq.prompt_len else None
        for mask, draft in zip(masks, (*chunk.drafts, None), strict=True):
            matcher.fill_next_token_bitmask(mask[None])
            if in_json:
                vocabulary.keep_json(mask, blanks)
            if last is not None and (after := vocabulary.mask_after(last)) is not None:
                mask &= after
            if draft is None or not allows(mask, draft):
                break
            matcher.accept_token(draft)
            last, num_tried = draft, num_tried + 1
            blanks = vocabulary.blanks_behind(draft, blanks)
            if matcher.is_terminated():  # a draft that ends the answer: nothing comes behind it
                break
        if num_tried:
            matcher.rollback(num_tried)
        return num_tried

    def _caught_up(self, seq: Sequence) -> Any:
        """Return a request's matcher behind its last known token."""
        matched = self._matched[seq.index]
        if matched.matcher is None:
            import xgrammar

            ends = self._vocabulary.ends_with(seq.sampling.stop_token_ids)
            matched.matcher = xgrammar.GrammarMatcher(matched.compiled, override_stop_tokens=ends)
        for token in seq.token_ids[seq.prompt_len + matched.num_accepted :]:
            if not matched.matcher.accept_token(token):
                raise RuntimeError(f"request {seq.index}: token {token} was chosen, which its grammar does not allow")
            matched.num_accepted += 1
            matched.blanks = self._vocabulary.blanks_behind(token, matched.blanks)
        return matched.matcher
