"""Greedy tokens of transformers' own model in float32, which ours have to equal."""

from collections.abc import Sequence
from typing import Any

import torch

TIE = 2e-3  # where the reference's own two best logits are this close, rounding may choose


def reference(path: Any) -> Any:
    """Return transformers' model of a checkpoint, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "limit"):  # of gpt_oss, which transformers up to 5.17 does not take from the config
            module.limit = model.config.swiglu_limit
    return model


def greedy_of(model: Any, prompt: Sequence[int], num_tokens: int, **more: Any) -> tuple[list[int], list[float]]:
    """A transformers model's tokens behind a prompt, and the gap of its two best logits at each."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip
    best = torch.stack(made.logits)[:, 0].topk(2, -1).values
    return made.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def require_equal(
    tokens: Sequence[int], expected: Sequence[int], gaps: Sequence[float], prompt_len: int, tie: float = TIE
) -> None:
    """Our tokens are the reference's, up to its first tie."""
    assert len(tokens) == len(expected)
    for index, (ours, theirs, gap) in enumerate(zip(tokens, expected, gaps, strict=True)):
        if ours != theirs:
            assert gap < tie, f"prompt of {prompt_len}: token {index} is {ours}, not {theirs}, gap {gap}"
            break
