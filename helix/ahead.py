"""What is launched of sequences and not committed yet, as far as the step behind it needs to know."""

from __future__ import annotations

from collections.abc import Iterable

from .request import Chunk, Sequence


class Ahead:
    """The chunks of a step that is launched; without any, what is computed is all there is."""

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        self._chunks = {chunk.seq: chunk for chunk in chunks}

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._chunks

    @property
    def something_ends(self) -> bool:
        """True where a chunk is its sequence's last for sure."""
        return any(map(_ends, self._chunks.values()))

    @property
    def decodes_alone(self) -> bool:
        """True where it is of decode rows alone."""
        return all(chunk.is_decode for chunk in self._chunks.values())

    def start(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence are computed or launched: where its next chunk begins."""
        return self._chunks[seq].stop if seq in self._chunks else seq.num_computed

    def todo(self, seq: Sequence) -> int:
        """Return how many of its tokens come next: known ones, or the one that is being chosen.

        None come next where that one ends it for sure, or has to be known first, as that of a structured sequence.
        """
        chunk = self._chunks.get(seq)
        if chunk is None:
            return seq.num_todo
        if _ends(chunk) or (chunk.samples and seq.is_structured):
            return 0
        return max(len(seq.token_ids) - chunk.stop, 1)


def _ends(chunk: Chunk) -> bool:
    return chunk.seq.has_ended or (chunk.samples and chunk.stop + 1 >= chunk.seq.max_len)
