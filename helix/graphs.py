"""Whole-step CUDA graphs for decode: one graph a batch bucket, and one a pair of batch bucket and draft length.

Everything that changes between steps is data: token ids, positions, lengths, slots and the work list of attention are
copied into the graph's own inputs, by one copy. A row's token may come from the device, where the graph leaves the
tokens that it chose, so a step can be launched before the host has read the one before it. Padding rows see nothing and
store nothing.

A graph has equally many rows for each sequence, its run: one for plain decode, 1 + draft length for verification. A
sequence with fewer rows has padding at the head of its run, so that the last row of every run is real and chooses the
token that the device keeps for the sequence.

All ranks capture the same graphs in the same order, and replay the same one at every step. Without CUDA a step runs as
it is written, on the same inputs and outputs, so that all but the capture itself is tested there.
"""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from attention.exchange import Exchange
from attention.rows import Rows, Work
from attention.work import Cutting, cut
from parallel.symmetric import Faults

from .cache.pages import PagedCache
from .compile_ahead import compile_ahead
from .decode_rows import ROW_INPUTS, WINDOW_INPUTS, DecodeRows
from .logprobs import SampledTokens
from .models.decoder import Decoder
from .models.unlike import one_of_each_layer
from .next_states import NextStates
from .upload import WINDOW_PREFIX, Packing, Shapes, fill_work, on_its_way, upload, window_rows, work_shapes

_log = logging.getLogger(__name__)
STAGES = 4
"""Steps whose inputs or outputs may be in flight."""
Choose = Callable[[int], torch.Tensor]


def buckets_up_to(max_batch: int) -> list[int]:
    """Return the captured batch sizes: powers of two, and max_batch."""
    sizes = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*sizes, max_batch]


@dataclass(frozen=True)
class PendingTokens:
    """The tokens that a launched step chose, on their way to the host.

    Attributes:
        host: int64, the tokens of all its rows that may choose, then the word in which kernels noted a fault.
        done: when they are there; None where they are already.
        rows: which rows are wanted.
        sampled: the same tokens with log-probabilities, on their way too; None where no row asks for these.
    """

    host: torch.Tensor
    done: torch.cuda.Event | None
    rows: list[int]
    sampled: SampledTokens | None = None

    @classmethod
    def send(cls, output: torch.Tensor, sampled: SampledTokens | None = None) -> PendingTokens:
        """Send a step's tokens and fault word, computed on the current stream, to the host; log-probabilities, too."""
        host, sampled = on_its_way(output), None if sampled is None else sampled.on_its_way
        done = torch.cuda.current_stream(output.device).record_event() if output.is_cuda else None
        return cls(host, done, list(range(len(output) - 1)), sampled)

    def wait(self) -> tuple[list[int], int]:
        """Wait for the step; return the tokens of the wanted rows, and the fault word (0: none)."""
        if self.done is not None:
            self.done.synchronize()
        tokens = self.host.tolist()
        return [tokens[row] for row in self.rows], int(tokens[-1])


@dataclass(frozen=True)
class Cuttings:
    """How a graph's steps are cut: for full layers, and for those with a window, whose pages have so many tokens.

    None where no work list is read; block_size of 0 where the steps have no layer with a window.
    """

    full: Cutting | None
    window: Cutting | None = None
    block_size: int = 0

    @property
    def by_prefix(self) -> dict[str, Cutting]:
        """Those that there are, by the prefix of their inputs' names."""
        both = ("", self.full), (WINDOW_PREFIX, self.window)
        return {prefix: cutting for prefix, cutting in both if cutting is not None}


