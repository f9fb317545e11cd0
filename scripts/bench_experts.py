"""Time the experts of one layer, router included, beside grouped products of the library and the bytes they must read.

    python -m scripts.bench_experts

``tpf`` is how many ranks share each expert's units: what one of them computes is timed, without the all-reduce. The
peer sorts pairs of a row and an expert that it chose by expert and calls ``torch.nn.functional.grouped_mm`` twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from helix.config import check_at_least, check_choice
from helix.models.experts import mixture
from helix.models.linear import MAX_ROWS
from helix.models.quantized import Matrix, quantize
from helix.models.routing import route
from helix.models.spec import Experts
from parallel.launch import stop
from parallel.layout import split_units
from parallel.symmetric import can_launch_dependently
from scripts import cli
from scripts.dummy_weights import WEIGHTS
from scripts.timing import graph_us, read_bytes_per_us, report, start_on_gpu

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(kw_only=True, slots=True)
class BenchExpertsConfig:
    """What to measure; the sizes are those of Qwen3-30B-A3B.

    Attributes:
        hidden_size: elements of a row.
        num_experts: experts of a layer.
        num_chosen: experts that a row goes through.
        ffn_size: units of an expert.
        tpf: ways each expert is split.
        rows: rows of a step.
        layers: layers whose weights take turns, so that none is still in the L2 cache.
        repeats: replays to take the median of.
        weights: bf16, or fp8: ours are blocks of 128 x 128 in 8 bits, the peer's are what these mean in bfloat16.
    """

    hidden_size: int = 2048
    num_experts: int = 128
    num_chosen: int = 8
    ffn_size: int = 768
    tpf: list[int] = field(default_factory=lambda: [1, 4])
    rows: list[int] = field(default_factory=lambda: [1, 2, 8, 32, 64, 128, 256, 2048, 8192])
    layers: int = 3
    repeats: int = 10
    weights: str = "bf16"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)
        check_at_least("layers", self.layers, 1)
        check_at_least("repeats", self.repeats, 2)
        if not self.tpf or not self.rows:
            raise ValueError(f"tpf = {self.tpf} and rows = {self.rows} must not be empty")
        check_at_least("rows", min(self.rows), 1)
        check_at_least("tpf", min(self.tpf), 1)
        if max(self.tpf) > self.ffn_size:
            raise ValueError(f"tpf = {self.tpf}: each rank needs one of the ffn_size = {self.ffn_size} units at least")
        self.experts()

    def experts(self) -> Experts:
        """Return what the router needs to know."""
        return Experts(
            num_experts=self.num_experts, num_chosen=self.num_chosen, ffn_size=self.ffn_size, normalised=True
        )


def make_weights(config: BenchExpertsConfig, units: int, device: torch.device) -> Weights:
    """Return a router, and gate, up and down matrices of so many units of every expert."""
    h, num = config.hidden_size, config.num_experts
    shapes = ((num, h), (num, 2 * units, h), (num, h, units))
    router, gate_up, down = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5) for shape in shapes
    )
    return router, gate_up, down


def in_8_bits(weights: Weights) -> tuple[torch.Tensor, Matrix, Matrix]:
    """Return the weights with quantised experts, and let the plain ones be what these mean."""
    router, *plain = weights
    made = []
    for w in plain:
        quantized = quantize(w.flatten(0, 1)).unflatten(0, (w.shape[0], w.shape[1]))
        for expert, matrix in enumerate(w):
            matrix.copy_(quantized[expert].widen(0, w.shape[1], w.dtype))
        made.append(quantized)
    return router, made[0], made[1]


def grouped(
    x: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: Experts
) -> torch.Tensor:
    """Return the mixture of x [R, h] by the library's grouped products: [R, h]."""
    weights, ids = route(x, router, experts)
    expert, order = ids.flatten().sort(stable=True)
    stops = torch.searchsorted(expert, torch.arange(gate_up.shape[0], device=x.device), right=True).int()
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=stops).chunk(2, -1)
    added = F.grouped_mm(F.silu(gate) * up, down.mT, offs=stops)
    pairs = torch.empty_like(added).index_copy_(0, order, added)
    return (pairs.unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def clear(x: torch.Tensor, router: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Return which rows [R] choose the same experts however their scores are rounded."""
    if experts.num_chosen == experts.num_experts:
        return x.new_ones(x.shape[0], dtype=torch.bool)
    best = F.linear(x.float(), router.float()).topk(experts.num_chosen + 1).values
    return best[:, -2] - best[:, -1] > 0.05


def measure(config: BenchExpertsConfig, tpf: int, rows: int, layers: list[Weights], rate: float) -> dict[str, Any]:
    """Return one row of the table; ours and the peer's results are compared first."""
    device = layers[0][0].device
    experts = config.experts()
    x = torch.randn(rows, config.hidden_size, device=device, dtype=torch.bfloat16)
    pdl = can_launch_dependently(device)
    kept = [in_8_bits(weights) for weights in layers] if config.weights == "fp8" else layers
    calls = {
        "ours": [
            partial(mixture, x, *weights, experts=experts, first=0, pdl=pdl, chunk=rows > MAX_ROWS) for weights in kept
        ],
        "grouped": [partial(grouped, x, *weights, experts) for weights in layers],
    }
    ours, theirs = (each[0]().float() for each in calls.values())
    far = (ours.sum(0) - theirs).abs().amax(1) > 0.05 * theirs.abs().max()
    if count := int((far & clear(x, layers[0][0], experts)).sum()):
        raise AssertionError(f"{count} of {rows} rows differ from the library's grouped products")
    in_use = sum(route(x, router, experts)[1].unique().numel() for router, _, _ in layers) / len(layers)
    _, gate_up, down = kept[0]
    floor = in_use * (gate_up.nbytes + down.nbytes) / config.num_experts / rate
    flops = rows * config.num_chosen * 2 * (gate_up.numel() + down.numel()) // config.num_experts
    times = {name: graph_us(each, repeats=config.repeats, iterations=12) for name, each in calls.items()}
    (ours_us, spread_us), (grouped_us, _) = times.values()
    return {
        "tpf": tpf,
        "rows": rows,
        "experts in use": in_use,
        "floor us": floor,
        "ours us": ours_us,
        "spread us": spread_us,
        "grouped_mm us": grouped_us,
        "x floor": ours_us / floor,
        "ours/grouped": ours_us / grouped_us,
        "TFLOP/s": flops / ours_us / 1e6,
    }


def run(config: BenchExpertsConfig) -> None:
    """Run the benchmark on this rank's GPU."""
    device, rate = start_on_gpu().device, read_bytes_per_us()
    table: list[dict[str, Any]] = []
    with torch.inference_mode():
        for tpf in config.tpf:
            _, units = split_units(config.ffn_size, tpf, 0)
            layers = [make_weights(config, units, device) for _ in range(config.layers)]
            table += [measure(config, tpf, rows, layers, rate) for rows in config.rows]
            del layers
    sizes: dict[str, Any] = {
        name: getattr(config, name) for name in ("hidden_size", "num_experts", "num_chosen", "ffn_size")
    }
    values = [list(row.values()) for row in table]
    sizes["weights"] = config.weights
    report("experts of a layer", list(table[0]), values, dtype="bfloat16", read_bytes_per_us=rate, **sizes)
    stop()


if __name__ == "__main__":
    cli.main("bench_experts", BenchExpertsConfig, run)
