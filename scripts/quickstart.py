"""Find pass keys in a real text, answer a question, and compare every token with transformers'.

    torchrun --standalone --nproc-per-node 4 -m scripts.quickstart model.path=DIR

Started by scripts/quickstart.sh, which makes the model. Each pass key is asked for in a prompt of its own. Two prompts
begin alike up to the first key in either, so what one has cached the next does not compute again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from helix.checks import check_at_least, one_line
from helix.config import HelixConfig
from helix.llm import LLM, enter
from helix.request import Request
from helix.sampling import SamplingParams
from parallel.launch import agree
from scripts import cli, ending
from scripts.pass_key import FirstOwners, HiddenKey, hide

KEY_TOKENS = 8  # an answer to a pass key's prompt


@dataclass(kw_only=True, slots=True)
class QuickstartConfig(HelixConfig):
    """The settings of the quickstart.

    Attributes:
        text: the file whose words hide the pass keys.
        words: how many of its words are taken.
        depths: how far into them each pass key stands, from 0 to 1.
        question: what is asked after them, without the text.
    """

    text: str = "LICENSE"
    words: int = 500
    depths: list[float] = field(default_factory=lambda: [0.95, 0.65, 0.35, 0.05])
    question: str = "What is the capital of France?"

    def __post_init__(self) -> None:
        HelixConfig.__post_init__(self)
        check_at_least("words", self.words, 1)
        if not (self.depths and all(0 <= depth <= 1 for depth in self.depths)):
            raise ValueError(f"depths = {self.depths} must hold numbers from 0 to 1, at least one")

    def words_of_text(self) -> str:
        """Return the text's first words; ValueError where it cannot be read or has none."""
        try:
            words = Path(self.text).read_text("utf-8").split()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"text = {self.text} cannot be read: {one_line(error)}") from error
        if not words:
            raise ValueError(f"text = {self.text} has no words to hide pass keys in")
        return " ".join(words[: self.words])


@dataclass
class Totals:
    """What the prompts took together.

    Attributes:
        answers: prompt and output of each, as token ids.
        tokens_per_rank: tokens that each KVP rank held, over all prompts.
        prompt_tokens, cached_tokens: tokens of the prompts, and those of them that were cached.
        ttft_s: seconds to each first token.
        ttl_s, num_ttl: seconds between two tokens, all together, and how many these are.
        found: pass keys that were answered.
        drafted, accepted: tokens that were drafted, and those of them that stayed.
    """

    answers: list[tuple[list[int], list[int]]] = field(default_factory=list)
    tokens_per_rank: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    ttl_s: float = 0.0
    num_ttl: int = 0
    found: int = 0
    drafted: int = 0
    accepted: int = 0


def ask(llm: LLM, token_ids: list[int], sampling: SamplingParams, totals: Totals) -> Iterator[str]:
    """Yield the text of an answer as it comes, and add what it took. Collective over the world."""
    for event in llm.stream([Request(prompt_token_ids=token_ids)], sampling):
        yield event.text
        if event.output is None:
            continue
        if event.output.error is not None:
            raise ValueError(event.output.error)
        totals.answers.append((token_ids, event.output.token_ids))
        totals.prompt_tokens += event.output.prompt_tokens
        totals.cached_tokens += event.output.cached_tokens
    held = llm.metrics.tokens_per_rank
    totals.tokens_per_rank = [a + b for a, b in zip(totals.tokens_per_rank or [0] * len(held), held, strict=True)]
    totals.ttft_s.append(llm.metrics.ttft_s.mean_s())  # of the one request
    totals.ttl_s += llm.metrics.ttl_s.total_s
    totals.num_ttl += len(llm.metrics.ttl_s)
    if llm.metrics.speculative is not None:
        totals.drafted += llm.metrics.speculative.drafted
        totals.accepted += llm.metrics.speculative.accepted


def find_keys(llm: LLM, keys: Sequence[HiddenKey], totals: Totals) -> None:
    """Ask for every pass key, and say who held it and what came. Collective over the world."""
    owners = FirstOwners(llm.placement)
    llm.listen(owners)
    for hidden in keys:
        answer = "".join(ask(llm, hidden.token_ids, SamplingParams(max_tokens=KEY_TOKENS), totals))
        holders = ranks_of(owners.owners(hidden.token_ids, hidden.tokens), llm)
        found = hidden.key in answer
        totals.found += found
        ending.say(
            f"  {hidden.key} at depth {hidden.depth:.2f}, tokens {hidden.tokens[0]} to {hidden.tokens[-1]}, on "
            f"{holders}: {'found' if found else 'not found'}, {' '.join(answer.split())!r}"
        )
    llm.unlisten(owners)


