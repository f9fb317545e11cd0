"""The Pareto picture of layouts: tokens a second of a user against tokens a second of a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helix.plan.sizes import short
from scripts.outputs import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELIX, PLAIN, THIRD = "#1f6fb4", "#d98032", "#5a9e5a"


@dataclass(frozen=True)
class Point:
    """A layout in a case: what it gives each user and what each GPU makes, in tokens a second."""

    layout: str
    context: int
    batch: int
    per_user: float
    per_gpu: float
    is_plain: bool


def require_matplotlib(name: str, value: str) -> None:
    """Raise ValueError where a setting asks for a picture and there is nothing to draw it with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{name} = {value} needs matplotlib: pip install 'helix-runtime[plot]'")


def check_picture(name: str, file: str) -> None:
    """Raise ValueError now where a setting names a picture that could not be drawn in the end."""
    require_matplotlib(name, file)
    check_writable(file)
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if Path(file).suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{name} = {file} must end in one of .{', .'.join(sorted(formats))}")


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both directions, by tokens a second of a user."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (-each.per_user, -each.per_gpu)):
        if not kept or point.per_gpu > kept[-1].per_gpu:
            kept.append(point)
    return kept[::-1]


def draw_pareto(points: Sequence[Point], output: str, *, title: str) -> None:
    """Draw all points, a frame for each context: the batches of a layout along its line, and both frontiers.

    Raises:
        ValueError: where there is no point.
    """
    from matplotlib.figure import Figure

    if not points:
        raise ValueError("there is no point to draw: no layout fits")
    contexts = sorted({point.context for point in points})
    figure = Figure(figsize=(1 + 6.5 * len(contexts), 5.5), layout="constrained")
    for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False).flat, contexts, strict=True):
        _draw_case(axes, [point for point in points if point.context == context])
        axes.set_title(f"{short(context)} tokens of context", fontsize=10)
    figure.suptitle(title)
    figure.savefig(output, dpi=120)


def draw_frontiers(frames: Mapping[str, Mapping[str, Sequence[Point]]], output: str, *, title: str) -> None:
    """Draw only the frontiers, on logarithmic axes: a frame for each name, in it a line for each family of layouts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(1 + 6.5 * len(frames), 5.5), layout="constrained")
    for axes, (name, families) in zip(figure.subplots(1, len(frames), squeeze=False).flat, frames.items(), strict=True):
        for (label, points), colour in zip(families.items(), (HELIX, PLAIN, THIRD), strict=False):
            front, named = frontier(points), set[str]()
            across, up = [point.per_user for point in front], [point.per_gpu for point in front]
            axes.plot(across, up, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
            for point in reversed(front):
                if point.layout not in named:  # its fastest point comes last, and is named first
                    axes.annotate(point.layout, (point.per_user, point.per_gpu), fontsize=6, color=colour,
                                  xytext=(3, 3), textcoords="offset points")  # fmt: skip
                named.add(point.layout)
        axes.set(xlabel="tokens/s of a user", ylabel="tokens/s of a GPU", xscale="log", yscale="log")
        axes.margins(0.12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(which="both", labelsize=7)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    figure.savefig(output, dpi=120)


def _draw_case(axes: Axes, points: Sequence[Point]) -> None:
    for layout in dict.fromkeys(point.layout for point in points):
        line = sorted((point for point in points if point.layout == layout), key=lambda each: each.batch)
        colour = PLAIN if line[0].is_plain else HELIX
        across, up = [point.per_user for point in line], [point.per_gpu for point in line]
        axes.plot(across, up, "o-", color=colour, alpha=0.35, markersize=3, linewidth=0.8)
        axes.annotate(layout, (across[-1], up[-1]), fontsize=6, color=colour, xytext=(3, 3), textcoords="offset points")
        for point in line:
            axes.annotate(
                str(point.batch), (point.per_user, point.per_gpu), fontsize=5, color="#666666",
                xytext=(0, -8), textcoords="offset points", ha="center",
            )  # fmt: skip
    for label, colour, front in (
        ("all layouts", HELIX, frontier(points)),
        ("plain TP", PLAIN, frontier([point for point in points if point.is_plain])),
    ):
        if front:
            across, up = [point.per_user for point in front], [point.per_gpu for point in front]
            axes.plot(across, up, "o-", color=colour, linewidth=2.2, markersize=5, label=f"frontier, {label}")
    axes.set(xlabel="tokens/s of a user", ylabel="tokens/s of a GPU", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
