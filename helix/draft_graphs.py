"""Steps of the layer that predicts one token further: one graph a batch bucket, launched once for each draft token.

A step has one row of every sequence. The first takes the sequence's last token and the model's final hidden state of
the one before it; those that follow take the token that the step before chose, and the state that it left, in the same
rows. So the host prepares a step while the device computes the one before, and reads all drafts at the end.
"""

from __future__ import annotations

import torch

from attention.exchange import Exchange
from parallel.symmetric import Faults

from .cache.pages import PagedCache
from .graphs import StepGraph, StepGraphs, buckets_up_to
from .models.next_decoder import NextDecoder
from .next_states import NextStates


class DraftGraphs(StepGraphs):
    """The draft steps of one rank; see ``StepGraphs``.

    Args:
        decoder, exchange, cache, page_table, faults, captured: as there.
        states: where the model's hidden states are kept.
        max_batch: the largest bucket; there is one of every power of two.
        max_draft_len: the most steps before the host reads them.
    """

    def __init__(
        self,
        decoder: NextDecoder,
        exchange: Exchange,
        cache: PagedCache,
        page_table: torch.Tensor,
        *,
        faults: Faults | None,
        states: NextStates,
        max_batch: int,
        max_draft_len: int,
        captured: bool,
    ) -> None:
        super().__init__(
            decoder, exchange, cache, page_table, faults=faults, stages=max_draft_len + 1, captured=captured
        )
        device = decoder.device
        self._predicts, self._states = decoder, states
        self._own = torch.zeros((max_batch, decoder.spec.hidden_size), dtype=decoder.dtype, device=device)
        self._drafted = torch.zeros((1, max_batch), dtype=torch.int64, device=device)  # of each row, by the last step
        self._order = torch.arange(max_batch, device=device)
        self._make([(size, 1) for size in buckets_up_to(max_batch)])

    def find(self, num_sequences: int) -> StepGraph:
        """Return the graph of the smallest bucket that holds so many sequences."""
        return next(graph for graph in self.graphs if graph.num_runs >= num_sequences)

    @torch.inference_mode()
    def _step(self, graph: StepGraph) -> None:
        inputs, size, decoder = graph.inputs, graph.num_rows, self._predicts
        token_ids, before = inputs["token_ids"], inputs["before"]
        chosen = (self._drafted, self._order) if token_ids.is_cuda else None
        if chosen is None:
            token_ids = torch.where(token_ids < 0, self._drafted[0, :size], token_ids)
        states = torch.where((before > 0).unsqueeze(1), self._states.kept[before], self._own[:size])
        pages = self._cache.layers[-1]
        own, tokens = decoder.predict_next(token_ids, states, self._rows(graph), pages, self._exchange, chosen=chosen)
        self._own[:size] = own
        self._drafted[0, :size] = tokens
        self._states.chosen[inputs["keep"], inputs["row_seq"].long()] = tokens
        graph.output = self._output(tokens)
