"""What is settled of a run before it takes memory."""

from typing import Any

import pytest
import torch

from helix.config import AttentionConfig, HelixConfig, RuntimeConfig
from helix.prepare import check_exchange, without_graphs
from parallel.layout import Layout


@pytest.mark.parametrize(
    ("device", "backend", "asked", "graphs"),
    [
        ("cuda", "reference", True, False),
        ("cuda", "reference", False, False),
        ("cuda", "auto", True, True),
        ("cpu", "reference", True, True),
    ],
)
def test_reference_attention_on_a_gpu_turns_graphs_off_and_says_so(
    caplog: Any, device: str, backend: str, asked: bool, graphs: bool
) -> None:
    config = HelixConfig(attention=AttentionConfig(backend=backend), runtime=RuntimeConfig(graphs=asked))
    with caplog.at_level("INFO"):
        settled = without_graphs(config, torch.device(device))
    assert settled.runtime.graphs == graphs
    assert ("runtime.graphs is off" in caplog.text) == (asked and not graphs)


@pytest.mark.parametrize(("exchange", "kvp", "said"), [("fused", 1, True), ("fused", 2, False), ("auto", 1, False)])
def test_a_fused_exchange_with_nothing_to_exchange_is_said(caplog: Any, exchange: str, kvp: int, said: bool) -> None:
    config = HelixConfig(attention=AttentionConfig(exchange=exchange))
    with caplog.at_level("INFO"):
        check_exchange(config, Layout(kvp=kvp, tpa=1), torch.device("cuda"))
    assert ("attention.exchange=fused has no effect: kvp is 1" in caplog.text) == said
