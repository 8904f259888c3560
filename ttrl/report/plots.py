"""Figures of the report as inline SVG. No script, no fonts to fetch; colours come from the page's style."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREY, GREEN = "#2f6fde", "#d9822b", "#8a94a6", "#2e8b57"
WIDTH, HEIGHT = 5.2, 2.5

Rows = Sequence[Mapping[str, Any]]


def curve(rows: Rows, series: Mapping[str, str], title: str, *, bounded: bool = False) -> str | None:
    """Lines over steps; `series` maps metric keys to names. None when no row has any of them."""
    present = {key: name for key, name in series.items() if any(key in row for row in rows)}
    if not present:
        return None
    figure, axes = _axes(title)
    for (key, name), colour in zip(present.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            color=colour,
            label=name,
            linewidth=1.6,
            marker="o" if len(points) < 3 else None,
            markersize=3,
        )
    if bounded:
        axes.set_ylim(-0.03, 1.03)
    if len(present) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def accuracy(rows: Rows, metrics: Sequence[str], title: str, beat: float | None) -> str | None:
    """Evaluations over steps with their intervals; a dashed line at the start model's vote, the line to beat."""
    present = [metric for metric in metrics if any(metric in row for row in rows)]
    if not present:
        return None
    figure, axes = _axes(title)
    for metric, colour in zip(present, (BLUE, ORANGE, GREEN), strict=False):
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        steps = [step for step, _ in points]
        axes.plot(
            steps, [m["value"] for _, m in points], color=colour, label=metric, linewidth=1.6, marker="o", markersize=4
        )
        if all(m["low"] is not None for _, m in points):
            axes.vlines(
                steps,
                [m["low"] for _, m in points],
                [m["high"] for _, m in points],
                color=colour,
                alpha=0.5,
                linewidth=4,
            )
    if beat is not None:
        axes.axhline(beat, color=GREY, linestyle="--", linewidth=1.2, label="vote of the start model")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _svg(figure)


def share_map(rows: Rows, title: str) -> str | None:
    """How the vote shares of the groups are spread, step by step: a histogram per column."""
    columns = [
        (row["step"], row["reward/share_histogram"]) for row in rows if sum(row.get("reward/share_histogram", ())) > 0
    ]
    if not columns:
        return None
    import numpy as np

    figure, axes = _axes(title)
    density = np.array([[count / sum(counts) for count in counts] for _, counts in columns]).T
    first, last = columns[0][0], columns[-1][0]
    image = axes.imshow(
        density, origin="lower", aspect="auto", cmap="Blues", vmin=0, extent=(first - 0.5, last + 0.5, 0, 1)
    )
    axes.set_ylabel("vote share of the label", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of groups").ax.tick_params(labelsize=7)
    return _svg(figure)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    # A fixed salt and no date: the same run directory gives the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ttrl", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', r"<svg \1", svg, count=1
    )
