"""Sizes that cannot be are refused before any of their memory is taken, in one line that names the setting."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from helix import host_memory, room
from helix.config import (
    AttentionConfig,
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculativeConfig,
    TransferConfig,
)
from helix.models.families import spec_of
from helix.plan.footprint import Footprint, Storage
from helix.room import require_room
from parallel.launch import Launch
from parallel.layout import Layout

SHAPE = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 16,
    "num_key_value_heads": 4, "intermediate_size": 160, "vocab_size": 320, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
PAGE_BYTES = 2 * 2 * 4 * 16 * 4 * 16  # layers, K and V, heads, elements, bytes, tokens
GB = 10**9


def require(monkeypatch: pytest.MonkeyPatch, device: str, free: dict[str, int], **given: Any) -> None:
    config = HelixConfig(
        cache=CacheConfig(block_size=16, **given.get("cache", {})),
        scheduler=SchedulerConfig(**given.get("scheduler", {})),
    )
    monkeypatch.setattr(room, "free_host_bytes", lambda _: free["host"])
    monkeypatch.setattr(room, "free_bytes", lambda *_: free.get("gpu"))
    footprint = Footprint(spec_of(SHAPE, "here"), Layout(kvp=1, tpa=1), Storage("fp32", "fp32"), 16)
    require_room(config, footprint, Launch(0, 1, 0, 1, torch.device(device), 0))


@pytest.mark.parametrize(
    ("device", "given", "message"),
    [
        ("cpu", {"cache": {"num_pages": GB}}, "cache.num_pages = 1000000000 needs 16,384.0 GB of the 16,4"),
        ("cpu", {"cache": {"host_pages": GB}}, "cache.host_pages = 1000000000 needs 16,384.0 GB of the"),
        (
            "cpu",
            {"scheduler": {"max_batch": GB}},
            "scheduler.max_batch = 1000000000 sequences of up to 4096 tokens needs",
        ),
        (
            "cuda",
            {"cache": {"num_pages": GB}},
            "cache.num_pages = 1000000000 needs 16,384.0 GB of the 16,384.0 GB that",
        ),
        (
            "cuda",
            {"scheduler": {"prefill_chunk": GB}},
            "a step of scheduler.prefill_chunk = 1000000000 and scheduler.max",
        ),
        (
            "cuda",
            {"cache": {"host_pages": GB}},
            "cache.host_pages = 1000000000 needs 16,384.0 GB of the 16,432.0 GB that",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch, device: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        require(monkeypatch, device, {"host": GB, "gpu": GB}, **given)
    assert str(refused.value).startswith(message)
    where = "the GPU" if device == "cuda" and "host_pages" not in message else "the host"
    assert f"a rank would take, but {where} has 1.0 GB free for it; lower" in str(refused.value)
    require(monkeypatch, device, {"host": GB, "gpu": GB})


def test_pages_are_counted_to_the_last_and_memories_of_gpu_and_host_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = {"cache": {"num_pages": 1000}}
    require(monkeypatch, "cuda", {"gpu": 1000 * PAGE_BYTES + 2 * 10**7, "host": 10**6}, **fits)
    with pytest.raises(ValueError, match="the GPU has"):
        require(monkeypatch, "cuda", {"gpu": 1000 * PAGE_BYTES, "host": 10**6}, **fits)
    with pytest.raises(ValueError, match="the host has 16.4 MB free"):
        require(monkeypatch, "cpu", {"host": 1000 * PAGE_BYTES}, **fits)
    with pytest.raises(ValueError, match="the model needs .* spread it over more ranks"):
        require(monkeypatch, "cpu", {"host": 10**5}, cache={"num_pages": 1}, scheduler={"max_batch": 1})


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (CacheConfig, "num_pages"), (CacheConfig, "host_pages"), (SchedulerConfig, "max_batch"),
        (SchedulerConfig, "prefill_chunk"), (ModelConfig, "max_position"), (ParallelConfig, "kvp"),
        (ParallelConfig, "ep"), (AttentionConfig, "share_qkv_rows"), (SpeculativeConfig, "max_draft_len"),
        (SpeculativeConfig, "ngram_max"), (TransferConfig, "prefill_ranks"), (RuntimeConfig, "timeout_s"),
        (TransferConfig, "timeout_s"), (TransferConfig, "connect_timeout_s"),
    ],
)  # fmt: skip
def test_no_size_or_time_overflows_a_type(kind: Any, key: str) -> None:
    for value in (2**31, 10**30):
        with pytest.raises(ValueError, match=rf"\.{key} = {value} must be at most "):
            kind(**{key: value})
    with pytest.raises(ValueError, match=rf"\.{key} = nan must be at least "):
        kind(**{key: float("nan")})


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_least_of_machine_and_container_is_free(tmp_path: Path) -> None:
    files(tmp_path, proc__meminfo="MemTotal:  9000 kB\nMemAvailable:  5000 kB\n", proc__self__cgroup="0::/a/b\n")
    assert host_memory.available_host_bytes(tmp_path) == 5000 * 1024
    two = tmp_path / "sys/fs/cgroup/a/b"
    two.mkdir(parents=True)
    (two / "memory.max").write_text("max\n")
    (two / "memory.current").write_text("10\n")
    assert host_memory.available_host_bytes(tmp_path) == 5000 * 1024
    (two / "memory.max").write_text("1000000\n")
    (two / "memory.stat").write_text("anon 3\ninactive_file 5\n")
    assert host_memory.available_host_bytes(tmp_path) == 1000000 - 10 + 5
    one = tmp_path / "sys/fs/cgroup/memory"
    one.mkdir()
    (one / "memory.limit_in_bytes").write_text("500\n")
    (one / "memory.usage_in_bytes").write_text("600\n")
    assert host_memory.available_host_bytes(tmp_path) == 0
    assert host_memory.available_host_bytes(tmp_path / "nothing") > 10**18, "unknown is no limit"


def test_a_shell_s_limit_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, proc__self__status="Name: x\nVmSize:  100 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024 * 150, 0))
    assert host_memory.available_process_bytes(tmp_path) == 1024 * 50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    assert host_memory.available_process_bytes(tmp_path) > 10**18
