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

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention.exchange import Exchange
from attention.rows import Rows, Work
from attention.work import Cutting, cut
from parallel.symmetric import Faults

from .cache.pages import PagedCache
from .compile_ahead import compile_ahead
from .models.decoder import Decoder
from .next_states import NextStates
from .upload import Packing, Shapes, fill_work, upload, work_shapes

_log = logging.getLogger(__name__)
_ROW_INPUTS: dict[str, tuple[type[np.generic], int]] = {  # of each row, and what padding has
    "token_ids": (np.int64, 0),
    "positions": (np.int64, -1),  # by which state layers know it
    "slot": (np.int64, -1),
    "visible_len": (np.int32, 0),
    "before": (np.int64, 0),
    "keep": (np.int64, 0),
}
STAGES = 4
"""Steps whose inputs or outputs may be in flight."""
Choose = Callable[[int], torch.Tensor]


def buckets_up_to(max_batch: int) -> list[int]:
    """Return the captured batch sizes: powers of two, and max_batch."""
    sizes = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*sizes, max_batch]


@dataclass(frozen=True)
class DecodeRows:
    """A decode step's rows on the host, int64 [R] each; rows of one sequence are neighbours and ascend in position.

    A token id of -1 means: the token that the device chose last for this batch slot; -2 its first draft, and so on.

    Attributes:
        counts: int64 [B], the rows of each sequence.
        before, keep: what ``NextStates`` gives; None where there is no layer that asks for it.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    row_seq: npt.NDArray[np.int64]
    visible_len: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64] | None = None
    keep: npt.NDArray[np.int64] | None = None

    @classmethod
    def none(cls) -> DecodeRows:
        """Return no rows."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, nothing, nothing, nothing, nothing)

    def fill(self, inputs: Mapping[str, npt.NDArray[np.generic]], run_len: int, padding_slot: int) -> None:
        """Write the rows into a graph's inputs: each sequence's at the end of its run, padding everywhere else."""
        stops = np.cumsum(self.counts)
        run_stops = np.arange(1, len(self.counts) + 1) * run_len
        places = np.arange(len(self.token_ids)) + np.repeat(run_stops - stops, self.counts)
        for name, (_, padding) in _ROW_INPUTS.items():
            inputs[name][...] = padding
            given = getattr(self, name)
            if given is not None:
                inputs[name][places] = given
        inputs["row_seq"][...] = padding_slot
        inputs["row_seq"][: len(self.counts) * run_len] = np.repeat(self.row_seq[stops - 1], run_len)  # one page table


@dataclass(frozen=True)
class PendingTokens:
    """Greedy tokens of a launched step, on their way to the host.

    Attributes:
        host: int64, the tokens of all rows of the graph, then the word in which its kernels noted a fault.
        done: when they are there; None where they are already.
        rows: which rows are wanted.
        on_device: the next step may ask the device for them.
    """

    host: torch.Tensor
    done: torch.cuda.Event | None
    rows: list[int]
    on_device: bool = True

    @classmethod
    def send(cls, output: torch.Tensor) -> PendingTokens:
        """Send a step's tokens and fault word, computed on the current stream, to the host."""
        if not output.is_cuda:
            return cls(output, None, list(range(len(output) - 1)))
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        host.copy_(output, non_blocking=True)
        done = torch.cuda.current_stream(output.device).record_event()
        return cls(host, done, list(range(len(output) - 1)))

    def wait(self) -> tuple[list[int], int]:
        """Wait for the step; return the tokens of the wanted rows, and the fault word (0: none)."""
        if self.done is not None:
            self.done.synchronize()
        tokens = self.host.tolist()
        return [tokens[row] for row in self.rows], int(tokens[-1])


def capture(graph: torch.cuda.CUDAGraph, pool: Any, step: Callable[[], None]) -> None:
    """Run a step once, and capture it with memory of a pool."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        step()


class StepGraph:
    """A graph of ``num_runs`` runs of ``run_len`` rows, its inputs and outputs.

    Up to ``stages`` steps of it may be in flight. Without ``captured`` it runs as it is written.
    """

    def __init__(
        self, num_runs: int, run_len: int, device: torch.device, cutting: Cutting | None, *, stages: int, captured: bool
    ) -> None:
        self.num_runs, self.run_len, self.num_rows, self.cutting = num_runs, run_len, num_runs * run_len, cutting
        on_gpu = device.type == "cuda"
        shapes: Shapes = {name: (kind, (self.num_rows,)) for name, (kind, _) in _ROW_INPUTS.items()}
        shapes = {**shapes, "row_seq": (np.int32, (self.num_rows,))}
        if cutting is not None:
            shapes = {**shapes, **work_shapes(cutting, num_runs, run_len)}
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
        if self.cutting is not None:
            work = cut(
                inputs["visible_len"].astype(np.int64),
                self._query_start,
                inputs["row_seq"].astype(np.int64),
                self.cutting,
            )
            fill_work(inputs, work)
        return self.staging[stage]

    @property
    def work(self) -> Work | None:
        """The work list among the inputs."""
        if self.cutting is None:
            return None
        inputs = self.inputs
        most_parts = inputs["pieces"].shape[0] * min(self.run_len, self.cutting.tile_rows)
        return Work(self.cutting, inputs["pieces"], inputs["span_start"], inputs["part_start"], most_parts)


class StepGraphs(ABC):
    """Steps of given sizes, captured once and launched again and again.

    Collective over the world: every rank captures and launches in the same order.

    Args:
        decoder, exchange, cache: what a step runs on; captured by address, so none may be replaced afterwards.
        page_table: [max_batch, P] int32, the runner's own; of padding rows, which see nothing, nothing is read.
        faults: where kernels note waits that they gave up; None where none waits.
        stages: launches in flight, one more than may be waited for at a time.
        captured: on CUDA, capture graphs; else steps run as they are written.

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
    ) -> None:
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
                self._decoder.cutting(self._cache.layers[0], max_rows=size[1]),
                stages=self._stages,
                captured=self._captured,
            )
            for size in sorted(sizes)
        ]
        with compile_ahead(device) as ahead:
            for graph in self.graphs if ahead else ():
                self._fill_with_nothing(graph)
                self._step(graph)
        for graph in sorted(self.graphs, key=lambda graph: -graph.num_rows):  # the smaller ones find its memory
            if graph.graph is not None:
                self._fill_with_nothing(graph)
                capture(graph.graph, self.pool, partial(self._step, graph))

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
        return Rows(
            positions=graph.inputs["positions"],
            row_seq=graph.inputs["row_seq"],
            visible_len=graph.inputs["visible_len"],
            slot=graph.inputs["slot"],
            page_table=self._page_table,
            query_start=graph.query_start,
            work=graph.work,
        )

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
        decoder, exchange, cache, page_table, faults: as there.
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
    ) -> None:
        super().__init__(decoder, exchange, cache, page_table, faults=faults)
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
