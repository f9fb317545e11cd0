"""Show how far a run is: a live bar on a terminal, a plain line now and then elsewhere. Rank 0 only.

A bar that is drawn anew wipes the lines above the cursor, whoever wrote them, so there is none beside output.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from helix.metrics import RunMetrics

LINE_EVERY_S = 10.0


class RunProgress:
    """A context manager whose ``update`` is called after every step.

    Args:
        enabled: False on ranks that do not speak.
        output_tokens: the most tokens the run can make, for the bar.
        prints: the run prints its output meanwhile: where that goes to a terminal, plain lines stand in for the bar.
    """

    def __init__(self, enabled: bool, output_tokens: int, *, prints: bool = False) -> None:
        console = Console(stderr=True)
        self._enabled = enabled
        self._output_tokens = output_tokens
        self._bar = (
            Progress(
                TextColumn("{task.description:8}"),
                BarColumn(),
                TextColumn("{task.completed} of {task.total} tokens"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                console=console,
            )
            if enabled and console.is_terminal and not (prints and sys.stdout.isatty())
            else None
        )
        self._next_line = time.monotonic() + LINE_EVERY_S

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._prefill = self._bar.add_task("prefill", total=0, rate="")
            self._decode = self._bar.add_task("decode", total=self._output_tokens, rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, metrics: RunMetrics) -> None:
        """Show the run's counters."""
        rate = f"{metrics.decode_tokens / metrics.elapsed_s:.1f} tokens/s" if metrics.elapsed_s else ""
        if self._bar is not None:
            self._bar.update(self._prefill, completed=metrics.prefill_tokens, total=metrics.prefill_total)
            self._bar.update(self._decode, completed=metrics.decode_tokens, rate=rate)
        elif self._enabled and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            print(
                f"prefill {metrics.prefill_tokens} of {metrics.prefill_total} tokens, "
                f"decode {metrics.decode_tokens} tokens, {rate}, {metrics.elapsed_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
