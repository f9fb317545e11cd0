"""Drafts by the layer that predicts one token further: against plain PyTorch, and from layers whose drafts are known.

The known ones add nothing (attention and feed-forward return zero): what they draft is read off their two inputs.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helix.config import HelixConfig, ModelConfig, SpeculativeConfig, TransferConfig
from helix.llm import LLM
from helix.models.families import load_spec
from helix.next_states import NextStates
from helix.request import Request
from helix.sampling import SamplingParams
from helix.speculative.loading import with_next_layer
from helix.speculative.next_layer import NextLayerSpeculator
from scripts.quantize import quantize_checkpoint
from tests.helix.speculative.world import make_llm, told

LAYERS, HIDDEN, VOCAB, LENGTH = 2, 64, 64, 3
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS + 1,  # the last is the one that predicts further
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
}
MTP = {"method": "mtp", "max_draft_len": LENGTH}
PROMPTS = [[(5 * i * i + 3 * i) % VOCAB for i in range(50)], [7], [9, 8, 7] * 4, [(11 * i) % VOCAB for i in range(33)]]
AGAIN = [[*PROMPTS[0][:45], 3, 1], [*PROMPTS[0][:48], 9, 5, 6], [*PROMPTS[3][:32], 8]]


class Checkpoint:
    """A tiny model, random, with the layer and its norms; ``write`` puts what it is then into a folder."""

    def __init__(self, family: str = "deepseek_v3") -> None:
        torch.manual_seed(3)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).float().eval()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)
        self.enorm, self.hnorm, self.norm = (torch.rand(HIDDEN) + 0.5 for _ in range(3))
        self.eh_proj = torch.randn(HIDDEN, 2 * HIDDEN) * 0.15
        self.layers = list(self.model.model.layers)

    def write(self, folder: Path) -> str:
        at = f"model.layers.{LAYERS}."
        own = {
            f"{at}enorm.weight": self.enorm, f"{at}hnorm.weight": self.hnorm, f"{at}eh_proj.weight": self.eh_proj,
            f"{at}shared_head.norm.weight": self.norm, f"{at}embed_tokens.weight": self.embedding,
        }  # fmt: skip
        self.model.save_pretrained(folder)
        tensors = {**load_file(folder / "model.safetensors"), **{name: each.clone() for name, each in own.items()}}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = self.model.config.to_dict() | {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    @property
    def embedding(self) -> torch.Tensor:
        return self.model.model.embed_tokens.weight.data

    @torch.inference_mode()
    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """The model's final hidden states, normalised: [tokens, h]."""
        x = F.embedding(torch.tensor([tokens]), self.embedding)
        for layer in self.layers[:LAYERS]:
            x = self.run(layer, x)
        return self.model.model.norm(x)[0]

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        turned = self.model.model.rotary_emb(x, positions)
        out = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=turned)
        return out[0] if isinstance(out, tuple) else out

    @torch.inference_mode()
    def drafts(self, tokens: list[int], count: int) -> tuple[list[int], float]:
        """What follows the tokens by the layer, and how close the choice between two tokens ever was."""
        tokens, states, margin = list(tokens), [torch.zeros(HIDDEN), *self.hidden(tokens[:-1])], float("inf")
        for _ in range(count):
            embedded = F.rms_norm(F.embedding(torch.tensor(tokens), self.embedding), (HIDDEN,), self.enorm, 1e-6)
            embedded[0] = 0
            state = F.rms_norm(torch.stack(states), (HIDDEN,), self.hnorm, 1e-6)
            x = self.run(self.layers[LAYERS], (torch.cat((embedded, state), -1) @ self.eh_proj.T)[None])
            states.append(F.rms_norm(x[0, -1], (HIDDEN,), self.norm, 1e-6))
            best = (states[-1] @ self.model.lm_head.weight.T).topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        return tokens[-count:], margin


@pytest.fixture(scope="module")
def random() -> Checkpoint:
    return Checkpoint()


