"""Brings rank 0's masks to all ranks: one broadcast before a step that has structured rows, and none before others.

What travels, int32: whether rank 0 failed; of each structured chunk how many of its drafts may stay, or why it cannot
go on; then a mask for each of their rows, of one bit a token. Every rank knows the size from the chunks.

It is a message of its own, behind the door's: which rows there are, and which drafts, is decided in the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from parallel.launch import host_group

from ..commands import Add
from ..door import DoorClosed
from ..request import MASK_BITS, Chunk, Sequence
from .matching import TOO_SLOW, Matchers

NO_TOKEN = "structured_outputs: no token of the model can go on with this answer"
SLOW = "structured_outputs: the grammar is too ambiguous: finding what may come next takes too long"


class Masks:
    """The masks of an engine's steps.

    Args:
        matchers: rank 0's; None on the others.
        vocab_size: tokens of the model.
    """

    def __init__(self, matchers: Matchers | None, vocab_size: int) -> None:
        self._matchers, self._num_words = matchers, -(-vocab_size // MASK_BITS)
        self._too_slow: set[Sequence] = set()

    def admit(self, add: Add) -> Add:
        """Take the grammar out of a command that is about to enter. On rank 0 alone, from any thread."""
        return add if self._matchers is None else self._matchers.admit(add)

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._too_slow.discard(seq)
        if self._matchers is not None and seq.is_structured:
            self._matchers.drop(seq.index)

    def masked(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return a step's chunks with the masks of the structured ones that choose, and without drafts that may not be.

        Collective over the world where there are any: every rank calls it with the same chunks.

        Raises:
            DoorClosed: on the other ranks, where matching failed on rank 0, which raises what it met.
        """
        mine = [number for number, chunk in enumerate(chunks) if chunk.samples and chunk.seq.is_structured]
        if not mine:
            return chunks
        counts, rows = self._share([chunks[number] for number in mine])
        made, row = list(chunks), 0
        for number, count in zip(mine, counts, strict=True):
            chunk = chunks[number]
            if count == TOO_SLOW:
                self._too_slow.add(chunk.seq)
                rows[row] = 0
            kept = max(count, 0)
            made[number] = replace(chunk, drafts=chunk.drafts[:kept], masks=rows[row : row + 1 + kept])
            row += chunk.num_choices
        return made

    def problem(self, seq: Sequence) -> str:
        """Return why a sequence of which a row may choose nothing cannot go on."""
        return SLOW if seq in self._too_slow else NO_TOKEN

    def _share(self, chunks: Many[Chunk]) -> tuple[list[int], np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
        num_rows, first = sum(chunk.num_choices for chunk in chunks), 1 + len(chunks)
        data = np.zeros(first + num_rows * self._num_words, np.int32)  # PyTorch's would wake all cores, for 5 ms
        message = torch.from_numpy(data)
        rows = data[first:].reshape(num_rows, self._num_words)
        problem: BaseException | None = None
        if self._matchers is not None:
            try:
                data[1:first] = self._matchers.fill(chunks, rows)
            except BaseException as error:  # told to the others before it is raised: they wait for the message
                problem, data[0] = error, 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(message, 0, group=host_group())
        if problem is not None:
            raise problem
        if data[0]:
            raise DoorClosed("rank 0 failed to match an answer with its grammar")
        return data[1:first].tolist(), rows
