"""The quickstart's pass keys: where they stand, which ranks hold them, and what is counted as equal."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helix.cache.events import CacheEvent, block_hash, root_hash
from helix.cache.keys import token_bytes
from parallel.placement import BlockCyclic
from scripts.make_checkpoint import make_checkpoint
from scripts.pass_key import FirstOwners, hide
from scripts.quickstart import count_equal

TEXT = " ".join(f"word{number}" for number in range(50))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("quickstart") / "model", family="llama")


def test_a_key_stands_at_its_depth_and_its_tokens_say_it(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    for depth, before, after in ((0.0, None, "word0"), (0.5, "word24", "word25"), (1.0, "word49", None)):
        hidden = hide(TEXT, depth, tokenizer)
        prompt = tokenizer.decode(hidden.token_ids)
        assert tokenizer.decode([hidden.token_ids[position] for position in hidden.tokens]) == 2 * hidden.key
        assert before is None or f"{before} The pass key is {hidden.key}." in prompt
        assert after is None or f"{hidden.key} is the pass key. {after}" in prompt
    assert hide(TEXT, 0.5, tokenizer) == hide(TEXT, 0.5, tokenizer) != hide(TEXT, 0.4, tokenizer)


def test_owners_count_on_from_the_rank_of_the_first_block() -> None:
    placement, prompt = BlockCyclic(4, 3), list(range(20))
    first, second = prompt[:4], prompt[4:8]
    parent = block_hash(root_hash(b""), token_bytes(first))
    owners = FirstOwners(placement)
    owners(CacheEvent("stored", parent.hex(), root_hash(b"").hex(), "device", 2, 4))
    owners(CacheEvent("stored", block_hash(parent, token_bytes(second)).hex(), parent.hex(), "device", 0, 4))
    assert owners.owners(prompt, [0, 3]) == [2]
    assert owners.owners(prompt, [3, 4, 11]) == [0, 1, 2]


def test_tokens_are_counted_against_transformers_own(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for prompt in ([5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 6, 7, 1], [30, 31]):  # a shared beginning, all of it, none
        made = model.generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        answers.append((prompt, made[0, len(prompt) :].tolist()))
    assert count_equal(str(path), answers) == 24
    prompt, made = answers[1]
    answers[1] = (prompt, [*made[:-1], (made[-1] + 1) % 256])
    assert count_equal(str(path), answers) == 23
