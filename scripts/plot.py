"""Draw what the benchmarks measured, each part beside its floor.

    python -m scripts.plot results=docs/performance.jsonl output=docs/performance.png

The results are the JSON lines that the benchmarks print last, one a line in any order; of a benchmark that is there
more than once the last counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix.checks import one_line
from scripts import cli
from scripts.pareto import check_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {
    "attention": "#1f6fb4",
    "exchange": "#8fc1e3",
    "GEMMs": "#d98032",
    "all-reduce": "#f2c08d",
    "append": "#888888",
    "other": "#bbbbbb",
}


@dataclass(kw_only=True, slots=True)
class PlotConfig:
    """What to draw.

    Attributes:
        results: a file of the JSON lines that the benchmarks printed.
        output: the picture's file; its ending tells the format.
    """

    results: str = "docs/performance.jsonl"
    output: str = "docs/performance.png"


def read_results(path: str) -> dict[str, dict[str, Any]]:
    """Return the last result of each benchmark by its name.

    Raises:
        ValueError: when the file is missing or a line is no result.
    """
    if not Path(path).is_file():
        raise ValueError(f"results = {path} is no file; append the JSON lines of the benchmarks to it")
    results = {}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            results[result["bench"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no result of a benchmark ({one_line(error)})") from error
    return results


def draw_decode(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Stack what each part adds to a step, beside a bar of the floors of cache and weights."""
    names = [f"{row['context'] // 1024}K x {row['batch']}\nkvp {row['kvp']} x tpa {row['tpa']}" for row in rows]
    at = range(len(rows))
    bottom = [0.0] * len(rows)
    for part, colour in PARTS.items():
        heights = [row[f"{part} ms"] for row in rows]
        axes.bar([x - 0.2 for x in at], heights, 0.38, bottom, color=colour, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    kv, weights = [row["KV floor ms"] for row in rows], [row["weights floor ms"] for row in rows]
    axes.bar([x + 0.2 for x in at], kv, 0.38, color=PARTS["attention"], alpha=0.45, hatch="//", label="floor: KV")
    axes.bar(
        [x + 0.2 for x in at], weights, 0.38, kv, color=PARTS["GEMMs"], alpha=0.45, hatch="//", label="floor: weights"
    )
    axes.plot([x - 0.2 for x in at], [row["TTL ms"] for row in rows], "k_", markersize=14, label="TTL, not profiled")
    axes.set_xticks(list(at), names, fontsize=7)
    axes.set(title="decode step", ylabel="ms", ylim=(0, 1.4 * max(bottom)))
    axes.legend(fontsize=7, loc="upper left", ncols=3)


def draw_ratios(axes: Axes, title: str, groups: dict[str, list[tuple[str, float]]], unit: str) -> None:
    """Draw one line of (name, value) for each competitor, log scale."""
    for name, points in groups.items():
        axes.plot([label for label, _ in points], [value for _, value in points], "o-", markersize=4, label=name)
    axes.set(title=title, ylabel=unit, yscale="log")
    axes.tick_params(axis="x", labelsize=7, rotation=45)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def draw(results: dict[str, dict[str, Any]], output: str) -> None:
    """Draw every benchmark that there is a result of."""
    from matplotlib.figure import Figure

    lines = {
        "attention": ("floor us", "ours us", "+ merge us", "SDPA us", "FlashInfer us"),
        "exchange + merge": ("fused us", "packed us", "two us", "gather us"),
        "all-reduce + residual + RMSNorm": ("fused us", "NCCL + norm us"),
    }
    labels = {
        "attention": lambda row: f"{row['B']} x {row['S'] // 1024}K {row['Q/K']}",
        "exchange + merge": lambda row: f"{row['heads']} x {row['head_dim']}, {row['rows']}",
        "all-reduce + residual + RMSNorm": lambda row: f"{row['KiB']} KiB",
    }
    wanted = [name for name in ("decode step", *lines) if name in results]
    if not wanted:
        raise ValueError(f"results: none of {', '.join(('decode step', *lines))} is there")
    figure = Figure(figsize=(14, 4.2 * -(-len(wanted) // 2)), layout="constrained")
    for axes, name in zip(figure.subplots(-(-len(wanted) // 2), 2, squeeze=False).flat, wanted, strict=False):
        rows = results[name]["rows"]
        if name == "decode step":
            draw_decode(axes, rows)
            continue
        label = labels[name]
        groups = {
            column.removesuffix(" us"): [(label(row), row[column]) for row in rows if row[column] is not None]
            for column in lines[name]
        }
        draw_ratios(axes, name, {each: points for each, points in groups.items() if points}, "us")
    figure.savefig(output, dpi=110)


def run(config: PlotConfig) -> None:
    """Read the results and draw them."""
    check_picture("output", config.output)
    draw(read_results(config.results), config.output)
    cli.say(f"drew {config.output}")


if __name__ == "__main__":
    cli.main("plot", PlotConfig, run)
