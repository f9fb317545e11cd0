"""Run one step on this rank: turn the scheduler's chunks into rows, and rows into logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from attention.exchange import Exchange
from attention.fused_exchange import OPERATION as EXCHANGE
from attention.rows import Rows
from parallel.all_reduce_norm import OPERATION as ALL_REDUCE
from parallel.grid import HelixGrid
from parallel.placement import BlockCyclic, IntArray
from parallel.sharded_argmax import OPERATION as ARGMAX
from parallel.symmetric import Faults

from .cache.pages import PagedCache
from .cache.pool import BlockTable
from .graphs import DecodeGraphs, DecodeRows, PendingTokens
from .models.decoder import Decoder, RowShare
from .request import Chunk


@dataclass(frozen=True)
class _HostRows:
    """The rows of a step in NumPy, before they go to the device; the fields are those of ``Rows``."""

    token_ids: IntArray
    positions: IntArray
    row_seq: IntArray
    first_owner: IntArray
    query_start: IntArray


@dataclass(frozen=True)
class _LocalRows:
    """What one rank alone sees of a step's rows."""

    visible: IntArray
    slot: IntArray


@dataclass(frozen=True, slots=True)
class _UploadedTable:
    """What the device knows of a sequence's pages: of so many pages, this rank's own."""

    blocks: BlockTable | None = None
    num_pages: int = 0
    num_local: int = 0


class RankLost(RuntimeError):
    """A rank did not arrive where others waited for it; the message names it, the operation and the layer."""