def capture(graph: torch.cuda.CUDAGraph, pool: Any, step: Callable[[], None]) -> None:
    """Run a step once, and capture it with memory of a pool.

    Python collects no garbage meanwhile: freeing the graphs of an LLM that was dropped is a call that ends a capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    finally:
        if collects:
            gc.enable()


class StepGraph:
    """A graph of ``num_runs`` runs of ``run_len`` rows, its inputs and outputs.

    Up to ``stages`` steps of it may be in flight. Without ``captured`` it runs as it is written.
    """

    def __init__(
        self, num_runs: int, run_len: int, device: torch.device, cuttings: Cuttings, *, stages: int, captured: bool
    ) -> None:
        self.num_runs, self.run_len, self.num_rows, self.cuttings = num_runs, run_len, num_runs * run_len, cuttings
        on_gpu = device.type == "cuda"
        inputs = ROW_INPUTS | (WINDOW_INPUTS if cuttings.block_size else {})
        shapes: Shapes = {name: (kind, (self.num_rows,)) for name, (kind, _) in inputs.items()}
        shapes = {**shapes, "row_seq": (np.int32, (self.num_rows,))}
        for prefix, cutting in cuttings.by_prefix.items():
            shapes = {**shapes, **work_shapes(cutting, num_runs, run_len, prefix)}
        packing = Packing(shapes)
        self.buffer = packing.buffer(device)
        self.inputs = packing.tensors(self.buffer)
        cpu = torch.device("cpu")
        self.staging = [packing.buffer(cpu, pinned=on_gpu) for _ in range(stages)]
        self.staged = [packing.arrays(buffer) for buffer in self.staging]
        self.results = [torch.zeros(self.num_rows + 1, dtype=torch.int64, pin_memory=on_gpu) for _ in range(stages)]
        self._query_start = np.arange(0, self.num_rows + 1, run_len)
        self.query_start = torch.arange(0, self.num_rows + 1, run_len, dtype=torch.int32, device=device)
        self.graph = torch.cuda.CUDAGraph() if on_gpu and captured else None
        self.local_logits: torch.Tensor
        self.output: torch.Tensor

    def fill(self, stage: int, rows: DecodeRows, padding_slot: int) -> torch.Tensor:
        """Write a step's rows and work into a stage on the host, and return it."""
        inputs = self.staged[stage]
        rows.fill(inputs, self.run_len, padding_slot)
        for prefix, cutting in self.cuttings.by_prefix.items():
            seen_from = inputs[f"{prefix}visible_from"].astype(np.int64) if prefix else None
            work = cut(
                inputs[f"{prefix}visible_len"].astype(np.int64),
                self._query_start,
                inputs["row_seq"].astype(np.int64),
                cutting,
                seen_from,
                self.cuttings.block_size or 1,
            )
            fill_work(inputs, work, prefix)
        return self.staging[stage]

    def work(self, prefix: str = "") -> Work | None:
        """Return the work list among the inputs: of full layers, or by WINDOW_PREFIX of those with a window."""
        cutting = self.cuttings.by_prefix.get(prefix)
        if cutting is None:
            return None
        names = ("pieces", "span_start", "part_start")
        pieces, span_start, part_start = (self.inputs[prefix + name] for name in names)
        return Work(cutting, pieces, span_start, part_start, pieces.shape[0] * min(self.run_len, cutting.tile_rows))


