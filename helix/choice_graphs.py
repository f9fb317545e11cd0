"""The choice of a decode step's tokens as a small CUDA graph behind that of its forward: one for each decode graph.

How a row chooses is data, so a graph serves greedy rows, draws, filters and penalties side by side, and the host sends
a step's settings by one copy. It reads the logits that the forward's graph leaves, and writes what that one wrote: the
token that each batch slot chose last, and the step's output. Where ranks share the vocabulary there is a second one for
steps without filters, in which one key a row travels instead of its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from parallel.symmetric import Faults

from .choose_kernels import NO_TOP_K
from .compile_ahead import compile_ahead
from .graphs import STAGES, Choose, DecodeGraphs, StepGraph, capture
from .sampler import FixedChoices, Sampler
from .upload import Arrays, Packing, Shapes

_PADDING = {  # a greedy row without penalties
    "floats": np.array([[1], [1], [np.inf]], np.float32),
    "doubles": np.array(np.inf),
    "integers": np.array([[0], [NO_TOP_K], [0], [0]]),
    "slots": np.array(-1),
    "counting": np.array(-1),
    "amounts": np.array(1.0),
    "drafts": np.array(-1),
}
_BY_ROW = ("doubles", "slots", "counting")  # in the others but drafts rows are the last dim


class ChoiceGraph:
    """The choice of the tokens of a decode graph's rows: its inputs, as ``FixedChoices`` has them, and output.

    Attributes:
        output: [rows + 1] int64, the tokens, then the fault word.
    """

    def __init__(self, decode: StepGraph, filters: bool, device: torch.device) -> None:
        self.decode, self.filters = decode, filters
        rows = decode.num_rows
        shapes: Shapes = {
            "floats": (np.float32, (3, rows)),
            "doubles": (np.float64, (rows,)),
            "integers": (np.int64, (4, rows)),
            "slots": (np.int64, (rows,)),
            "counting": (np.int64, (rows,)),
            "amounts": (np.float64, (3, rows)),
            "drafts": (np.int64, (rows, decode.run_len - 1)),
        }
        packing = Packing(shapes)
        on_gpu = device.type == "cuda"
        self.buffer = packing.buffer(device)
        self.inputs = packing.tensors(self.buffer)
        self.staging = [packing.buffer(torch.device("cpu"), pinned=on_gpu) for _ in range(STAGES)]
        self.staged = [packing.arrays(buffer) for buffer in self.staging]
        self.graph = torch.cuda.CUDAGraph() if on_gpu else None
        self.output: torch.Tensor

    def fill(self, stage: int, arrays: Arrays | None = None, places: Sequence[int] = ()) -> torch.Tensor:
        """Write the settings of the rows at some places into a stage on the host, padding elsewhere, and return it."""
        inputs = self.staged[stage]
        for name, padding in _PADDING.items():
            inputs[name][...] = padding
        index = np.array(places, np.int64)
        for name, rows in ({} if arrays is None else arrays).items():
            if name == "drafts":
                inputs[name][index, : rows.shape[1]] = rows
            elif name in _BY_ROW:
                inputs[name][index] = rows
            else:
                inputs[name][:, index] = rows
        return self.staging[stage]


class ChoiceGraphs:
    """The captured choices of one rank. Collective over the world, as ``DecodeGraphs``.

    Args:
        graphs: the decode steps that they stand behind; captured by address.
        sampler: what chooses.
        faults: where kernels note waits that they gave up.
    """

    def __init__(self, graphs: DecodeGraphs, sampler: Sampler, *, faults: Faults) -> None:
        self._sampler, self._faults, self._last_tokens = sampler, faults, graphs.last_tokens
        device = graphs.last_tokens.device
        self._ways = (True,) if sampler.sees_all else (False, True)
        self._of = {
            (graph, filters): ChoiceGraph(graph, filters, device) for graph in graphs.graphs for filters in self._ways
        }
        for each in self._of.values():
            each.buffer.copy_(each.fill(0))
        with compile_ahead(device) as ahead:
            for each in self._of.values() if ahead else ():
                self._choose(each)
        for each in self._of.values():
            if each.graph is not None:
                capture(each.graph, graphs.pool, partial(self._choose, each))

    def of(self, graph: StepGraph, fixed: FixedChoices, places: Sequence[int]) -> Choose:
        """Return what launches the choice behind a decode graph, whose rows at ``places`` choose as ``fixed`` says."""
        each = self._of[graph, fixed.filters or len(self._ways) == 1]

        def choose(stage: int) -> torch.Tensor:
            each.buffer.copy_(each.fill(stage, fixed.arrays, places), non_blocking=True)
            if each.graph is None:
                self._choose(each)
            else:
                each.graph.replay()
            return each.output

        return choose

    def release(self) -> None:
        """Free the captured graphs; see ``DecodeGraphs.release``."""
        for each in self._of.values():
            if each.graph is not None:
                each.graph.reset()

    @torch.inference_mode()
    def _choose(self, each: ChoiceGraph) -> None:
        graph = each.decode
        tokens = self._sampler.choose_fixed(graph.local_logits, each.inputs, filters=each.filters)
        last = slice(graph.run_len - 1, None, graph.run_len)
        self._last_tokens[graph.inputs["row_seq"][last].long()] = tokens[last]
        each.output = torch.cat((tokens, self._faults.word.to(torch.int64)))
