"""Drafts by an EAGLE-3 head: against plain PyTorch, and from a head whose drafts are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helix.config import HelixConfig, ModelConfig, SpeculativeConfig
from helix.llm import LLM
from tests.helix.speculative.test_next_layer import PROMPTS, drafts_of, greedy
from tests.helix.speculative.world import make_llm

LAYERS, HIDDEN, VOCAB, KNOWN, LENGTH = 7, 64, 64, 40, 3
TAPS = (2, 3, 4)
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
AGAIN = [[*PROMPTS[0][:45], 3, 1], [*PROMPTS[3][:32], 8], [*PROMPTS[0][:48], 9, 5, 6]]
WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 17,
    "layer_types": [*["sliding_attention", "full_attention"] * 3, "full_attention"],
}


class Checkpoint:
    """A tiny model and a head for it, random."""

    def __init__(self, family: str, **more: Any) -> None:
        torch.manual_seed(5)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more)).float().eval()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)
        shapes = {
            "fc": (HIDDEN, 3 * HIDDEN), "lm_head": (KNOWN, HIDDEN), "norm": (HIDDEN,),
            "midlayer.self_attn.q_proj": (64, 2 * HIDDEN), "midlayer.self_attn.k_proj": (32, 2 * HIDDEN),
            "midlayer.self_attn.v_proj": (32, 2 * HIDDEN), "midlayer.self_attn.o_proj": (HIDDEN, 64),
            "midlayer.mlp.gate_proj": (80, HIDDEN), "midlayer.mlp.up_proj": (80, HIDDEN),
            "midlayer.mlp.down_proj": (HIDDEN, 80), "midlayer.hidden_norm": (HIDDEN,),
            "midlayer.input_layernorm": (HIDDEN,), "midlayer.post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        self.head = {
            name: torch.rand(shape) + 0.5 if "norm" in name else torch.randn(shape) * 0.15
            for name, shape in shapes.items()
        }
        self.ids = torch.randperm(VOCAB)[:KNOWN].sort().values

    def write(self, folder: Path, **changes: Any) -> tuple[str, str]:
        """Return the folders of the model and of the head, whose config differs from the model's by ``changes``."""
        self.model.save_pretrained(folder / "model")
        head = folder / "head"
        head.mkdir()
        tensors = {f"{name}.weight": each.clone() for name, each in self.head.items()}
        save_file({**tensors, "d2t": self.ids - torch.arange(KNOWN)}, head / "model.safetensors")
        config = SIZES | {"num_hidden_layers": 1, "intermediate_size": 80, "draft_vocab_size": KNOWN}
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
        (head / "config.json").write_text(json.dumps(config | changes))
        return str(folder / "model"), str(head)

    @torch.inference_mode()
    def drafts(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        """What follows the tokens by the head, and how close the choice between two tokens ever was."""
        streams = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        known = torch.cat([streams[layer][0] for layer in TAPS], -1) @ self.head["fc"].T
        tokens, margin = list(tokens), float("inf")
        before = torch.cat((torch.zeros(1, HIDDEN), known[:-1]))
        for _ in range(count):
            stream = self._layer(tokens, before)
            normed = F.rms_norm(stream[-1], (HIDDEN,), self.head["norm"], 1e-6)
            best = (normed @ self.head["lm_head"].T).topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(self.ids[best.indices[0]]))
            before = torch.cat((before, stream[-1:]))
        return tokens[-count:], margin

    def _layer(self, tokens: list[int], before: torch.Tensor) -> torch.Tensor:
        w, length = {name.removeprefix("midlayer."): each for name, each in self.head.items()}, len(tokens)
        embedded = self.model.model.embed_tokens.weight[torch.tensor(tokens)]
        x = torch.cat(
            (
                F.rms_norm(embedded, (HIDDEN,), w["input_layernorm"], 1e-6),
                F.rms_norm(before, (HIDDEN,), w["hidden_norm"], 1e-6),
            ),
            -1,
        )
        x[0] = 0
        cos, sin = self.model.model.rotary_emb(x[None], torch.arange(length)[None])
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj"].T).unflatten(-1, (-1, 16)).transpose(0, 1) for name in ("q", "k", "v")
        )
        q, k = (each * cos + torch.cat((-each[..., 8:], each[..., :8]), -1) * sin for each in (q, k))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        stream = before + attended @ w["self_attn.o_proj"].T
        m = F.rms_norm(stream, (HIDDEN,), w["post_attention_layernorm"], 1e-6)
        return stream + (F.silu(m @ w["mlp.gate_proj"].T) * (m @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T


def run_body(model: str, head: str, kvp: int, graphs: bool) -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """Two rounds, of which the second begins in what the first left."""
    eagle = {"method": "eagle3", "path": head, "max_draft_len": LENGTH}
    llm = make_llm(model, kvp=kvp, graphs=graphs, prefill_chunk=16, speculative=eagle, look_ahead=True)
    made = drafts_of(llm)
    outputs = [*llm.generate([list(ids) for ids in PROMPTS], greedy(9)), *llm.generate(AGAIN, greedy(5))]
    return [output.token_ids for output in outputs], made


@pytest.mark.parametrize(
    ("family", "kvp", "graphs", "more"), [("llama", 2, True, {}), ("qwen3", 1, False, {}), ("qwen3", 2, True, WINDOWED)]
)
def test_drafts_are_those_of_the_head_in_plain_pytorch(
    tmp_path: Path, ranks: Callable[..., Any], family: str, kvp: int, graphs: bool, more: dict[str, Any]
) -> None:
    """Windows of 17 tokens begin where blocks do: that of a row computed again, at 47, begins a block before."""
    made_of = Checkpoint(family, **more)
    model, head = made_of.write(tmp_path)
    llm = make_llm(model, cache={"reuse": False})
    outputs = [*llm.generate([list(ids) for ids in PROMPTS], greedy(9)), *llm.generate(AGAIN, greedy(5))]
    for tokens, made in ranks(kvp).run(run_body, model, head, kvp, graphs):
        assert tokens == [output.token_ids for output in outputs]
        compared = 0
        for known, drafts in made:
            expected, margin = made_of.drafts(known, len(drafts))
            if margin > 1e-3:
                assert drafts == expected
                compared += 1
        assert compared > 15


def test_drafts_that_are_known_are_always_accepted(tmp_path: Path) -> None:
    """A model whose next token is a function of the last one, and a head that follows it from a stream alone."""
    made = Checkpoint("llama")
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding = made.model.model.embed_tokens.weight
        embedding.copy_(torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0])
        cycle = torch.randperm(VOCAB)
        after = torch.empty(VOCAB, dtype=torch.long)
        after[cycle] = cycle.roll(-1)
        normed = F.rms_norm(embedding, (HIDDEN,), made.model.model.norm.weight, 1e-6)
        made.model.lm_head.weight[after] = torch.linalg.pinv(normed).T
        made.head["midlayer.self_attn.o_proj"].zero_()
        made.head["midlayer.mlp.down_proj"].zero_()
        made.head["fc"].zero_()
        made.head["fc"][:, HIDDEN : 2 * HIDDEN] = embedding[after].T @ torch.linalg.inv(embedding.T)
        made.head["norm"] = made.model.model.norm.weight.data.clone()
        made.ids = torch.arange(KNOWN)
        made.head["lm_head"] = made.model.lm_head.weight[:KNOWN].clone()
    model, head = made.write(tmp_path)
    llm = make_llm(
        model, graphs=True, look_ahead=True, speculative={"method": "eagle3", "path": head, "max_draft_len": 1}
    )
    right = [0, 0]
    for known, drafts in _made(llm):
        expected = int(after[known[-1]])
        if expected < KNOWN:  # what the head knows
            right[drafts == [expected]] += 1
    assert right[True] > 50 and right[False] == 0


def _made(llm: LLM) -> list[tuple[list[int], list[int]]]:
    made = drafts_of(llm)
    llm.generate([list(ids) for ids in PROMPTS], greedy(40))
    return made


def test_heads_of_other_models_are_refused(tmp_path: Path) -> None:
    made = Checkpoint("llama")
    model, head = made.write(tmp_path, num_attention_heads=8, head_dim=8)
    config = HelixConfig(
        model=ModelConfig(path=model, dtype="float32"), speculative=SpeculativeConfig(method="eagle3", path=head)
    )
    with pytest.raises(ValueError, match=rf"speculative.path = {head}: num_attention_heads = 8, must be 4"):
        LLM(config)
    _, other = Checkpoint("llama").write(tmp_path / "other")
    file = Path(other) / "model.safetensors"
    save_file(load_file(file) | {"midlayer.self_attn.q_proj.bias": torch.zeros(64)}, file)
    config.speculative.path = other
    with pytest.raises(ValueError, match="midlayer.self_attn.q_proj.bias"):
        LLM(config)
    config.speculative.path = model
    with pytest.raises(ValueError, match="num_hidden_layers = 7, must be 1: one layer drafts"):
        LLM(config)
    config.speculative.path = ""
    with pytest.raises(ValueError, match="speculative.path is empty: give the folder of an EAGLE-3 head"):
        LLM(config)
