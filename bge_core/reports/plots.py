"""Plots, drawn by matplotlib: as SVG in a page, as a PNG beside a run.

In a page the letters are those of the page, so Chinese labels need no font of matplotlib's, and the colours follow
light and dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bge_core.files.atomic import atomic_path
from bge_core.runtime.log import read_metrics

COLORS = {"#1f5fa8": "--c1", "#c2571a": "--c2", "#3b7d4a": "--c3", "#626a75": "--muted"}  # as page.html names them
SIZE = (5.4, 2.9)  # inches of a plot: two stand side by side, and on a phone its letters can still be read
Draw = Callable[[Any], object]  # draws on matplotlib's axes
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 10, "legend.frameon": False,
    "lines.linewidth": 1.8, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.parse_math": False, "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
}  # fmt: skip


def draw_svg(draw: Any, prefix: str) -> str:
    """A Figure, or what `draw` draws on axes, as an <svg> element, always the same; its ids begin with `prefix`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own fonts draw the letters
        figure = draw
        if not isinstance(draw, Figure):
            figure = Figure(figsize=SIZE, layout="constrained")
            draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
    # Equal ids of two plots would refer to each other's shapes.
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda found: found[1] + prefix, svg)
    for color, name in COLORS.items():
        svg = svg.replace(color, f"var({name})")
    return svg.replace("#000000", "currentColor")


def draw_recall(axes: Any, recall: Mapping[str, np.ndarray]) -> None:
    """Recall@k over k = 1, 2, ... of each name, (K,)."""
    for name, recall_K in recall.items():
        axes.plot(np.arange(1, len(recall_K) + 1), recall_K, label=name)
    axes.set(xlabel="k", ylabel="Recall@k", xscale="log")
    axes.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= len(recall_K)])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def draw_histograms(
    axes: Any, scores: Mapping[str, np.ndarray], edges: np.ndarray, xlabel: str, ylabel: str, *, shares: bool = False
) -> None:
    """How many scores of two names, or which share of them, fall between two edges; the second stands before the first.

    The first has the page's second colour, so that what is right, named last, has the first one everywhere.
    """
    for (name, values), color in zip(scores.items(), ("C1", "C0"), strict=True):
        style = {"bins": edges, "weights": np.full(len(values), 1 / len(values)) if shares else None, "color": color}
        axes.hist(values, histtype="stepfilled", alpha=0.25, **style)
        axes.hist(values, histtype="step", label=name, linewidth=1.5, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
    axes.legend(loc="upper left")


def draw_training(axes: Any, lines: Sequence[Mapping[str, Any]], metric: str, step: str, loss: str) -> None:
    """Of the lines of metrics.jsonl the loss and, on an axis of its own, the metric. `step`, `loss`: the labels."""
    points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    scored = [(line["step"], line[metric]) for line in lines if metric in line]
    axes.plot(*zip(*points, strict=True), color="C0", label=loss)
    axes.set(xlabel=step, ylabel=loss)
    if scored:
        other = axes.twinx()
        other.plot(*zip(*scored, strict=True), color="C1", marker="o", label=metric)
        other.set_ylabel(metric)


def plot_curves(metrics_file: Path, picture: Path) -> None:
    """Loss, accuracy, gradient norm and learning rate over the steps, and the evaluations if any, as a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_file)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    if not training:
        return
    titles = {"loss": "loss", "accuracy": "in-batch accuracy", "grad_norm": "gradient norm", "lr": "learning rate"}
    panels = [key for key in titles if any(key in line for line in training)]
    evaluated = [key for key in ("MRR@10", "Recall@10") if any(key in line for line in evaluations)]
    num_panels = len(panels) + bool(evaluated)
    figure = Figure(figsize=(4 * num_panels, 3.2), layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axis, key in zip(axes, panels, strict=False):
        points = [(line["step"], line[key]) for line in training if line.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_title(titles[key])
        if key == "loss" and "log_candidates" in training[0]:
            guess = training[0]["log_candidates"]
            axis.axhline(guess, color="gray", linestyle=":", label=f"random guess {guess:.2f}")
            axis.legend()
    for key in evaluated:
        points = [(line["step"], line[key]) for line in evaluations if key in line]
        axes[-1].plot(*zip(*points, strict=True), marker="o", label=key)
        axes[-1].set_title("evaluation")
        axes[-1].legend()
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    _write_png(figure, picture)


def plot_sweep(found: Mapping[str, Any], picture: Path) -> None:
    """Gain in the domain, and loss outside, against the weight, the chosen one marked. `found`: as in sweep.json."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    weights = [line["weight"] for line in found["weights"]]
    for name, color in (("domain", "tab:blue"), ("general", "tab:orange")):
        if name in found["questions"]:
            low, middle, high = (
                [line[f"{name}_{part}"] for line in found["weights"]] for part in ("low", "difference", "high")
            )
            axes.plot(weights, middle, marker="o", color=color, label=name)
            axes.fill_between(weights, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(found["chosen"], color="gray", linestyle=":", label=f"chosen: {found['chosen']:g}")
    axes.set(xlabel="weight of the fine-tuned model", ylabel=f"{found['metric']}, difference to the base")
    axes.grid(alpha=0.3)
    axes.legend()
    _write_png(figure, picture)


def _write_png(figure: Any, picture: Path) -> None:
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
