"""The comparison's own half runs on CPUs, and says what it cannot measure."""

import json
from typing import Any

import pytest
import torch

from helix.config import ModelConfig
from scripts.bench_peer import BenchPeerConfig, fill_by_law, run
from tests.scripts.test_bench_prefill import SHAPE


def test_first_tokens_a_tokens_time_and_throughput_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(config=SHAPE, load="dummy", dtype="float32")
    run(BenchPeerConfig(model=model, cases=[[70, 2]], throughput=[[3, 20, 4]], outputs=4, max_batch=4))
    line = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    case, throughput = line["rows"]
    assert (line["system"], case["case"], throughput["case"]) == ("helix", "70 x 2", "3 x 20 x 4")
    assert min(case["first s"], case["again s"], throughput["tokens/s"]) > 0 and isinstance(case["TTL ms"], float)


class Latents(torch.nn.Module):
    """Keeps what it makes of a weight, once as a view and once as a copy, in memory that graphs read."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b = torch.nn.Parameter(torch.zeros(256, 64))
        self.W_UK_T = torch.nn.Parameter(self.kv_b.data.T)
        self.W_UV = torch.nn.Parameter(torch.zeros(64, 256))

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        self.W_UV.data.copy_(self.kv_b.data.T.to(dtype))


def test_the_other_systems_weights_follow_the_law_of_our_own() -> None:
    made = torch.nn.Module()
    shapes = {
        "embed_tokens_weight": (500, 64),
        "norm": (64,),
        "bias": (4000,),
        "A_log": (3,),
        "w13_weight": (4, 30, 256),
    }
    for name, shape in shapes.items():
        made.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    made.register_module("attention", Latents())
    eight = torch.zeros(128, 256).to(torch.float8_e4m3fn)
    made.register_parameter("qkv_weight", torch.nn.Parameter(eight, requires_grad=False))
    made.register_parameter("qkv_weight_scale_inv", torch.nn.Parameter(torch.zeros(1, 2)))
    fill_by_law(made)
    spread = {name: float(weight.detach().float().std()) for name, weight in made.named_parameters()}
    assert bool((made.norm == 1).all()) and not made.A_log.any()
    means = made.qkv_weight.float() * made.qkv_weight_scale_inv.detach()[0, 0]
    expected = {"embed_tokens_weight": 1, "bias": 0.02, "w13_weight": 1 / 16}
    assert {name: spread[name] for name in expected} == pytest.approx(expected, rel=0.1)
    assert float(means.detach().std()) == pytest.approx(1 / 16, rel=0.1)
    assert float(made.attention.kv_b.detach().std()) == pytest.approx(1 / 8, rel=0.1)
    assert torch.equal(made.attention.W_UK_T, made.attention.W_UV)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"system": "other"}, "system = "),
        ({"system": "vllm"}, "system = vllm needs vLLM"),
        ({"cases": [[4096]]}, r"cases: \[4096\] must be 2 numbers"),
        ({"cases": [], "throughput": []}, "must not both be empty"),
        ({"repeats": 0}, "repeats = 0"),
        ({"outputs": -1}, "outputs = -1"),
        ({"weights": "int4"}, "weights = "),
        ({"peer": {"block_size": 16}}, "is for system = vllm"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BenchPeerConfig(**settings)
