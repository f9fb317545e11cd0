"""Run one step on this rank: turn the scheduler's chunks into rows, and rows into logits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from attention.exchange import Exchange
from parallel.grid import HelixGrid
from parallel.placement import BlockCyclic, IntArray
from parallel.symmetric import Faults

from .batch import LocalRows, StepRows
from .cache.pages import PagedCache
from .choice_graphs import ChoiceGraphs
from .decode_rows import DecodeRows
from .device_rows import RowSender
from .draft_graphs import DraftGraphs
from .graphs import DecodeGraphs, PendingTokens, StepGraph
from .logprobs import SampledTokens
from .lost import raise_lost
from .models.decoder import Decoder
from .models.linear import MAX_ROWS
from .models.next_decoder import NextDecoder
from .next_states import NextStates
from .page_tables import PageTables
from .request import Chunk
from .sampler import FixedChoices, Sampler
from .states.cuts import arrays_of_cuts
from .upload import upload


class Runner:
    """Holds the device state of a rank between steps: page tables, pages, the model.

    Args:
        decoder: the rank's model.
        exchange: the exchange over the KVP group.
        cache: the rank's pages.
        placement: the rule of ownership.
        max_batch: batch slots.
        max_len: the longest sequence, in tokens.
        share_qkv_rows: steps of at least so many rows share the QKV projection; 0 is never.
        expand_rows: steps with at least so many rows of one sequence attend to keys and values that are made of
            latents, or widened, where the decoder has a workspace for them; 0 is never.
        faults: where this rank's kernels note waits that they gave up; None where no kernel waits.
        sampler: chooses tokens that are not simply the most likely ones; None where there are no others.
        max_draft_len: the most drafts of a sequence.

    Attributes:
        expand_rows: as given; 0 where the decoder has no workspace.
        num_padding: rows that the last step computed for nobody, to fill its graph.
        next_states: what the model's layer that predicts one token further needs of every step; None without one.
        drafts: the steps of that layer; None before ``prepare_drafts``.
    """

    def __init__(
        self,
        decoder: Decoder,
        exchange: Exchange,
        cache: PagedCache,
        placement: BlockCyclic,
        *,
        max_batch: int,
        max_len: int,
        share_qkv_rows: int,
        expand_rows: int = 0,
        faults: Faults | None = None,
        sampler: Sampler | None = None,
        max_draft_len: int = 0,
    ) -> None:
        self.decoder, self.exchange, self.cache, self.placement = decoder, exchange, cache, placement
        self.grid: HelixGrid = decoder.grid
        self.tables = PageTables(
            placement, self.grid.kvp_rank, max_batch=max_batch, max_len=max_len, device=decoder.device,
            window=decoder.spec.window,
        )  # fmt: skip
        self.expand_rows = expand_rows if decoder.made is not None else 0
        self._sender = RowSender(
            decoder, self.tables, placement, share_rows=share_qkv_rows, expand_rows=self.expand_rows
        )
        self._graphs: DecodeGraphs | None = None
        self._choices: ChoiceGraphs | None = None
        self._last_tokens = torch.zeros(max_batch, dtype=torch.int64, device=decoder.device)
        self.faults, self.sampler = faults, sampler
        self.num_padding = 0
        self.next_states: NextStates | None = None
        self.drafts: DraftGraphs | None = None
        if isinstance(decoder, NextDecoder) and decoder.next is not None:
            self.next_states = NextStates(decoder, max_batch=max_batch, most_rows=1 + max_draft_len)

    @property
    def max_batch(self) -> int:
        """The most sequences that a step may hold."""
        return self.tables.max_batch

    def capture(self, drafts: Iterable[tuple[int, int]] = ()) -> None:
        """Capture the decode steps of every batch bucket; ``cache`` must not be replaced afterwards.

        Collective over the world; needs faults. ``drafts`` are the pairs (batch bucket, draft length) to capture beside
        the steps without drafts.
        """
        assert self.faults is not None
        self._graphs = DecodeGraphs(
            self.decoder,
            self.exchange,
            self.cache,
            self.tables.device,
            window_table=None if self.tables.windows is None else self.tables.windows.device,
            faults=self.faults,
            drafts=drafts,
            states=self.next_states,
        )
        if self.sampler is not None:
            self._choices = ChoiceGraphs(self._graphs, self.sampler, faults=self.faults)

    def prepare_drafts(self, max_draft_len: int, *, captured: bool) -> None:
        """Make the steps of the layer that predicts one token further; ``cache`` must not be replaced afterwards.

        Collective over the world. ``captured``: as graphs, on CUDA, which needs faults.
        """
        assert self.next_states is not None
        self.drafts = DraftGraphs(
            self.next_states.decoder,
            self.exchange,
            self.cache,
            self.tables.device,
            faults=self.faults,
            states=self.next_states,
            max_batch=self.max_batch,
            max_draft_len=max_draft_len,
            captured=captured,
        )

    def release_graphs(self) -> None:
        """Free what was captured; to be called before the world ends."""
        for graphs in (self._choices, self._graphs, self.drafts):
            if graphs is not None:
                graphs.release()
        self._choices = self._graphs = self.drafts = None

    def run(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute a step and return the logits of the rows that choose tokens: float32 [sum of num_choices, V].

        Collective over the world: every rank calls it with the same chunks.
        """
        local = self._local_logits(chunks)
        if not len(local):
            return local.new_empty((0, self.decoder.spec.vocab_size), dtype=torch.float32)
        return self.decoder.gather_logits(local)

    def sample(self, chunks: list[Chunk]) -> SampledTokens | None:
        """Compute a step and return the tokens that its rows choose, on the device; None where none does.

        Collective over the world: every rank calls it with the same chunks. It needs a sampler.
        """
        assert self.sampler is not None
        choosing = [chunk for chunk in chunks if chunk.samples]
        choices = self.sampler.prepare(choosing, self._device_tokens) if choosing else None
        local = self._local_logits(chunks)
        return None if choices is None else self.sampler.choose(local, choices)

    @property
    def _device_tokens(self) -> torch.Tensor:
        """The token that the device chose last for each batch slot."""
        return self._last_tokens if self._graphs is None else self._graphs.last_tokens

    def _local_logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute a step and return this rank's slice of the logits of the rows that choose: [num_choices, V_local].

        Decode rows beside a prompt's chunk are a step of their own: their graph is replayed as if they were alone, so
        that no bit of them depends on the chunk, which is computed behind it.
        """
        decoding, others = list[Chunk](), list[Chunk]()
        for chunk in chunks:
            (decoding if chunk.samples and chunk.stop - chunk.start == 1 else others).append(chunk)
        graph = self._graph_of(decoding)
        if self._graphs is None or graph is None:
            return self._run_eagerly(chunks)
        logits = self._graphs.local_logits(self._replay(graph, decoding).rows)
        if not others:
            return logits
        num_padding = self.num_padding
        logits = torch.cat((logits, self._run_eagerly(others)))
        self.num_padding = num_padding
        computed = [*decoding, *others]
        if all(one is other for one, other in zip(chunks, computed, strict=True)):
            return logits
        starts = np.cumsum([0, *(chunk.num_choices for chunk in computed)])
        first = dict(zip(map(id, computed), starts.tolist(), strict=False))
        order = [first[id(chunk)] + choice for chunk in chunks for choice in range(chunk.num_choices)]
        return logits[upload({"order": np.array(order, np.int64)}, logits.device)["order"]]

    def _run_eagerly(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute a step without a graph; see ``_local_logits``."""
        self.num_padding = 0
        step = StepRows.of(chunks)
        self.tables.update(chunks)
        local = self.tables.local_rows(step)
        stops = step.query_start[1:].tolist()
        choosing = _choosing_rows(chunks, stops)
        scores = self.sampler is not None and any(chunk.seq.scores_prompt for chunk in chunks)
        if scores or self.next_states is not None or len(choosing) == step.num_rows:
            hidden = self.forward(step, local, chunks)
            if scores and self.sampler is not None:
                self.sampler.scorer.score(chunks, hidden, stops)
            if 0 < len(choosing) < len(hidden):
                hidden = hidden[upload({"rows": np.array(choosing, np.int64)}, hidden.device)["rows"]]
        else:
            hidden = self.forward(step, local, chunks, wanted=np.array(choosing, np.int64))
        if choosing:
            return self.decoder.local_logits(hidden)
        first, stop = self.decoder.part.vocab
        return hidden.new_empty((0, stop - first))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> PendingTokens:
        """Launch a step, from its graph where there is one; the tokens of the rows that choose come to the host.

        Collective over the world. The token of a row that is not known yet is the one that the last launched step chose
        for its batch slot. On a GPU nothing here waits for the device. Sampling comes behind the forward: as a graph of
        its own, or eagerly.
        """
        choosing = [chunk for chunk in chunks if chunk.samples]
        plain = self.sampler is None or all(chunk.seq.sampling.is_plain for chunk in choosing)
        graph = self._graph_of(chunks)
        if graph is not None and plain:
            return self._replay(graph, chunks)
        if graph is not None and self.sampler is not None and self._choices is not None:
            fixed = self.sampler.prepare_fixed(chunks)
            if fixed is not None:
                return self._replay(graph, chunks, fixed)
        if plain:
            local = self._local_logits(chunks)
            return self._sent(choosing, self.decoder.greedy(local) if choosing else None)
        sampled = self.sample(chunks)
        tokens = None if sampled is None else sampled.token_ids
        return self._sent(choosing, tokens, None if sampled is None or sampled.logprobs is None else sampled)

    def _graph_of(self, chunks: list[Chunk]) -> StepGraph | None:
        """Return the graph that holds the rows of chunks which all choose tokens; None where none does."""
        if self._graphs is None or not chunks or not all(chunk.samples for chunk in chunks):
            return None
        return self._graphs.find(len(chunks), max(chunk.num_rows for chunk in chunks))

    def _replay(self, graph: StepGraph, chunks: list[Chunk], fixed: FixedChoices | None = None) -> PendingTokens:
        """Launch a step from its graph: its rows choose the most likely tokens, or as ``fixed`` says."""
        assert self._graphs is not None
        step = StepRows.of(chunks)
        self.tables.update(chunks)
        local = self.tables.local_rows(step)
        before, keep = self._taken(chunks)
        rows = DecodeRows(
            step.token_ids, step.positions, local.slot, step.row_seq, local.visible, step.counts, before, keep,
            local.window,
        )  # fmt: skip
        self.num_padding = graph.num_rows - step.num_rows
        stops = range(graph.run_len, graph.num_rows + 1, graph.run_len)
        wanted = _choosing_rows(chunks, stops)
        choose = None if fixed is None or self._choices is None else self._choices.of(graph, fixed, wanted)
        return self._graphs.launch(graph, rows, wanted, choose)

    def draft(self, chunks: list[Chunk], number: int) -> PendingTokens:
        """Launch the ``number``-th step of the layer that predicts one token further; return what it drafts.

        Collective over the world; what drafts in a step is a leading part of what drafted in the one before. The first
        takes the sequences' last tokens, those that follow what was drafted before them, which nobody has read.

        Args:
            chunks: one position each, which has a page.
            number: counted from 0.
        """
        assert self.drafts is not None and self.next_states is not None
        ids = [-1 if number else chunk.seq.token_ids[chunk.start] for chunk in chunks]
        step = StepRows.at(chunks, np.array(ids))
        self.tables.update(chunks)
        local = self.tables.local_rows(step)
        rows = DecodeRows(
            step.token_ids, step.positions, local.slot, step.row_seq, local.visible, step.counts,
            before=None if number else self.next_states.before(chunks),
            keep=np.full(len(chunks), 1 + number),
        )  # fmt: skip
        return self.drafts.launch(self.drafts.find(len(chunks)), rows, list(range(len(chunks))))

    def finds_drafts(self, chunks: list[Chunk]) -> bool:
        """Return whether ``launch`` runs a step of these chunks whose drafts are the device's, which nobody has read.

        Its tokens for them are -2 and below, see ``DecodeRows``.
        """
        return all(chunk.seq.sampling.is_plain for chunk in chunks) and self._graph_of(chunks) is not None

    def _taken(self, chunks: list[Chunk]) -> tuple[IntArray, IntArray] | tuple[None, None]:
        """Return what ``NextStates.take`` does for the chunks of a step; None without the layer that asks for it."""
        return (None, None) if self.next_states is None else self.next_states.take(chunks)

    def _sent(
        self, chunks: list[Chunk], tokens: torch.Tensor | None, sampled: SampledTokens | None = None
    ) -> PendingTokens:
        """Keep the last token of each chunk for the next step, and send all to the host; None where none chooses.

        ``sampled``: the same tokens with log-probabilities; None where no row asks for these.
        """
        device = self.decoder.device
        fault = torch.zeros(1, dtype=torch.int64, device=device) if self.faults is None else self.faults.word.long()
        if tokens is None:
            return PendingTokens.send(fault)
        last = np.cumsum([chunk.num_choices for chunk in chunks]) - 1
        slots = np.array([chunk.seq.batch_slot for chunk in chunks], np.int64)
        sent = upload({"last": last, "slots": slots}, device)
        self._device_tokens[sent["slots"]] = tokens[sent["last"]]
        return PendingTokens.send(torch.cat((tokens, fault)), sampled)

    def check_faults(self, word: int | None = None) -> None:
        """Raise RankLost when a kernel gave up waiting for a rank; ``word`` is the fault word where it is known."""
        if self.faults is not None:
            raise_lost(int(self.faults.word) if word is None else word, self.grid)

    def forward(
        self,
        step: StepRows,
        local: LocalRows,
        chunks: list[Chunk] | None = None,
        *,
        repeat: int = 1,
        wanted: IntArray | None = None,
    ) -> torch.Tensor:
        """Run the layers over a step's rows as they are, without a graph, and return their hidden states.

        Collective over the world.

        ``chunks``: whose they are; None where they are nobody's.
        ``repeat``: attend so often to each filling of a workspace, to take the memory of more than there are.
        ``wanted``: rows whose states are returned; None for all, as the layer that predicts one token further needs.
        """
        beside: dict[str, npt.NDArray[np.generic]] = {}
        if self.next_states is not None:
            nothing = np.zeros(step.num_rows, np.int64)
            before, keep = (nothing, nothing) if chunks is None else self.next_states.take(chunks)
            beside = {"before": before, "keep": keep}
        if self.decoder.states is not None:
            kept = [() if each.kept is None else each.kept.on_the_way for each in chunks or ()]
            beside |= arrays_of_cuts(step.query_start, None if chunks is None else kept)
        given = self._sender.send(step, local, self.cache, repeat=repeat, beside=beside)
        token_ids, rows = given.token_ids, given.rows
        if (step.token_ids < 0).any():
            token_ids = torch.where(token_ids < 0, self._device_tokens[rows.row_seq.long()], token_ids)
        longest = int(step.counts.max())  # longer than what decodes or verifies is a prompt's
        few = None
        if wanted is not None:
            few = self._sender.send_wanted(step, local, self.cache, wanted, expands=bool(given.fillings))
        hidden = self.decoder.forward(
            token_ids, rows, self.cache.layers, self.exchange, given.share, fillings=given.fillings,
            chunk=longest > MAX_ROWS, longest=longest, wanted=few,
            cuts=None if self.decoder.states is None else self.decoder.states.cuts_of(given.beside),
        )  # fmt: skip
        if self.next_states is not None:
            self.next_states.follow(
                token_ids, hidden, rows, given.beside["before"], given.beside["keep"], cache=self.cache,
                chunk=longest > MAX_ROWS,
            )  # fmt: skip
        return hidden


def _choosing_rows(chunks: list[Chunk], stops: Iterable[int]) -> list[int]:
    """Return the rows that choose tokens: the last ones of each chunk, which end before ``stops``."""
    rows: list[int] = []
    for chunk, stop in zip(chunks, stops, strict=False):
        rows += range(stop - chunk.num_choices, stop)
    return rows
