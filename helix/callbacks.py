"""What callers hand in to be called between steps: progress, listeners.

Each rank has its own, so what one raises is seen by one rank alone, in the middle of decisions that all ranks take
alike: in the loop it would leave the others waiting in a collective. So it is logged with its traceback, and the one
that raised is called no more; the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")
_log = logging.getLogger(__name__)


class Callback(Generic[P]):
    """A function that never raises an ``Exception`` into its caller.

    Attributes:
        function: the function; it is called no more once it has raised.
    """

    def __init__(self, function: Callable[P, object]) -> None:
        self.function = function
        self._has_failed = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call the function, unless it has raised before."""
        if self._has_failed:
            return
        try:
            self.function(*args, **kwargs)
        except Exception:
            self._has_failed = True
            _log.exception("%r raised and is called no more; the run goes on", self.function)
