"""Whole-step CUDA graphs for decode: one row a sequence, one graph a batch bucket.

Everything that changes between steps is data: token ids, positions, lengths and slots are copied into the graph's own
inputs. A row's token may come from the device, where the graph leaves the tokens that it chose, so a step can be
launched before the host has read the one before it. Padding rows see nothing and store nothing.

All ranks capture the same buckets in the same order, and replay the same bucket at every step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from attention.exchange import Exchange
from attention.rows import Rows
from parallel.symmetric import Faults

from .cache.pages import PagedCache
from .models.decoder import Decoder

_log = logging.getLogger(__name__)
_STAGES = 4  # steps whose inputs or outputs may be in flight


def buckets_up_to(max_batch: int) -> list[int]:
    """Return the captured batch sizes: powers of two, and max_batch."""
    sizes = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*sizes, max_batch]


@dataclass(frozen=True)
class DecodeRows:
    """A decode step's rows on the host, one a sequence, int64 [B] each.

    A token id of -1 means: the token that the device chose last for this batch slot.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    row_seq: npt.NDArray[np.int64]
    visible_len: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PendingTokens:
    """Tokens of a launched step, on their way to the host.

    Attributes:
        host: int64, a token a row, and last the word in which the step's kernels noted a fault.
        done: when they are there; None where they are already.
        num_rows: the rows that are no padding.
    """

    host: torch.Tensor
    done: torch.cuda.Event | None
    num_rows: int

    @classmethod
    def send(cls, output: torch.Tensor) -> PendingTokens:
        """Send a step's tokens and fault word, computed on the current stream, to the host."""
        if not output.is_cuda:
            return cls(output, None, len(output) - 1)
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        host.copy_(output, non_blocking=True)
        return cls(host, torch.cuda.current_stream(output.device).record_event(), len(output) - 1)

    def wait(self) -> tuple[list[int], int]:
        """Wait for the step; return its greedy tokens, and the word in which its kernels noted a fault (0: none)."""
        if self.done is not None:
            self.done.synchronize()
        *tokens, fault = self.host.tolist()
        return tokens[: self.num_rows], int(fault)


class _Graph:
    """One bucket's graph and its inputs and outputs."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.inputs = torch.zeros((5, size), dtype=torch.int64, device=device)
        self.staging = [torch.zeros((5, size), dtype=torch.int64, pin_memory=True) for _ in range(_STAGES)]
        self.results = [torch.zeros(size + 1, dtype=torch.int64, pin_memory=True) for _ in range(_STAGES)]
        self.query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.local_logits: torch.Tensor
        self.output: torch.Tensor


class DecodeGraphs:
    """The captured decode steps of one rank.

    Collective over the world: every rank captures and replays in the same order.

    Args:
        decoder, exchange, cache: what a step runs on; captured by address, so none may be replaced afterwards.
        page_table: [max_batch, P] int32, the runner's own; of padding rows, which see nothing, nothing is read.
        block_size: tokens a page.
        faults: where kernels note waits that they gave up.
        max_batch: the largest bucket.
    """

    def __init__(
        self,
        decoder: Decoder,
        exchange: Exchange,
        cache: PagedCache,
        page_table: torch.Tensor,
        *,
        block_size: int,
        faults: Faults,
        max_batch: int,
    ) -> None:
        self._decoder, self._exchange, self._cache, self._page_table = decoder, exchange, cache, page_table
        self._longest = min(page_table.shape[1], cache.layers[0].shape[0]) * block_size
        self._faults = faults
        device = decoder.device
        self._last_tokens = torch.zeros(max_batch + 1, dtype=torch.int64, device=device)  # the last is padding's
        self._padding_slot = max_batch
        self._launches = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = [_Graph(size, device) for size in buckets_up_to(max_batch)]
        for graph in reversed(self._graphs):  # the largest first: the smaller ones find its memory
            self._capture(graph)
        _log.info("captured decode graphs for batches of %s", ", ".join(str(graph.size) for graph in self._graphs))

    def launch(self, rows: DecodeRows) -> PendingTokens:
        """Launch a step on the current stream; its greedy tokens stay on the device for the next one.

        At most 3 launched steps may be waited for at a time.
        """
        num_rows = len(rows.token_ids)
        graph = next(each for each in self._graphs if each.size >= num_rows)
        stage = self._launches % _STAGES
        self._launches += 1
        staging = graph.staging[stage].numpy()
        staging[:, num_rows:] = np.array([[0], [0], [-1], [self._padding_slot], [0]])
        staging[:, :num_rows] = (rows.token_ids, rows.positions, rows.slot, rows.row_seq, rows.visible_len)
        graph.inputs.copy_(graph.staging[stage], non_blocking=True)
        graph.graph.replay()
        graph.results[stage].copy_(graph.output, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._last = graph
        return PendingTokens(graph.results[stage], done, num_rows)

    def logits(self, num_rows: int) -> torch.Tensor:
        """Return the float32 logits [B, V] of the step launched last. Collective over the world."""
        return self._decoder.gather_logits(self._last.local_logits[:num_rows])

    def _capture(self, graph: _Graph) -> None:
        graph.inputs.copy_(
            torch.tensor([[0], [0], [-1], [self._padding_slot], [0]], dtype=torch.int64).expand(5, graph.size)
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(graph)  # compiles every kernel before the capture
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            self._step(graph)

    @torch.inference_mode()
    def _step(self, graph: _Graph) -> None:
        token_ids, positions, slot, row_seq, visible_len = graph.inputs.unbind(0)
        rows = Rows(
            positions=positions,
            row_seq=row_seq.to(torch.int32),
            visible_len=visible_len.to(torch.int32),
            slot=slot,
            page_table=self._page_table,
            query_start=graph.query_start,
            max_rows=1,
            max_visible_len=self._longest,
        )
        hidden = self._decoder.forward(token_ids, rows, self._cache.layers, self._exchange, chosen=self._last_tokens)
        graph.local_logits = self._decoder.local_logits(hidden)
        tokens = self._decoder.greedy(graph.local_logits)
        self._last_tokens[row_seq] = tokens
        graph.output = torch.cat((tokens, self._faults.word.to(torch.int64)))
