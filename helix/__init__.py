"""The Helix runtime: decode very long contexts with the KV cache sharded along the sequence (arXiv 2507.07120).

``LLM``, ``Request``, ``RequestOutput``, ``SamplingParams`` and ``HelixConfig`` are the Python API; they are imported
when first used, so that the control plane of the cache can be used without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HelixConfig
    from .llm import LLM
    from .request import Request, RequestOutput
    from .sampling import SamplingParams

__all__ = ["LLM", "HelixConfig", "Request", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": ".llm",
    "HelixConfig": ".config",
    "Request": ".request",
    "RequestOutput": ".request",
    "SamplingParams": ".sampling",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
