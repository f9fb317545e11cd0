"""A start says where it is: as stages begin, and now and then within a long one."""

import logging
from pathlib import Path

import pytest

from helix import LLM, HelixConfig, stages
from helix.config import CacheConfig, ModelConfig
from scripts.make_checkpoint import make_checkpoint


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    monkeypatch.setattr(stages.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        for _ in stages.through(range(6), "reading weights"):
            now += 4.0
    assert caplog.messages == ["start: reading weights", "start: reading weights, 3 of 6 after 12 s"]


def test_a_start_says_what_it_does_and_how_long_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(make_checkpoint(tmp_path / "model", layers=1))
    with caplog.at_level(logging.INFO, logger="helix"):
        LLM(HelixConfig(model=ModelConfig(path=path), cache=CacheConfig(num_pages=4))).close()
    told = [each for each in caplog.messages if each.startswith("start")]
    assert told[0] == "start: reading weights, layer by layer"
    assert told[-1].startswith("started in ") and len(told) == 2
