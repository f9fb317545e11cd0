"""Transformers' models over a cache of what 8 bits mean, which ours in 8 bits have to equal."""

from collections.abc import Callable
from typing import Any

import torch

from attention.pages import quantize


def through_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Return what a cache of 8 bits gives back of vectors [..., D]."""
    values, scales = quantize(x)
    return values.float() * scales.unsqueeze(-1)


def caches_of_8_bits(model: Any) -> Callable[[], Any]:
    """Return what makes a model's caches, of keys and values that went through 8 bits.

    Keys that are made of latents are made of what 8 bits mean of these; their turned elements go through 16.
    """
    from transformers import DynamicCache

    turned = getattr(model.config, "qk_rope_head_dim", 0)

    class Cache(DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **more: Any) -> Any:
            if turned:
                keys = torch.cat((keys[..., :-turned], keys[..., -turned:].bfloat16().float()), -1)
                return super().update(keys, values, *args, **more)
            return super().update(through_8_bits(keys), through_8_bits(values), *args, **more)

    if turned:
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.register_forward_hook(lambda module, x, out: through_8_bits(out))
    return Cache
