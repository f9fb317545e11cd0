"""The rows of a decode step on the host, and the inputs of a graph that they are written into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .batch import WindowRows
from .upload import WINDOW_PREFIX

ROW_INPUTS: dict[str, tuple[type[np.generic], int]] = {  # of each row, and what padding has
    "token_ids": (np.int64, 0),
    "positions": (np.int64, -1),  # by which state layers know it
    "slot": (np.int64, -1),
    "visible_len": (np.int32, 0),
    "before": (np.int64, 0),
    "keep": (np.int64, 0),
}
WINDOW_INPUTS: dict[str, tuple[type[np.generic], int]] = {  # the same, of models with windows
    WINDOW_PREFIX + "slot": (np.int64, -1),
    WINDOW_PREFIX + "visible_len": (np.int32, 0),
    WINDOW_PREFIX + "visible_from": (np.int32, 0),
}


@dataclass(frozen=True)
class DecodeRows:
    """A decode step's rows on the host, int64 [R] each; rows of one sequence are neighbours and ascend in position.

    A token id of -1 means: the token that the device chose last for this batch slot; -2 its first draft, and so on.

    Attributes:
        counts: int64 [B], the rows of each sequence.
        before, keep: what ``NextStates`` gives; None where there is no layer that asks for it.
        window: what layers with a window see of them; None where there are none, or no rows.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    row_seq: npt.NDArray[np.int64]
    visible_len: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64] | None = None
    keep: npt.NDArray[np.int64] | None = None
    window: WindowRows | None = None

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
        given = {name: getattr(self, name) for name in ROW_INPUTS} | (self.window.arrays if self.window else {})
        for name, (_, padding) in (ROW_INPUTS | WINDOW_INPUTS).items():
            if name not in inputs:
                continue
            inputs[name][...] = padding
            if given.get(name) is not None:
                inputs[name][places] = given[name]
        inputs["row_seq"][...] = padding_slot
        inputs["row_seq"][: len(self.counts) * run_len] = np.repeat(self.row_seq[stops - 1], run_len)  # one page table