class Runner:
    """Holds the device state of a rank between steps: page tables, pages, the model.

    Args:
        decoder: the rank's model.
        exchange: the exchange over the KVP group.
        cache: the rank's pages.
        placement: the rule of ownership.
        max_batch: rows of the page table.
        max_len: the longest sequence, in tokens.
        share_qkv_rows: steps of at least so many rows share the QKV projection; 0 is never.
        faults: where this rank's kernels note waits that they gave up; None where no kernel waits.

    Attributes:
        num_padding: rows that the last step computed for nobody, to fill its graph.
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
        faults: Faults | None = None,
    ) -> None:
        self.decoder, self.exchange, self.cache, self.placement = decoder, exchange, cache, placement
        self.grid: HelixGrid = decoder.grid
        self._share_qkv_rows = share_qkv_rows if self.grid.layout.kvp > 1 else 0
        width = -(-placement.num_blocks(max_len) // placement.kvp)
        self._page_table = torch.zeros((max_batch, width), dtype=torch.int32, device=decoder.device)
        self._host_table: npt.NDArray[np.int32] = np.zeros((max_batch, width), np.int32)
        self._tables: list[_UploadedTable] = [_UploadedTable()] * max_batch
        self._graphs: DecodeGraphs | None = None
        self._last_tokens = torch.zeros(max_batch, dtype=torch.int64, device=decoder.device)
        self.faults = faults
        self.num_padding = 0

    @property
    def max_batch(self) -> int:
        """The most sequences that a step may hold."""
        return self._page_table.shape[0]

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
            self._page_table,
            block_size=self.placement.block_size,
            faults=self.faults,
            max_batch=self.max_batch,
            drafts=drafts,
        )

    def release_graphs(self) -> None:
        """Free what ``capture`` captured; to be called before the world ends."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def run(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute a step and return the logits of the rows that choose tokens: float32 [sum of num_choices, V].

        Collective over the world: every rank calls it with the same chunks.
        """
        if self._graphs is not None and self.can_launch(chunks):
            return self._graphs.logits(self.launch(chunks).rows)
        self.num_padding = 0
        host = self._host_rows(chunks)
        self._upload_tables(chunks)
        hidden = self.decoder.forward(
            self._to_device(host.token_ids), self._rows(host), self.cache.layers, self.exchange, self._share(host)
        )
        choosing = _choosing_rows(chunks, host.query_start[1:].tolist())
        if not choosing:
            return hidden.new_empty((0, self.decoder.spec.vocab_size), dtype=torch.float32)
        rows = torch.tensor(choosing, dtype=torch.int64, device=hidden.device)
        return self.decoder.gather_logits(self.decoder.local_logits(hidden[rows]))

    def launch(self, chunks: list[Chunk]) -> PendingTokens:
        """Launch a step, from its graph where there are any; greedy tokens of the rows that choose come to the host.

        Collective over the world. ``can_launch`` must hold for the chunks; the token of one that is not known yet is
        the one that the last launched step chose for its batch slot. With graphs, nothing here waits for the device.
        """
        host = self._host_rows(chunks)
        self._upload_tables(chunks)
        if self._graphs is None:
            return self._launch_eagerly(host)
        graph = self._graphs.find(len(chunks), max(chunk.num_rows for chunk in chunks))
        assert graph is not None
        local = self._local_rows(host)
        rows = DecodeRows(
            host.token_ids, host.positions, local.slot, host.row_seq, local.visible, np.diff(host.query_start)
        )
        self.num_padding = graph.num_rows - len(host.token_ids)
        stops = range(graph.run_len, graph.num_rows + 1, graph.run_len)
        return self._graphs.launch(graph, rows, _choosing_rows(chunks, stops))

    def greedy(self, chunks: list[Chunk]) -> PendingTokens:
        """Launch a step whose chunks all choose a token, or compute it where no graph holds it.

        Collective over the world. Returns the greedy tokens of the rows that choose.
        """
        if self.can_launch(chunks):
            return self.launch(chunks)
        tokens = self.run(chunks).argmax(-1).cpu()
        return PendingTokens(torch.cat((tokens, tokens.new_zeros(1))), None, list(range(len(tokens))), on_device=False)

    def can_launch(self, chunks: list[Chunk]) -> bool:
        """Return whether ``launch`` can run these chunks: all choose tokens, and a graph holds their rows.

        Without graphs it runs those that choose one token each.
        """
        if not all(chunk.samples for chunk in chunks):
            return False
        most = max(chunk.num_rows for chunk in chunks)
        return most == 1 if self._graphs is None else self._graphs.find(len(chunks), most) is not None

    @torch.inference_mode()
    def _launch_eagerly(self, host: _HostRows) -> PendingTokens:
        self.num_padding = 0
        rows, token_ids = self._rows(host), self._to_device(host.token_ids)
        slots = rows.row_seq.long()
        token_ids = torch.where(token_ids < 0, self._last_tokens[slots], token_ids)
        hidden = self.decoder.forward(token_ids, rows, self.cache.layers, self.exchange, self._share(host))
        tokens = self._last_tokens[slots] = self.decoder.greedy(self.decoder.local_logits(hidden))
        fault = tokens.new_zeros(1) if self.faults is None else self.faults.word.long()
        return PendingTokens.send(torch.cat((tokens, fault)))

    def check_faults(self, word: int | None = None) -> None:
        """Raise RankLost when a kernel gave up waiting for a rank; ``word`` is the fault word where it is known."""
        if self.faults is None:
            return
        fault = Faults.decode(int(self.faults.word) if word is None else word)
        if fault is not None:
            group = self.grid.kvp_group if fault.operation == EXCHANGE else self.grid.world_group
            assert group is not None
            peer = dist.get_process_group_ranks(group)[fault.peer]
            what = {
                ALL_REDUCE: f"all-reduce of layer {fault.layer}",
                EXCHANGE: f"exchange of layer {fault.layer}",
                ARGMAX: "choice of tokens",
            }
            raise RankLost(f"rank {peer} never arrived at the {what[fault.operation]}")

    def warm_up(self, num_rows: int, num_choices: int) -> None:
        """Run a step of rows that see nothing and store nothing, and choose, so that its peak memory is known.

        Collective over the world.
        """
        nothing = np.zeros(num_rows, np.int64)
        host = _HostRows(nothing, nothing, nothing, nothing, np.array([0, num_rows]))
        rows = self._rows(host)
        rows.slot.fill_(-1)
        rows.visible_len.zero_()
        hidden = self.decoder.forward(
            self._to_device(host.token_ids), rows, self.cache.layers, self.exchange, self._share(host)
        )
        self.decoder.gather_logits(self.decoder.local_logits(hidden[:1].expand(num_choices, -1)))

    def _host_rows(self, chunks: list[Chunk]) -> _HostRows:
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.num_rows for chunk in chunks])
        query_start = np.concatenate(([0], counts.cumsum()))
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.seq.token_ids[chunk.start : chunk.stop] or [-1]  # -1: not known yet
            tokens += chunk.drafts
        return _HostRows(
            token_ids=np.array(tokens),
            positions=np.arange(len(tokens)) + np.repeat(starts - query_start[:-1], counts),
            row_seq=np.repeat(np.array([chunk.seq.batch_slot for chunk in chunks]), counts),
            first_owner=np.repeat(np.array([chunk.seq.blocks.first_owner for chunk in chunks]), counts),
            query_start=query_start,
        )

    def _local_rows(self, host: _HostRows) -> _LocalRows:
        """Return what this rank alone sees of the rows."""
        place, me = self.placement, self.grid.kvp_rank
        at = place.local_position(host.positions)
        mine = place.owner(host.positions, host.first_owner) == me
        page = self._host_table[host.row_seq, np.where(mine, at // place.block_size, 0)].astype(np.int64)
        return _LocalRows(
            visible=place.local_len(host.positions + 1, me, host.first_owner),
            slot=np.where(mine, page * place.block_size + at % place.block_size, -1),
        )

    def _rows(self, host: _HostRows) -> Rows:
        local = self._local_rows(host)
        return Rows(
            positions=self._to_device(host.positions),
            row_seq=self._to_device(host.row_seq.astype(np.int32)),
            visible_len=self._to_device(local.visible.astype(np.int32)),
            slot=self._to_device(local.slot),
            page_table=self._page_table,
            query_start=self._to_device(host.query_start.astype(np.int32)),
            max_rows=int(np.diff(host.query_start).max()),
            max_visible_len=int(local.visible.max()),
        )

    def _share(self, host: _HostRows) -> RowShare | None:
        """Divide the rows of a large step by owner; None for small steps. The same decision on every rank."""
        num_rows = len(host.positions)
        if not self._share_qkv_rows or num_rows < self._share_qkv_rows:
            return None
        owner = self.placement.owner(host.positions, host.first_owner)
        kvp = self.placement.kvp
        counts = np.bincount(owner, minlength=kvp)
        longest = int(counts.max())
        by_owner = np.argsort(owner, kind="stable")
        starts = np.cumsum(counts) - counts
        order = np.empty(num_rows, np.int64)
        order[by_owner] = np.arange(num_rows) - np.repeat(starts, counts) + np.repeat(np.arange(kvp) * longest, counts)
        me = self.grid.kvp_rank
        mine = np.zeros(longest, np.int64)
        mine[: counts[me]] = by_owner[starts[me] : starts[me] + counts[me]]
        return RowShare(self._to_device(mine), int(counts[me]), self._to_device(order))

    def _upload_tables(self, chunks: list[Chunk]) -> None:
        """Bring the page table up to date: only pages that it does not have yet travel."""
        slots: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
            slot, blocks = chunk.seq.batch_slot, chunk.seq.blocks
            table = self._tables[slot]
            if table.blocks is blocks and table.num_pages == len(blocks.pages):
                continue
            known = table.num_local if table.blocks is blocks else 0
            new = blocks.local_pages(self.grid.kvp_rank, self.placement.kvp, start=known)
            self._tables[slot] = _UploadedTable(blocks, len(blocks.pages), known + len(new))
            slots += [slot] * len(new)
            columns += range(known, known + len(new))
            pages += new
        if pages:
            self._host_table[slots, columns] = pages
            where = self._to_device(np.array([slots, columns, pages], np.int64))
            self._page_table[where[0], where[1]] = where[2].to(torch.int32)

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy to the device in stream order; from memory that is not pinned the host would wait for the stream."""
        host = torch.from_numpy(array)
        if self.decoder.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.decoder.device, non_blocking=True)


def _choosing_rows(chunks: list[Chunk], stops: Iterable[int]) -> list[int]:
    """Return the rows that choose tokens: the last ones of each chunk, which end before ``stops``."""
    rows: list[int] = []
    for chunk, stop in zip(chunks, stops, strict=False):
        rows += range(stop - chunk.num_choices, stop)
    return rows
