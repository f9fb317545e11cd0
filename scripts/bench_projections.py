"""Time a layer's projections of few rows, in 16 and in 8 bits, beside the bytes that they must read.

    python -m scripts.bench_projections model=glm4_9b_1m
    python -m scripts.bench_projections model=deepseek_v3_4_layers kvp=8

One rank's share of a layout is timed, without collectives: qkv, o, gate_up and down of a layer one after the other, and
those of several layers in turn, so that none is still in the L2 cache. Widths need not be multiples of anything.

Of latents, what makes queries and takes them into the latent space is timed as well, in 16 bits: of all heads, as every
rank would have to, beside this rank's share of them (``helix.models.query_share``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attention.latent_products import latent_queries_of
from helix.config import ModelConfig, check_at_least
from helix.models.checkpoint import fill_dummy
from helix.models.linear import gated_linear, split_linear
from helix.models.loading import read_spec
from helix.models.parts import Weight
from helix.models.quantized import Matrix, Quantized
from helix.models.query_share import rows_of
from helix.models.weights import layer_weights, part_of
from parallel.launch import stop
from parallel.layout import Layout, Range
from parallel.symmetric import can_launch_dependently
from scripts import cli
from scripts.dummy_weights import WEIGHTS, with_weights
from scripts.timing import graph_us, read_bytes_per_us, report, start_on_gpu

ROLES = ("qkv", "o", "gate_up", "down")


@dataclass(kw_only=True, slots=True)
class BenchProjectionsConfig:
    """What to measure.

    Attributes:
        kvp: ways the sequence is sharded in the layout whose first rank is timed.
        tpa: ways the KV heads are split in it.
        rows: rows of a step.
        layers: layers whose weights take turns.
        repeats: replays to take the median of.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    kvp: int = 1
    tpa: int = 1
    rows: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32, 64])
    layers: int = 3
    repeats: int = 10

    def __post_init__(self) -> None:
        check_at_least("layers", self.layers, 1)
        check_at_least("repeats", self.repeats, 2)
        if self.model.config is None:
            raise ValueError("model.path names a file; give a model of random weights, such as model=glm4_9b_1m")


def make(weight: Weight, device: torch.device) -> Matrix:
    """Return random weights."""
    out: Matrix
    if weight.quantized:
        out = Quantized.empty(weight.shape[0], weight.columns, device)
    else:
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
    fill_dummy("qkv", weight.shape[1], out)
    return out


def layer_calls(config: BenchProjectionsConfig, weights: str, device: torch.device) -> list[dict[str, Matrix]]:
    """Return the matrices of each layer."""
    spec = read_spec(with_weights(config.model, weights))
    part = part_of(spec, Layout(kvp=config.kvp, tpa=config.tpa), 0)
    dense = next((n for n in range(spec.num_layers) if spec.experts_of(n) is None), 0)
    roles = layer_weights(spec, dense, part)
    return [{role: make(roles[role], device) for role in ROLES if role in roles} for _ in range(config.layers)]


def project(layer: dict[str, Matrix], rows: dict[int, torch.Tensor], pdl: bool) -> None:
    """Run one layer's projections, of rows by their width."""
    for role, w in layer.items():
        product: Callable[..., torch.Tensor] = gated_linear if role == "gate_up" else split_linear
        product(rows[w.shape[1]], w, pdl=pdl)


def time_queries(config: BenchProjectionsConfig, device: torch.device, pdl: bool) -> list[dict[str, Any]]:
    """Return a row for each number of rows: microseconds for the queries of all heads, and of this rank's share."""
    spec = read_spec(config.model)
    latent, part = spec.latent, part_of(spec, Layout(kvp=config.kvp, tpa=config.tpa), 0)
    if latent is None or latent.q_rank is None:
        return []
    roles = layer_weights(spec, 0, part)
    layers = [{role: make(roles[role], device) for role in ("q_b", "k_up")} for _ in range(max(config.layers, 8))]
    table = []
    for num_rows in config.rows:
        first = torch.randn(num_rows, latent.q_rank, device=device, dtype=torch.bfloat16)
        turns = torch.randn(num_rows, latent.turned_dim // 2, device=device)

        def queries(weights: dict[str, Matrix], heads: Range, first: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
            q_b = rows_of(weights["q_b"], heads, latent.q_dim)
            k_up = rows_of(weights["k_up"], heads, latent.plain_dim).unflatten(0, (-1, latent.plain_dim))
            return latent_queries_of(split_linear(first, q_b, pdl=pdl), k_up, turns, turns, interleaved=True, pdl=pdl)

        took = [
            graph_us([partial(queries, layer, heads, first, turns) for layer in layers], repeats=config.repeats)[0]
            for heads in (part.q_heads, part.out_heads)
        ]
        names = ("all heads us", "own heads us", "own / all")
        table.append({"rows": num_rows} | dict(zip(names, (*took, took[1] / took[0]), strict=True)))
    return table


def run(config: BenchProjectionsConfig) -> None:
    """Run the benchmark on this rank's GPU."""
    device, rate = start_on_gpu().device, read_bytes_per_us()
    pdl = can_launch_dependently(device)
    table: list[dict[str, Any]] = []
    with torch.inference_mode():
        kept = {weights: layer_calls(config, weights, device) for weights in WEIGHTS}
        for num_rows in config.rows:
            row: dict[str, Any] = {"rows": num_rows}
            for weights, layers in kept.items():
                widths = {w.shape[1] for w in layers[0].values()}
                rows = {width: torch.randn(num_rows, width, device=device, dtype=torch.bfloat16) for width in widths}
                calls = [partial(project, layer, rows, pdl) for layer in layers]
                took, spread = graph_us(calls, repeats=config.repeats, iterations=12)
                floor = sum(int(w.nbytes) for w in layers[0].values()) / rate
                row |= {f"{weights} us": took, f"{weights} spread us": spread, f"{weights} x floor": took / floor}
            table.append(row | {"fp8/bf16": row["fp8 us"] / row["bf16 us"]})
    facts = {"kvp": config.kvp, "tpa": config.tpa, "read_bytes_per_us": rate}
    report("projections of a layer", list(table[0]), [list(row.values()) for row in table], **facts)
    with torch.inference_mode():
        queries = time_queries(config, device, pdl)
    if queries:
        report("queries of latents", list(queries[0]), [list(row.values()) for row in queries], **facts)
    stop()


if __name__ == "__main__":
    cli.main("bench_projections", BenchProjectionsConfig, run)
