"""Plots as PNG."""

from pathlib import Path

from bge_core.files.atomic import atomic_path
from bge_core.runtime.log import read_metrics


def plot_curves(metrics_file: Path, picture: Path) -> None:
    """Loss, accuracy, gradient norm and learning rate over the steps, and the evaluations if any, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_file)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    panels = [
        ("loss", "loss"),
        ("accuracy", "in-batch accuracy"),
        ("grad_norm", "gradient norm"),
        ("lr", "learning rate"),
    ]
    panels = [(key, title) for key, title in panels if any(key in line for line in training)]
    evaluated = [key for key in ("MRR@10", "Recall@10") if any(key in line for line in evaluations)]
    num_panels = len(panels) + bool(evaluated)
    if not training:
        return
    figure = Figure(figsize=(4 * num_panels, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels, strict=False):
        points = [(line["step"], line[key]) for line in training if line.get(key) is not None]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_title(title)
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
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