class StepGraphs(ABC):
    """Steps of given sizes, captured once and launched again and again.

    Collective over the world: every rank captures and launches in the same order.

    Args:
        decoder, exchange, cache: what a step runs on; captured by address, so none may be replaced afterwards.
        page_table: [max_batch, P] int32, the runner's own; of padding rows, which see nothing, nothing is read.
        faults: where kernels note waits that they gave up; None where none waits.
        stages: launches in flight, one more than may be waited for at a time.
        captured: on CUDA, capture graphs; else steps run as they are written.
        window_table: [max_batch, P] int32, of the pages of layers with a window; None where a step has none.

    Attributes:
        graphs: of each size.
        pool: the memory that they share; None without CUDA.
    """

    def __init__(
        self,
        decoder: Decoder,
        exchange: Exchange,
        cache: PagedCache,
        page_table: torch.Tensor,
        *,
        faults: Faults | None,
        stages: int = STAGES,
        captured: bool = True,
        window_table: torch.Tensor | None = None,
    ) -> None:
        self._window_table = window_table
        self._decoder, self._exchange, self._cache, self._page_table = decoder, exchange, cache, page_table
        self._faults, self._stages, self._captured = faults, stages, captured
        self._padding_slot = page_table.shape[0]
        self._launches = 0
        self.graphs: list[StepGraph] = []
        self.pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    def _make(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Make the graphs of runs and rows of each, ascending, and capture them."""
        device = self._decoder.device
        self.graphs = [
            StepGraph(
                *size,
                device,
                self._cuttings(size[1]),
                stages=self._stages,
                captured=self._captured,
            )
            for size in sorted(sizes)
        ]
        with compile_ahead(device) as ahead, one_of_each_layer(self._decoder):
            for graph in self.graphs if ahead else ():
                self._fill_with_nothing(graph)
                self._step(graph)
        for graph in sorted(self.graphs, key=lambda graph: -graph.num_rows):  # the smaller ones find its memory
            if graph.graph is not None:
                self._fill_with_nothing(graph)
                capture(graph.graph, self.pool, partial(self._step, graph))

    def _cuttings(self, max_rows: int) -> Cuttings:
        layers = self._cache.layers
        full = self._decoder.cutting(layers[0], max_rows=max_rows) if layers else None
        if self._window_table is None:
            return Cuttings(full)
        return Cuttings(full, self._decoder.window_cutting(max_rows=max_rows), self._cache.layout.block_size)

    def launch(
        self, graph: StepGraph, rows: DecodeRows, wanted: list[int], choose: Choose | None = None
    ) -> PendingTokens:
        """Launch a step on the current stream; the tokens that it chose stay on the device for the next one.

        They are the greedy ones, or those that ``choose`` launches the choice of: it is given the step's stage, and
        returns an output as the graph's. ``wanted`` are the graph's rows whose tokens the host asks for. Fewer launched
        steps than there are stages may be waited for at a time.
        """
        stage = self._launches % self._stages
        self._launches += 1
        graph.buffer.copy_(graph.fill(stage, rows, self._padding_slot), non_blocking=True)
        done = None
        if graph.graph is None:
            self._step(graph)
        else:
            graph.graph.replay()
        output = graph.output if choose is None else choose(stage)
        graph.results[stage].copy_(output, non_blocking=graph.graph is not None)
        if graph.graph is not None:
            done = torch.cuda.Event()
            done.record()
        return PendingTokens(graph.results[stage], done, wanted)

    def release(self) -> None:
        """Free the captured graphs: before NCCL ends a group it waits for all that hold its operations, for ever."""
        for graph in self.graphs:
            if graph.graph is not None:
                torch.cuda.synchronize()
                graph.graph.reset()

    def _fill_with_nothing(self, graph: StepGraph) -> None:
        graph.buffer.copy_(graph.fill(0, DecodeRows.none(), self._padding_slot))

    def _rows(self, graph: StepGraph) -> Rows:
        rows = Rows(
            positions=graph.inputs["positions"],
            row_seq=graph.inputs["row_seq"],
            visible_len=graph.inputs["visible_len"],
            slot=graph.inputs["slot"],
            page_table=self._page_table,
            query_start=graph.query_start,
            work=graph.work(),
        )
        if self._window_table is None:
            return rows
        work = graph.work(WINDOW_PREFIX)
        return replace(rows, window=window_rows(rows, graph.inputs, self._window_table, work))

    def _output(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a step's tokens, and behind them the word in which kernels noted a fault."""
        word = tokens.new_zeros(1) if self._faults is None else self._faults.word.to(torch.int64)
        return torch.cat((tokens, word))

    @abstractmethod
    def _step(self, graph: StepGraph) -> None:
        """Compute a step of a graph's inputs, and set its ``output``."""


class DecodeGraphs(StepGraphs):
    """The captured decode steps of one rank; see ``StepGraphs``.

    Args:
        decoder, exchange, cache, page_table, faults, window_table: as there.
        drafts: the pairs (batch bucket, draft length) to capture beside the steps without drafts.
        states: what the layer that predicts one token further needs of every step; None without one.

    Attributes:
        last_tokens: int64 [max_batch + 1], the token that was chosen last for each batch slot; a launch writes the
            greedy ones.
    """

    def __init__(
        self,
        decoder: Decoder,
        exchange: Exchange,
        cache: PagedCache,
        page_table: torch.Tensor,
        *,
        faults: Faults,
        drafts: Iterable[tuple[int, int]] = (),
        states: NextStates | None = None,
        window_table: torch.Tensor | None = None,
    ) -> None:
        super().__init__(decoder, exchange, cache, page_table, faults=faults, window_table=window_table)
        max_batch = page_table.shape[0]
        self._states = states
        self._chosen = torch.zeros((1, max_batch + 1), dtype=torch.int64, device=decoder.device)
        if states is not None:
            self._chosen = states.chosen
        self.last_tokens = self._chosen[0]  # the last is padding's
        self._make([(size, 1) for size in buckets_up_to(max_batch)] + [(size, 1 + length) for size, length in drafts])
        names = [f"{graph.num_runs} x {graph.run_len}" for graph in self.graphs]
        _log.info("captured decode graphs of sequences x rows %s", ", ".join(names))

    def find(self, num_runs: int, longest: int) -> StepGraph | None:
        """Return the graph for so many sequences of at most ``longest`` rows: the bucket's shortest runs that do."""
        bucket = next(graph.num_runs for graph in self.graphs if graph.num_runs >= num_runs)
        return next((each for each in self.graphs if each.num_runs == bucket and each.run_len >= longest), None)

    def launch(
        self, graph: StepGraph, rows: DecodeRows, wanted: list[int], choose: Choose | None = None
    ) -> PendingTokens:
        """Launch a step; see ``StepGraphs``."""
        self._last = graph
        return super().launch(graph, rows, wanted, choose)

    def local_logits(self, rows: list[int]) -> torch.Tensor:
        """Return this rank's slice of the logits of rows of the step launched last, [len(rows), V_local].

        They are right until the next step is launched.
        """
        local = self._last.local_logits
        whole = rows == list(range(len(rows)))
        index = slice(len(rows)) if whole else upload({"rows": np.array(rows, np.int64)}, local.device)["rows"]
        return local[index]

    @torch.inference_mode()
    def _step(self, graph: StepGraph) -> None:
        token_ids, row_seq = graph.inputs["token_ids"], graph.inputs["row_seq"]
        rows = self._rows(graph)
        chosen: torch.Tensor | None = self._chosen
        if not token_ids.is_cuda:
            on_device = self._chosen[(-1 - token_ids).clamp(0), row_seq.long()]
            token_ids, chosen = torch.where(token_ids < 0, on_device, token_ids), None
        hidden = self._decoder.forward(token_ids, rows, self._cache.layers, self._exchange, chosen=chosen)
        if self._states is not None:
            before, keep = graph.inputs["before"], graph.inputs["keep"]
            self._states.follow(token_ids, hidden, rows, before, keep, self._cache, chosen=chosen)
        graph.local_logits = self._decoder.local_logits(hidden)
        tokens = self._decoder.greedy(graph.local_logits)
        last = slice(graph.run_len - 1, None, graph.run_len)
        self.last_tokens[row_seq[last].long()] = tokens[last]
        graph.output = self._output(tokens)
