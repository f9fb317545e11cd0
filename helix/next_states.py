"""What the layer that predicts one token further needs of every step (DeepSeek-V3, arXiv 2412.19437, section 2.2).

The layer's row at position p takes the token there and the model's final hidden state of p - 1. Later rows read nothing
of it but its key, so behind every step, be it of a prompt or of decode rows, the keys of its rows are appended to one
more layer of the same pages, in the same slots; nothing of the layer is computed beyond them. What the first row of a
sequence's next step needs is the hidden state of a row of this one, and which is known when the host has read how many
drafts were accepted: the states of a sequence's last rows stay on the device until then.

Shape letters: R rows, K kept rows of a sequence, h hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch

from attention.rows import Rows
from parallel.placement import IntArray

from .cache.pages import PagedCache
from .models.next_decoder import NextDecoder
from .request import Chunk


class NextStates:
    """The final hidden states of each sequence's last rows.

    Args:
        decoder: the rank's model, with the layer.
        max_batch: batch slots.
        most_rows: K, the most rows of a sequence that decodes: one, and its drafts.

    Attributes:
        kept: [1 + max_batch * K, h]; row 0 is for what nobody needs, then K rows of each batch slot, the last is last.
        chosen: int64 [K, max_batch + 1], of each batch slot the token that was chosen last, then its drafts; the last
            column is padding's.
    """

    def __init__(self, decoder: NextDecoder, *, max_batch: int, most_rows: int) -> None:
        self.decoder, self._most_rows = decoder, most_rows
        self.kept = torch.zeros(
            (1 + max_batch * most_rows, decoder.spec.hidden_size), dtype=decoder.dtype, device=decoder.device
        )
        self.chosen = torch.zeros((most_rows, max_batch + 1), dtype=torch.int64, device=decoder.device)
        self._stops = np.zeros(max_batch, np.int64)  # of each batch slot the position after its last row

    def before(self, chunks: Many[Chunk]) -> IntArray:
        """Return where the state of the position before each chunk is kept, [C]; 0 where there is none.

        There is none before a sequence, and before what it reuses, which is not written anew.
        """
        slots = np.array([chunk.seq.batch_slot for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        has_state = starts > np.maximum([chunk.seq.blocks.num_reused - 1 for chunk in chunks], 0)
        back = self._stops[slots] - starts  # rows of rejected drafts
        assert ((back >= 0) & (back < self._most_rows))[has_state].all()
        return np.where(has_state, (slots + 1) * self._most_rows - back, 0)

    def take(self, chunks: Many[Chunk]) -> tuple[IntArray, IntArray]:
        """Note that chunks are computed; return for ``follow`` what is before each row, and where it is kept: [R] each.

        To be called once for every step, in their order.
        """
        counts = np.array([chunk.num_rows for chunk in chunks])
        slots = np.array([chunk.seq.batch_slot for chunk in chunks])
        stops = counts.cumsum()
        before = np.zeros(stops[-1], np.int64)
        before[stops - counts] = self.before(chunks)
        from_end = np.repeat(stops, counts) - np.arange(stops[-1])
        places = np.repeat((slots + 1) * self._most_rows, counts) + 1 - from_end
        self._stops[slots] = [chunk.stop + len(chunk.drafts) for chunk in chunks]
        return before, np.where(from_end <= self._most_rows, places, 0)

    @torch.inference_mode()
    def follow(
        self,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        rows: Rows,
        before: torch.Tensor,
        keep: torch.Tensor,
        cache: PagedCache,
        *,
        chosen: torch.Tensor | None = None,
        chunk: bool = False,
    ) -> None:
        """Append the keys of a step's rows, and keep its states. Collective over the world, as the step itself is.

        Args:
            token_ids, rows, chosen, chunk: the step's, as in ``Decoder.forward``.
            hidden: [R, h], what that returned.
            before: [R] int64, where the state before each row is kept; 0 is that of the row before it.
            keep: [R] int64, where its own is kept.
            cache: the pages of all layers.
        """
        hidden = self.decoder.state_of(hidden)
        states = torch.where((before > 0).unsqueeze(1), self.kept[before], hidden.roll(1, 0))
        pages = cache.layers[-1]
        at = None if chosen is None else (chosen, rows.row_seq)
        self.decoder.append_next(token_ids, states, rows, pages, chosen=at, chunk=chunk)
        self.kept.index_copy_(0, keep, hidden)
