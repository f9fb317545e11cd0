"""How much shared memory a program may take, and the largest tiles and deepest pipelines that fit in it.

Data-centre GPUs give a program 163 to 227 KiB, all others (sm_86, sm_89, sm_120) 99 KiB. Triton keeps in shared memory
what a product reads: of a pipeline of s stages it holds s - 1 turns (s on Hopper, which has room), beside the queries
and the weights of a turn. tests/attention/test_compiled.py holds these counts against what compilers allot.
"""

from __future__ import annotations

from typing import Any

import torch

INTERPRETED_BYTES = 227 * 1024
SLACK_BYTES = 1024  # barriers and what reductions exchange
LEAST_TOKENS = 16  # of a product on tensor cores


def shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may ask for on this device."""
    if device.type != "cuda":
        return INTERPRETED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)  # torch declares some of its attributes only
    return int(properties.shared_memory_per_block_optin)


def fit_stages(stages: int, stage_bytes: int, limit: int) -> int:
    """Return how many of so many stages of a pipeline fit; at least 1."""
    return max(1, min(stages, (limit - SLACK_BYTES) // stage_bytes + 1))


def fit_turn(
    m: int, n: int, stages: int, *, least_m: int, row_bytes: int, token_bytes: int, weight_bytes: int, limit: int
) -> tuple[int, int, int]:
    """Return m, n and stages of an attention kernel, made smaller until they fit: first stages, then n, then m.

    Args:
        m: rows x heads of a tile, a power of two.
        n: tokens of a turn, a power of two.
        stages: of the pipeline over turns.
        least_m: what m must not fall below.
        row_bytes: bytes of one query head.
        token_bytes: bytes of one token's keys and values of one KV head.
        weight_bytes: bytes of the weight of one query head and token.
        limit: bytes that a program may take.
    """
    while m * (row_bytes + n * weight_bytes) + max(1, stages - 1) * n * token_bytes + SLACK_BYTES > limit:
        if stages > 2:
            stages -= 1
        elif n > LEAST_TOKENS:
            n //= 2
        elif m > least_m:
            m //= 2
        else:
            break
    return m, n, stages
