"""Steps that are run for their kernels' sake go through one layer of each sort, and nothing else changes."""

import copy
from typing import Any

import pytest
import torch

from helix.batch import LocalRows, StepRows
from helix.config import CacheConfig, HelixConfig, ModelConfig
from helix.llm import LLM
from helix.models.decoder import Decoder
from helix.models.families import spec_of
from helix.models.unlike import one_of_each_layer
from helix.sampling import SamplingParams
from parallel.grid import HelixGrid
from parallel.layout import Layout

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WINDOWS = ["sliding_attention", "full_attention"] * 3


def decoder_of(family: str, **settings: object) -> Decoder:
    spec = spec_of({"model_type": family, **SIZES, **settings}, "config")
    grid = HelixGrid(Layout(), 0, None, None)
    return Decoder(spec, grid, dtype=torch.float32, device=torch.device("cpu"), attention=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "settings", "layers"),
    [
        ("llama", {}, {0, 5}),
        ("qwen3_moe", EXPERTS, {0, 5}),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": [1, 2]}, {0, 1, 5}),
        ("qwen3", {"layer_types": WINDOWS, "sliding_window": 16, "use_sliding_window": True}, {0, 1, 5}),
        ("llama", {"num_hidden_layers": 1}, {0}),
        ("llama", {"quantization_config": FP8}, {0, 5}),
        ("llama", {"quantization_config": FP8 | {"modules_to_not_convert": ["model.layers.2"]}}, {0, 2, 5}),
    ],
)
def test_each_sort_of_layer_is_there_once_and_the_last_one(
    family: str, settings: dict[str, object], layers: set[int]
) -> None:
    decoder = decoder_of(family, **settings)
    before = copy.copy(decoder.computed)
    assert list(before) == list(range(decoder.spec.num_layers))
    with pytest.raises(ArithmeticError), one_of_each_layer(decoder):
        assert decoder.computed == layers
        raise ArithmeticError
    assert decoder.computed == before


def test_no_other_layers_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    finish = Decoder._finish

    def note(decoder: Decoder, layer: int, *args: Any, **named: Any) -> torch.Tensor:
        ran.append(layer)
        return finish(decoder, layer, *args, **named)

    monkeypatch.setattr(Decoder, "_finish", note)
    shape = {"model_type": "llama", **SIZES}
    with LLM(HelixConfig(model=ModelConfig(load="dummy", config=shape), cache=CacheConfig(num_pages=4))) as llm:
        with one_of_each_layer(llm.runner.decoder):
            llm.runner.forward(StepRows.for_nobody(3), LocalRows.for_nobody(3))
        assert ran == [0, 5]
        ran.clear()
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    assert ran == [0, 1, 2, 3, 4, 5]
