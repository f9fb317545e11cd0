"""The quickstart's pass keys: where they stand, which ranks hold them, and what is counted as equal."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helix.cache.events import CacheEvent, block_hash, root_hash
from helix.cache.keys import token_bytes
from helix.config import CacheConfig, ModelConfig, RuntimeConfig, SamplingConfig, SpeculativeConfig
from parallel.placement import BlockCyclic
from scripts.make_checkpoint import make_checkpoint
from scripts.pass_key import FirstOwners, hide
from scripts.quickstart import QuickstartConfig, count_equal, run

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


def test_the_run_says_of_every_key_who_held_it_and_that_all_tokens_are_equal(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    run(
        QuickstartConfig(
            model=ModelConfig(path=str(path), dtype="float32"),
            cache=CacheConfig(block_size=64, num_pages=64),
            sampling=SamplingConfig(max_tokens=8),
            runtime=RuntimeConfig(device="cpu"),
            speculative=SpeculativeConfig(method="ngram"),
            text=str(tmp_path / "text"),
            depths=[0.9, 0.1],
        )
    )
    shown = capsys.readouterr().out
    assert shown.count(", on rank 0: not found, ") == 2  # random weights
    assert "│ tokens equal to the transformers reference │" in shown
    made, wanted = re.search(r"transformers reference +│ +(\d+)/(\d+)", shown).groups()
    assert made == wanted and 12 < int(wanted) <= 2 * 8 + 8
    assert len(shown.splitlines()) < 40


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": 0}, "words = 0 must be at least 1"),
        ({"depths": [0.5, 2.0]}, "depths = [0.5, 2.0] must hold numbers from 0 to 1, at least one"),
        ({"text": "/nowhere"}, "text = /nowhere cannot be read: No such file or directory"),
        ({"text": "/dev/null"}, "text = /dev/null has no words to hide pass keys in"),
    ],
)
def test_a_text_that_can_hide_no_key_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        QuickstartConfig(**settings).words_of_text()
    assert str(refused.value) == message
