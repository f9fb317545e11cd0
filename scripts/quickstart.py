"""Run the main job on a small checkpoint, and compare its tokens with transformers'. Started by scripts/quickstart.sh.

torchrun --standalone --nproc-per-node 4 -m scripts.quickstart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parallel.launch import set_up_logging
from scripts import cli, ending
from scripts.generate import GenerateConfig
from scripts.generate import run as run_generate


def reference_tokens(path: str, prompt: str, num_tokens: int) -> list[int]:
    """Return transformers' own greedy tokens, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        do_sample=False,
    )
    return list(made[0, ids.shape[1] :].tolist())


def show(config: GenerateConfig, metrics: dict[str, Any], output: dict[str, Any], reference: list[int]) -> int:
    """Print the table of the run and return how many tokens equal the reference's."""
    layout = metrics["layout"]
    table = Table(title=f"{config.model.path} on {metrics['world_size']} ranks ({metrics['device']}), "
                        f"kvp {layout['kvp']} x tpa {layout['tpa']}")  # fmt: skip
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("prompt tokens", str(output["prompt_tokens"]))
    for rank, held in enumerate(metrics["tokens_per_rank"]):
        table.add_row(f"tokens held by rank {rank}", str(held))
    table.add_row("TTFT", f"{metrics['ttft_ms']['mean']:.1f} ms")
    table.add_row("TTL (median)", f"{metrics['ttl_ms']['p50']:.1f} ms")
    if (drafts := metrics["speculative"]) is not None:
        table.add_row("drafted tokens, accepted", f"{drafts['drafted']}, {drafts['accepted']}")
        table.add_row("accepted a draft (mean)", f"{drafts['mean_accepted_len']:.2f}")
        table.add_row("tokens a step of the model", f"{drafts['tokens_per_target_step']:.2f}")
        for length, steps in drafts["steps_per_draft_len"].items():
            table.add_row(f"steps with draft length {length}", str(steps))
    equal = sum(ours == theirs for ours, theirs in zip(output["token_ids"], reference, strict=False))
    table.add_row("tokens equal to the transformers reference", f"{equal}/{len(reference)}")
    Console().print(table)
    return equal


def run(config: GenerateConfig) -> None:
    """Run the job on all ranks, then the reference on rank 0."""
    if config.prompts is None or config.output is None or config.metrics is None:
        raise ValueError("the quickstart needs prompts, output and metrics")
    if ending.rank() == 0:
        Path(config.output).unlink(missing_ok=True)  # of a run that was broken off: this one begins anew
    run_generate(config)
    if ending.rank() != 0:
        return
    set_up_logging(0)
    output = json.loads(Path(config.output).read_text("utf-8").split("\n")[0])
    metrics = json.loads(Path(config.metrics).read_text("utf-8"))
    prompt = json.loads(Path(config.prompts).read_text("utf-8").split("\n")[0])["prompt"]
    torch.set_num_threads(max(torch.get_num_threads(), 2))
    reference = reference_tokens(config.model.path, prompt, len(output["token_ids"]))
    if show(config, metrics, output, reference) != len(reference):
        raise ValueError("the tokens differ from the reference's")


if __name__ == "__main__":
    cli.main("quickstart", GenerateConfig, run)
