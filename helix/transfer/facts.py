"""What two groups must agree on before one writes into the other's cache, and which process a rank is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from ..models.kinds import STATE, WINDOW
from ..models.spec import ModelSpec

_NO_FACTS = (  # said in another way, or no matter of what is cached: groups may have other drafts and limits
    "rope", "window_rope", "kinds", "names", "quantization", "max_position", "eos_token_ids", "predicts_next",
    "has_head",
)  # fmt: skip
_IN_CONFIG = {  # how config.json names some fields of a spec
    "family": "model_type", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "ffn_size": "intermediate_size", "rms_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias", "tied_embeddings": "tie_word_embeddings", "latent.rank": "kv_lora_rank",
    "experts.num_experts": "num_experts", "experts.num_chosen": "num_experts_per_tok",
    "experts.ffn_size": "moe_intermediate_size", "experts.normalised": "norm_topk_prob",
    "experts.dense_layers": "layers without experts", "states.num_value_heads": "linear_num_value_heads",
    "states.num_key_heads": "linear_num_key_heads", "states.value_dim": "linear_value_head_dim",
    "states.key_dim": "linear_key_head_dim", "states.taps": "linear_conv_kernel_dim",
}  # fmt: skip
_SAMPLES = 16  # places of each weight file that are read
_SAMPLE_BYTES = 4096


def make_facts(
    spec: ModelSpec, *, block_size: int, dtypes: tuple[torch.dtype, torch.dtype], weights: Path | None
) -> dict[str, Any]:
    """Return what must be equal in both groups, by the name of its setting, or of the field of the model's config.json.

    Args:
        spec: the model.
        block_size: tokens of a block.
        dtypes: of the model, and of what is cached.
        weights: the checkpoint's folder; None where weights are made up.
    """
    ropes = [spec.rope, *([] if spec.window_rope is None else [spec.window_rope])]
    rope = b"".join(each.inv_freq.numpy().tobytes() + repr(each.attention_scaling).encode() for each in ropes)
    return {
        "cache.block_size": block_size,
        "model.dtype": _name(dtypes[0]),
        "cache.dtype": _name(dtypes[1]),
        **{f"model's {_IN_CONFIG.get(name, name)}": value for name, value in _fields(spec)},
        "model's sliding_window": spec.window,
        "model's layers with a window": list(spec.layers_of(WINDOW)),
        "model's layers with states": list(spec.layers_of(STATE)),
        "fingerprint of the model's RoPE (rope_theta, rope_scaling)": blake2b(rope, digest_size=8).hexdigest(),
        "fingerprint of the model's weights": "none (model.load=dummy)" if weights is None else fingerprint(weights),
    }


def _fields(spec: Any, inside: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a spec and of what is in it, by name, in a form that travels."""
    for name in (each.name for each in fields(spec) if each.name not in _NO_FACTS):
        value = getattr(spec, name)
        if is_dataclass(value):
            yield from _fields(value, f"{inside}{name}.")
        else:
            yield inside + name, sorted(value) if isinstance(value, tuple | frozenset) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_mismatch(decode: Mapping[str, Any], prefill: Mapping[str, Any]) -> str | None:
    """Return what the two groups do not agree on, with both values; None where they do."""
    for name in [*decode, *(name for name in prefill if name not in decode)]:
        here, there = decode.get(name), prefill.get(name)
        if here != there or type(here) is not type(there):
            return f"{name} = {here} in the decode group and {there} in the prefill group; make them equal"
    return None


def fingerprint(weights: Path) -> str:
    """Return a short hash of a folder's weight files: their names, sizes and bytes at a few places."""
    digest = blake2b(digest_size=8)
    for file in sorted(weights.glob("*.safetensors")):
        num_bytes = file.stat().st_size
        digest.update(f"{file.name} {num_bytes}".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(num_bytes * sample // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one of the same number.

    Attributes:
        machine: equal where processes can look each other up; empty where that is not known.
        pid: its number there.
        started: when it started, in the kernel's ticks.
    """

    machine: str
    pid: int
    started: int

    @staticmethod
    def current() -> Process:
        """Return this process."""
        pid = os.getpid()
        state = _state(pid)
        return Process(machine() if state else "", pid, state[1] if state else 0)

    def has_ended(self) -> bool:
        """Return True when the process is known to run no more; what it was writing has landed, or never will.

        Only processes of this machine can be known; for others it is False.
        """
        if not self.machine or self.machine != machine():
            return False
        state = _state(self.pid)
        return state is None or state[0] in "ZX" or state[1] != self.started


def machine() -> str:
    """Return a name that processes share which see each other's numbers; empty where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int] | None:
    """Return a process's state and the time of its start; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    rest = re.sub(r".*\) ", "", text, count=1, flags=re.DOTALL).split()  # its name may hold anything
    return rest[0], int(rest[19])
