"""A table of page numbers that the host reads and the device too, which only new entries travel to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from .upload import upload


class Mirror:
    """A table [max_batch, P] of int32, zeros at first, that is the same on the host and on the device.

    Attributes:
        host: it, in NumPy; to be read alone.
        device: it, as steps see it that are launched after an entry was added.
    """

    def __init__(self, max_batch: int, width: int, device: torch.device) -> None:
        self.host: npt.NDArray[np.int32] = np.zeros((max_batch, width), np.int32)
        self.device = torch.zeros((max_batch, width), dtype=torch.int32, device=device)

    def write(self, entries: Iterable[tuple[int, int, list[int]]]) -> None:
        """Write runs of pages, each by its batch slot, first column and pages, by one copy in stream order."""
        slots, columns, pages = list[int](), list[int](), list[int]()
        for slot, first, new in entries:
            slots += [slot] * len(new)
            columns += range(first, first + len(new))
            pages += new
        if pages:
            where = np.array([slots, columns, pages], np.int64)
            self.host[where[0], where[1]] = where[2]
            sent = upload({"where": where}, self.device.device)["where"]
            self.device[sent[0], sent[1]] = sent[2].to(torch.int32)
