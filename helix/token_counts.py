"""What penalties need to know: how often a sequence made each token, and which tokens its prompt has, on the device.

A row of counts belongs to a batch slot; a rank has the columns of its slice of the vocabulary. A step counts the token
that it chooses, where that is the sequence's next one for sure, so that the step after it can be launched before the
host has read it. What was not counted so (accepted drafts, the tokens of a sequence that joins a slot again after it
was preempted, its prompt) is sent by the host, which knows for each slot how many tokens the device has counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .penalty_kernels import count_tokens, penalise
from .request import Sequence
from .upload import upload

IN_PROMPT = 1 << 30
"""Added to the count of a token that the prompt has."""


@dataclass
class _Counted:
    """Whose tokens a slot has counted, and how many of its output."""

    seq: Sequence | None = None
    num: int = 0


class TokenCounts:
    """The counts of a rank's slice of the vocabulary.

    Args:
        max_batch: batch slots.
        vocab: the ids [start, stop) of this rank's slice.
        device: this rank's.
    """

    def __init__(self, max_batch: int, vocab: tuple[int, int], device: torch.device) -> None:
        self._start, self._stop = vocab
        self._counts = torch.zeros((max_batch, vocab[1] - vocab[0]), dtype=torch.int32, device=device)
        self._counted = [_Counted() for _ in range(max_batch)]

    def bring_up_to_date(self, seq: Sequence, num: int, *, counts_next: bool) -> None:
        """Make a sequence's slot count the first ``num`` tokens of its output, of which the device chose the last ones.

        ``counts_next``: the step that comes counts the one after them.
        """
        counted = self._counted[seq.batch_slot]
        known = len(seq.token_ids) - seq.prompt_len
        if counted.seq is not seq or counted.num > num:
            counted.seq, counted.num = seq, 0
            self._fill(seq)
        if counted.num < num:
            if known < num:
                raise RuntimeError(
                    f"slot {seq.batch_slot} has counted {counted.num} of {num} tokens, {known} are known"
                )
            begin = seq.prompt_len + counted.num
            self._add(seq.batch_slot, np.array(seq.token_ids[begin : seq.prompt_len + num], np.int64))
        counted.num = num + counts_next

    def forget(self, seq: Sequence) -> None:
        """Hold no sequence that has left."""
        for counted in self._counted:
            if counted.seq is seq:
                counted.seq = None

    def penalised(self, logits: Tensor, slots: Tensor, amounts: Tensor, drafts: Tensor) -> Tensor:
        """Return float32 logits [R, V'] with their rows' penalties; those that are given stay as they are.

        Args:
            slots: [R] int64, each row's batch slot; -1 has no penalty.
            amounts: [3, R] float64: repetition, presence and frequency penalty.
            drafts: [R, D] int64, token ids that count as made before the row's choice; -1 is none.
        """
        return penalise(logits, self._counts, slots, amounts, drafts, self._start)

    def count(self, tokens: Tensor, slots: Tensor) -> None:
        """Count the tokens [R] int64 that rows chose; a slot of -1 counts nothing."""
        count_tokens(self._counts, tokens, slots, self._start)

    def _fill(self, seq: Sequence) -> None:
        self._counts[seq.batch_slot].zero_()
        if seq.distinct_prompt_ids is not None:
            ids = self._mine(seq.distinct_prompt_ids)
            if len(ids):
                self._counts[seq.batch_slot, upload({"ids": ids}, self._counts.device)["ids"]] = IN_PROMPT

    def _add(self, slot: int, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        ids, times = np.unique(self._mine(tokens), return_counts=True)
        if len(ids):
            sent = upload({"ids": ids, "times": times.astype(np.int32)}, self._counts.device)
            self._counts[slot, sent["ids"]] += sent["times"]

    def _mine(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return ids[(ids >= self._start) & (ids < self._stop)] - self._start