def ranks_of(kvp_ranks: Sequence[int], llm: LLM) -> str:
    """Return the names of the ranks that have one of some places in their KVP group."""
    ranks = [str(rank) for rank in range(llm.layout.world_size) if rank % llm.layout.kvp in kvp_ranks]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:-1])} and {ranks[-1]}"


def count_equal(path: str, answers: Sequence[tuple[list[int], list[int]]]) -> int:
    """Return how many tokens of the answers are transformers' greedy ones, in float32 on the CPU.

    Each is compared with the argmax that follows the prompt and the answer's tokens before it, from one forward for an
    answer: if all are equal, then generating one by one gives the same, and if not, a difference is counted once. The
    cache is transformers' own; an answer takes over what its prompt shares with the one before.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    equal, cache, before = 0, DynamicCache(), list[int]()
    with torch.inference_mode():
        for prompt, made in answers:
            ids = prompt + made[:-1]
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt[:-1], before, strict=False)))
            if shared < len(before):
                cache.crop(shared - len(before))
            logits = model(torch.tensor([ids[shared:]]), past_key_values=cache, logits_to_keep=len(made)).logits[0]
            equal += sum(ours == best for ours, best in zip(made, logits.argmax(-1).tolist(), strict=True))
            before = ids
    return equal


def table_of(totals: Totals, llm: LLM, num_keys: int, equal: int) -> Table:
    """Return the figures of the run."""
    table = Table()
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("prompt tokens, of which cached", f"{totals.prompt_tokens}, {totals.cached_tokens}")
    for rank in range(llm.layout.world_size):
        table.add_row(f"tokens held by rank {rank}", str(totals.tokens_per_rank[rank % llm.layout.kvp]))
    table.add_row("TTFT (longest)", f"{max(totals.ttft_s):.1f} s")
    table.add_row("TTL (mean)", f"{totals.ttl_s / max(totals.num_ttl, 1) * 1e3:.0f} ms")
    if totals.drafted:
        table.add_row("drafted tokens, accepted", f"{totals.drafted}, {totals.accepted}")
    table.add_row("pass keys found", f"{totals.found}/{num_keys}")
    wanted = sum(len(made) for _, made in totals.answers)
    table.add_row("tokens equal to the transformers reference", f"{equal}/{wanted}")
    return table


def run(config: QuickstartConfig) -> None:
    """Run the prompts on all ranks, then the reference on rank 0."""
    enter(config)
    text = agree(config.words_of_text)
    began = time.perf_counter()
    llm = LLM(config)
    if llm.tokenizer is None or not llm.tokenizer.chat_template:
        raise ValueError(f"model.path = {config.model.path} has no chat template; the quickstart asks in a chat's turn")
    keys = [hide(text, depth, llm.tokenizer) for depth in config.depths]
    question = [{"role": "user", "content": config.question}]
    chat = llm.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    layout, totals = llm.layout, Totals()
    ending.say(
        f"{config.model.path} on {layout.world_size} ranks ({llm.launch.device.type}), kvp {layout.kvp} x tpa "
        f"{layout.tpa}, blocks of {config.cache.block_size} tokens\n\n"
        f"Pass keys hidden in {len(text.split())} words of {config.text}:"
    )
    find_keys(llm, keys, totals)
    ending.say(f"\n{config.question}")
    for piece in ask(llm, list(chat), config.sampling, totals):
        if ending.rank() == 0:
            shown = (letter if letter.isprintable() or letter == "\n" else "?" for letter in piece)
            print("".join(shown), end="", flush=True)
    ours_s = time.perf_counter() - began
    ending.say("\n")
    llm.close()
    if ending.rank() == 0:
        compare(config, llm, totals, ours_s)


def compare(config: QuickstartConfig, llm: LLM, totals: Totals, ours_s: float) -> None:
    """Compute the reference and print the table; RunFailed where a token differs."""
    began = time.perf_counter()
    with _all_cores():
        equal = count_equal(config.model.path, totals.answers)
    Console().print(table_of(totals, llm, len(config.depths), equal))
    print(f"{ours_s:.0f} s on the ranks, {time.perf_counter() - began:.0f} s for the reference", flush=True)
    if equal != sum(len(made) for _, made in totals.answers):
        raise ending.RunFailed("tokens differ from the reference's")


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let this process have the machine, and the library say nothing: the other ranks have ended."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


if __name__ == "__main__":
    cli.main("quickstart", QuickstartConfig, run)
