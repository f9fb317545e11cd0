"""Two ranks: equal decisions pass the check, a rank that decides otherwise or is lost is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helix import LLM
from helix.check import RankMismatch
from helix.logprobs import SampledTokens
from helix.lost import RankLost
from parallel.symmetric import Faults
from tests.helix.llm.small import PROMPTS, drawn, greedy, make_llm


def tamper_input(llm: LLM, tampered: str) -> None:
    """Change what one sequence begins with, so that every decision stays what it was."""
    original = llm.engine.add

    def add(seq: Any) -> None:
        if seq.index == 1 and tampered == "prompt":
            seq.token_ids[0] ^= 1
        elif seq.index == 1 and tampered == "seed":
            seq.seed += 1
        elif seq.index == 1:
            seq.sampling = seq.sampling.with_overrides({"top_p": 0.5})
        original(seq)

    llm.engine.add = add  # type: ignore[method-assign]


def rank_body(path: Path, tampered: str) -> tuple[list[list[int]], str]:
    """Run with check_ranks; rank 1 takes one decision of its own. Return the tokens, or what was found."""
    llm = make_llm(path, kvp=2, check=True)
    scheduler = llm.engine.scheduler
    sampler, calls = llm.runner.sampler, 0
    assert sampler is not None
    original = sampler.choose

    def choose(local: torch.Tensor, choices: Any) -> SampledTokens:
        nonlocal calls
        calls += 1
        tokens = original(local, choices)
        if calls == 4:
            tokens.token_ids[0] ^= 1
        return tokens

    if llm.launch.rank == 1 and tampered == "token":
        sampler.choose = choose  # type: ignore[method-assign]
    elif llm.launch.rank == 1 and tampered == "page":
        scheduler.cache.blocks.device._free[1].reverse()
    elif llm.launch.rank == 1 and tampered == "chunk":
        scheduler._prefill_chunk = 8
    elif llm.launch.rank == 1 and tampered == "slot":
        scheduler._free_slots = scheduler._free_slots[1:]
    elif llm.launch.rank == 1 and tampered in ("prompt", "seed", "sampling"):
        tamper_input(llm, tampered)
    try:
        outputs = llm.generate(PROMPTS[:3], drawn(12, 1))
    except RankMismatch as mismatch:
        return [], str(mismatch)
    return [output.token_ids for output in outputs], ""


def test_ranks_that_agree_pass_the_check_and_make_the_tokens_of_one_rank(
    llm: LLM, path: Path, ranks: Callable[..., Any]
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS[:3], drawn(12, 1))]
    assert ranks(2).run(rank_body, path, "") == [(expected, "")] * 2


@pytest.mark.parametrize(
    ("tampered", "at_step"),
    [("token", 3), ("page", 0), ("slot", 0), ("chunk", 0), ("seed", 0), ("sampling", 0), ("prompt", 0)],
)
def test_a_rank_that_decides_otherwise_is_found_and_named(
    path: Path, ranks: Callable[..., Any], tampered: str, at_step: int
) -> None:
    message = f"step {at_step}: rank 1 decided otherwise than rank 0 (1 of 2 ranks differ from it)"
    assert ranks(2).run(rank_body, path, tampered) == [([], message)] * 2


def fault_body(path: Path) -> str:
    """Run eagerly where a kernel has noted that it gave up waiting for KVP rank 1 in layer 7's exchange."""
    llm = make_llm(path, kvp=2)
    llm.runner.faults = Faults(torch.device("cpu"))
    llm.runner.faults.word.fill_((7 * 4 + 1) << 8 | 2)
    try:
        llm.generate(PROMPTS[:1], greedy(2))
    except RankLost as lost:
        return str(lost)
    return ""


def test_a_fault_fails_the_step_without_graphs_too(path: Path, ranks: Callable[..., Any]) -> None:
    assert ranks(2).run(fault_body, path) == ["rank 1 never arrived at the exchange of layer 7"] * 2
