"""The tiny checkpoints that other tests rest on: small, repeatable, and sensitive to every fault."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.make_checkpoint import FAMILIES, make_checkpoint
from scripts.make_checkpoint import main as make_checkpoint_command

ROOT = Path(__file__).parents[2]
PROMPT_LEN = 200
EDITED = (0, 1, 5, 17, 40)


def greedy(model: Any, prompts: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greedy tokens [B, num_tokens] and, for each, how far the largest logit was above the second."""
    tokens, gaps, cache, step = [], [], None, prompts
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            top = out.logits[:, -1].topk(2)
            gaps.append(top.values[:, 0] - top.values[:, 1])
            step = top.indices[:, :1]
            tokens.append(step)
    return torch.cat(tokens, 1), torch.stack(gaps, 1)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layers", "tied"), [(2, False), (4, True)], ids=("2-untied", "4-tied"))
def test_one_early_token_changes_most_of_the_output(tmp_path: Path, family: str, layers: int, tied: bool) -> None:
    model = load(make_checkpoint(tmp_path, family=family, layers=layers, tied=tied))
    prompt = torch.randint(0, 256, (PROMPT_LEN,), generator=torch.Generator().manual_seed(1))
    prompts = prompt.repeat(len(EDITED) + 1, 1)
    for row, position in enumerate(EDITED, start=1):
        prompts[row, position] = (prompts[row, position] + 101) % 256
    tokens, gaps = greedy(model, prompts, 64)
    changed = (tokens[1:, :32] != tokens[:1, :32]).float().mean(1)
    assert (changed > 0.4).all(), changed
    assert changed.mean() > 0.75, changed
    distinct = [len(set(row.tolist())) for row in tokens]
    assert min(distinct) >= 20, distinct
    assert (gaps < 2e-3).float().mean() < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_rounding_is_far_below_the_gap_between_logits(tmp_path: Path, family: str) -> None:
    model = load(make_checkpoint(tmp_path, family=family, layers=4))
    prompt = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        single = model(input_ids=prompt).logits
        if model.config.get_text_config().to_dict().get("num_experts_per_tok"):
            model.set_experts_implementation("eager")  # its grouped products take no float64
        double = model.double()(input_ids=prompt).logits
    assert (single - double).abs().max() < 1e-3
    assert double.std() > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_trivial(tmp_path: Path, family: str) -> None:
    for name, weight in load(make_checkpoint(tmp_path, family=family)).named_parameters():
        assert weight.std() > 0.02, name
        assert len(weight.flatten()[:64].unique()) > 8, name


def test_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, second, other = (
        (make_checkpoint(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != other


def test_replacing_leaves_no_old_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="100KB")
    with pytest.raises(ValueError, match=r"is not empty; --force replaces"):
        make_checkpoint(tmp_path)
    make_checkpoint(tmp_path, force=True)
    assert [file.name for file in tmp_path.glob("*safetensors*")] == ["model.safetensors"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2e6


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"family": "gpt2"}, r"family = 'gpt2', must be one of deepseek_v2, deepseek_v3, glm, llama, "),
        ({"vocab": 100}, r"vocab = 100, must be at least 262"),
        ({"dtype": "int8"}, r"dtype = 'int8', must be one of float32"),
        ({"window": -5}, r"window = -5, must lie in \[0, 2\*\*31\)"),
        ({"layers": 0}, r"layers = 0, must lie in \[1, "),
        ({"kv_heads": 3}, r"kv_heads = 3, must divide heads = 8"),
        (
            {"family": "qwen3_moe", "experts": 2, "experts_chosen": 3},
            r"experts_chosen = 3, must be at most experts = 2",
        ),
        ({"heads": 7}, r"^there is no llama of these sizes: [^\n]*7"),
        ({"vocab": 1 << 30, "hidden": 1 << 16}, r"^there is no llama of these sizes: [^\n]*memory"),
    ],
)
def test_impossible_recipe_is_refused(tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path, **recipe)


def test_command_line_makes_a_checkpoint_and_refuses_to_overwrite_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "model"), "--family", "glm", "--layers=1"]
    command = [sys.executable, "-m", "scripts.make_checkpoint", *arguments]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert "model: glm, 0." in first.stdout
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as ended:
        make_checkpoint_command()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: DIR = ") and line.endswith("is not empty; --force replaces the checkpoint in it")
