"""What is settled of a run before it takes memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import helix.prepare as prepare
from helix.config import AttentionConfig, HelixConfig, ModelConfig, RuntimeConfig
from helix.prepare import Prepared
from parallel.launch import Launch
from scripts.make_checkpoint import make_checkpoint


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
    tmp_path: Path, monkeypatch: Any, caplog: Any, device: str, backend: str, asked: bool, graphs: bool
) -> None:
    monkeypatch.setattr(prepare, "can_launch_dependently", lambda device: False)
    monkeypatch.setattr(prepare, "select_backend", lambda *args, **kwargs: SimpleNamespace())
    config = HelixConfig(
        model=ModelConfig(path=str(make_checkpoint(tmp_path))),
        attention=AttentionConfig(backend=backend),
        runtime=RuntimeConfig(graphs=asked),
    )
    launch = SimpleNamespace(rank=0, world_size=1, device=torch.device(device), part=0, store=None)
    with caplog.at_level("INFO"):
        settled = Prepared(config, cast(Launch, launch)).config
    assert settled.runtime.graphs == graphs
    assert ("runtime.graphs is off" in caplog.text) == (asked and not graphs)
