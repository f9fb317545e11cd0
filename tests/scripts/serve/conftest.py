"""A small model, a server of it on two ranks, and the same without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helix import LLM, HelixConfig
from helix.config import CacheConfig, ModelConfig, RuntimeConfig
from scripts.make_checkpoint import make_checkpoint
from tests.scripts.serve.served import NUM_PAGES, Served, end, start


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", layers=1, max_position=4096)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of two ranks, for all tests that do not end it."""
    folder = tmp_path_factory.mktemp("log")
    events = [f"serve.kv_events=ipc://{folder}/events", f"serve.kv_events_replay=ipc://{folder}/replay"]
    served = start(model, folder, "scheduler.prefill_chunk=64", "serve.keepalive_s=0.05", *events)
    yield served
    end(served)


@pytest.fixture(scope="package")
def llm(model: Path) -> LLM:
    """The same model without a server."""
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(model)),
            cache=CacheConfig(block_size=16, num_pages=2 * NUM_PAGES),
            runtime=RuntimeConfig(device="cpu"),
        )
    )