@pytest.fixture(scope="module")
def path(random: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    return random.write(tmp_path_factory.mktemp("next") / "model")


def greedy(count: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **settings)


def drafts_of(llm: LLM) -> list[tuple[list[int], list[int]]]:
    """What is drafted from now on: the known tokens, and what came after them."""
    speculator, made = llm.engine.speculator, list[tuple[list[int], list[int]]]()
    assert isinstance(speculator, NextLayerSpeculator)
    plain = speculator._read

    def read() -> dict[Any, list[int]]:
        drafts = plain()
        made.extend((list(seq.token_ids), list(tokens)) for seq, tokens in drafts.items())
        return drafts

    speculator._read = read  # type: ignore[method-assign]
    return made


def asked(prompts: list[list[int]]) -> list[Request]:
    return [Request(prompt_token_ids=list(ids), sampling=greedy(9 + 5 * at)) for at, ids in enumerate(prompts)]


def run_body(path: str, kvp: int, tpa: int, graphs: bool) -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """Two rounds, of which the second begins in what the first left, in the middle of a block and at its end.

    Sequences end one after the other, so that steps with drafts and those that are launched ahead take turns.
    """
    speculative = MTP | {"draft_len_schedule": {1: 2, 2: 0, 4: LENGTH}}
    llm = make_llm(path, kvp=kvp, tpa=tpa, graphs=graphs, prefill_chunk=16, speculative=speculative, look_ahead=True)
    made = drafts_of(llm)
    outputs, again = llm.generate(asked(PROMPTS)), llm.generate(asked(AGAIN))
    assert {0, 2, LENGTH} <= set(llm.engine.metrics.speculative.steps)
    assert [output.cached_tokens for output in again] == [44, 47, 31]
    return [output.token_ids for output in (*outputs, *again)], made


@pytest.mark.parametrize(
    ("family", "kvp", "tpa", "graphs"),
    [("deepseek_v3", 1, 1, False), ("deepseek_v3", 1, 1, True), ("deepseek_v3", 2, 1, True), ("glm4_moe", 1, 1, True)],
)
def test_drafts_are_those_of_the_layer_in_plain_pytorch(
    tmp_path: Path, ranks: Callable[..., Any], family: str, kvp: int, tpa: int, graphs: bool
) -> None:
    random = Checkpoint(family)
    path = random.write(tmp_path / "model")
    llm = make_llm(path, cache={"reuse": False})
    outputs = [*llm.generate(asked(PROMPTS)), *llm.generate(asked(AGAIN))]
    plain = [output.token_ids for output in outputs]
    for tokens, made in ranks(kvp * tpa).run(run_body, path, kvp, tpa, graphs):
        assert tokens == plain
        assert len(made) > 20 and any(len(drafts) == LENGTH for _, drafts in made)
        compared = 0
        for known, drafts in made:
            expected, margin = random.drafts(known, len(drafts))
            if margin > 1e-3:
                assert drafts == expected
                compared += 1
        assert compared > 15


@pytest.mark.parametrize("settings", [{"num_pages": 12, "block_size": 16}, {"block_size": 1}])
def test_tokens_are_those_without_drafts_drawn_or_not_with_reuse_and_preemption(
    path: str, settings: dict[str, Any]
) -> None:
    prompts = [[*PROMPTS[0][:40], 3], *PROMPTS, [*PROMPTS[0][:37], 1, 2], PROMPTS[0]]
    for sampling in (greedy(20), greedy(20, temperature=1.0, seed=5, frequency_penalty=0.5)):
        outputs = []
        for speculative in ({}, MTP):
            llm = make_llm(path, prefill_chunk=16, speculative=speculative, look_ahead=True, **settings)
            outputs.append([told(llm.generate(prompts, sampling)), told(llm.generate(prompts, sampling))])
        assert outputs[0] == outputs[1]


# --- layers whose drafts are known ------------------------------------------------------------------------------------


def known(takes: str) -> Checkpoint:
    """A model whose next token is a function of the last one, on one cycle through all tokens, and a layer that follows
    it by one of its inputs alone: "embedding" or "hidden". The norms' weights are uneven.
    """
    made = Checkpoint()
    with torch.no_grad():
        for layer in made.layers:
            for name, weight in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
        made.embedding.copy_(torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0])
        half = torch.rand(HIDDEN // 2) * 3 + 0.2
        made.model.model.norm.weight.copy_(torch.cat((half, -half)))  # without it a state is like any other
        made.norm = made.model.model.norm.weight.data.clone()
        made.hnorm, made.enorm = torch.rand(HIDDEN) * 3 + 0.2, torch.rand(HIDDEN) * 3 + 0.2
        cycle = torch.randperm(VOCAB)
        after = torch.empty(VOCAB, dtype=torch.long)
        after[cycle] = cycle.roll(-1)
        hidden = F.rms_norm(made.embedding, (HIDDEN,), made.norm, 1e-6)
        head = torch.empty(VOCAB, HIDDEN)
        head[after] = torch.linalg.pinv(hidden).T
        made.model.lm_head.weight.copy_(head)
        made.eh_proj = torch.zeros(HIDDEN, 2 * HIDDEN)
        if takes == "embedding":  # of the token itself
            given = F.rms_norm(made.embedding, (HIDDEN,), made.enorm, 1e-6)
            made.eh_proj[:, :HIDDEN] = (torch.linalg.pinv(given) @ made.embedding).T
        else:  # of the token after the one whose state it is
            given = F.rms_norm(hidden, (HIDDEN,), made.hnorm, 1e-6)
            made.eh_proj[:, HIDDEN:] = (torch.linalg.pinv(given) @ made.embedding[after]).T
    return made


def acceptance(path: str) -> float:
    llm = make_llm(path, graphs=True, prefill_chunk=256, speculative=MTP, look_ahead=True)
    llm.generate([list(ids) for ids in PROMPTS], greedy(40))
    counters = llm.metrics.speculative
    assert counters is not None and counters.drafted > 100
    return counters.accepted / counters.drafted


def shifted(states: NextStates, hidden: torch.Tensor) -> torch.Tensor:
    """For each row the state of one position further back."""
    return hidden.roll(1, 0)


def before_the_norm(states: NextStates, hidden: torch.Tensor) -> torch.Tensor:
    """States without the weights of the norm."""
    return hidden / states.decoder.top["final_norm"]


@pytest.mark.parametrize("takes", ["embedding", "hidden"])
def test_drafts_that_are_known_are_always_accepted_and_hardly_ever_from_swapped_halves(
    tmp_path: Path, takes: str
) -> None:
    made = known(takes)
    assert acceptance(made.write(tmp_path / "right")) == 1.0
    made.eh_proj = made.eh_proj.roll(HIDDEN, 1)
    assert acceptance(made.write(tmp_path / "swapped")) < 0.1


def test_a_layer_of_8_bits_drafts_for_a_model_of_8_bits(tmp_path: Path) -> None:
    quantize_checkpoint(known("hidden").write(tmp_path / "wide"), folder := tmp_path / "narrow")
    tensors = load_file(folder / "model.safetensors")
    narrow = {name for name, each in tensors.items() if each.dtype == torch.float8_e4m3fn}
    assert f"model.layers.{LAYERS}.self_attn.q_b_proj.weight" in narrow
    assert f"model.layers.{LAYERS}.mlp.gate.weight" not in narrow and acceptance(str(folder)) == 1.0


@pytest.mark.parametrize("change", [before_the_norm, shifted])
def test_states_of_another_position_or_from_before_the_norm_are_hardly_ever_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[NextStates, torch.Tensor], torch.Tensor]
) -> None:
    plain = NextStates.follow

    def follow(self: NextStates, token_ids: torch.Tensor, hidden: torch.Tensor, *rest: Any, **named: Any) -> None:
        plain(self, token_ids, change(self, hidden), *rest, **named)

    monkeypatch.setattr(NextStates, "follow", follow)  # before graphs are captured
    assert acceptance(known("hidden").write(tmp_path / "model")) < 0.1


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(config: HelixConfig) -> str:
    with pytest.raises(ValueError) as problem:
        LLM(config)
    return str(problem.value)


def test_models_without_the_layer_and_transfers_are_refused(path: str, tmp_path: Path, random: Checkpoint) -> None:
    config = HelixConfig(model=ModelConfig(path=path, dtype="float32"), speculative=SpeculativeConfig(**MTP))
    transfer = TransferConfig(role="decode", address="127.0.0.1:29600")
    with pytest.raises(ValueError, match="which a transfer does not bring"):
        with_next_layer(load_spec(path), replace(config, transfer=transfer))
    settings = {**AutoConfig.for_model("deepseek_v2", **SIZES).to_dict(), "model_type": "deepseek_v2"}
    other = replace(config, model=ModelConfig(config=settings, load="dummy"))
    assert refused(other).startswith("speculative.method = mtp drafts by a layer that deepseek_v3 and glm4_moe")
    folder = Path(random.write(tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    tensors = {name: each for name, each in stored.items() if f"layers.{LAYERS}." not in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert (
        f"has no layer that predicts one token further (model.layers.{LAYERS}.eh_proj.weight is not there)"
        in refused(replace(config, model=ModelConfig(path=str(folder))))
    )
