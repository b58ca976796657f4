"""Which share of the fine-tuned model? Each weight from base to fine-tuned, measured in the domain and outside.

    theta(w) = (1 - w) theta_base + w theta_finetuned,      w = 0, 0.1, ..., 1, or beyond

The weight is chosen on validation questions; what it gives is to be read off other ones. Shapes: Q questions.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bge_core import UserError
from bge_core.evaluation.significance import bootstrap_means
from bge_core.files import atomic
from bge_core.files.records import Row

logger = logging.getLogger(__name__)
MAX_POINTS = 101
UNSEEN = 0.02  # a general loss that should be seen
Score = Callable[[str], Mapping[str, np.ndarray]]
Merge = Callable[[float, str], object]


def parse_sweep(text: str) -> list[float]:
    """ "0:1:0.1" -> [0.0, 0.1, ..., 1.0], the end included; 0 and 1 may be passed.

    Raises:
        UserError: not start:stop:step, a step that leads nowhere, more than MAX_POINTS weights.
    """
    try:
        start, stop, step = map(float, text.split(":"))
        count = math.floor((stop - start) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"--sweep {text!r}: write start:stop:step, as 0:1:0.1") from None
    if not 2 <= count <= MAX_POINTS:
        raise UserError(f"--sweep {text!r}: makes {max(0, count)} weights; use 2 to {MAX_POINTS}, as 0:1:0.1")
    return [round(start + i * step, 10) for i in range(count)]


def sweep(
    weights: Sequence[float],
    merge: Merge,
    score: Score,
    file: Path,
    *,
    key: str,
    metric: str,
    general_weight: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Row:
    """Measure every weight, and choose one.

    The rule: of the weights whose general score is not significantly below the base's (the 95 % interval of the paired
    difference, by the bootstrap over questions, reaches 0), the one with the best domain score; of equal ones the
    smallest. With `general_weight` a: the largest (1 - a) domain + a general. Without general questions: the best
    domain score.

    A weight that was measured is not measured again: `file` keeps the score of each question.

    Args:
        weights: w; the base, 0, is measured too if it is not among them.
        merge: writes theta(w) as a model folder.
        score: {"domain": (Q,), "general": (Q,)} of a model folder; general may be absent.
        file: JSON of what was measured; models are written beside it, one at a time, and removed.
        key: names all that the scores depend on but the weight; what was kept under another is not used.
        metric: its name, for the table.
        general_weight: a; None: the rule.
        resamples, seed: of the bootstrap.

    Returns:
        {"metric", "rule", "chosen": w, "weights": [{"weight", "domain", "domain_difference", "domain_low",
        "domain_high", and the same of general}]}, differences to the base.
    """
    kept = atomic.read_json(file) or {}
    if kept.get("key") != key:
        kept = {"key": key, "scores": {}}
    known: dict[float, dict[str, np.ndarray]] = {}
    for weight in dict.fromkeys((0.0, *weights)):
        if str(weight) not in kept["scores"]:
            model = file.with_name(f".{file.name}.model")
            shutil.rmtree(model, ignore_errors=True)  # of a run that was killed
            try:
                merge(weight, str(model))
                kept["scores"][str(weight)] = {name: of.tolist() for name, of in score(str(model)).items()}
            finally:
                shutil.rmtree(model, ignore_errors=True)
            atomic.write_json(file, kept)
        known[weight] = {name: np.array(values) for name, values in kept["scores"][str(weight)].items()}
        means = ", ".join(f"{name} {values.mean():.4f}" for name, values in known[weight].items())
        logger.info("weight %g: %s %s", weight, metric, means)
    base, lines = known[0.0], []
    for weight in sorted({0.0, *weights}):
        line = {"weight": weight}
        for name, values in known[weight].items():
            _, low, high = bootstrap_means(values - base[name], resamples, seed)
            line |= {
                name: float(values.mean()),
                f"{name}_difference": float((values - base[name]).mean()),
                f"{name}_low": float(low),
                f"{name}_high": float(high),
            }
        lines.append(line)
    rule, chosen = _choose(lines, general_weight)
    unseen = max((line["general_difference"] - line["general_low"] for line in lines if "general" in line), default=0)
    if unseen > UNSEEN and general_weight is None:
        text = "%d general questions are few: of the weights here, a loss of %.3f could go unseen; give more"
        logger.warning(text, len(base["general"]), unseen)
    return {
        "metric": metric,
        "rule": rule,
        "chosen": chosen,
        "questions": {n: len(v) for n, v in base.items()},
        "resamples": resamples,
        "seed": seed,
        "weights": lines,
    }


def _choose(lines: Sequence[Mapping[str, float]], general_weight: float | None) -> tuple[str, float]:
    if "general" not in lines[0]:
        best = max(lines, key=lambda line: (line["domain"], -line["weight"]))
        return "best domain score", best["weight"]
    if general_weight is not None:
        share = general_weight
        best = max(lines, key=lambda line: ((1 - share) * line["domain"] + share * line["general"], -line["weight"]))
        return f"largest {1 - share:g} domain + {share:g} general", best["weight"]
    fine = [line for line in lines if line["general_high"] >= 0]
    best = max(fine, key=lambda line: (line["domain"], -line["weight"]))
    return "best domain score whose general loss is not significant (95 %)", best["weight"]


def sweep_rows(found: Row) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: each weight with its scores and the differences to the base."""
    sets = [name for name in ("domain", "general") if name in found["weights"][0]]
    header = ["weight", *(column for name in sets for column in (name, "to the base", "95 %")), ""]
    rows = []
    for line in found["weights"]:
        cells = [f"{line['weight']:g}"]
        for name in sets:
            cells += [
                f"{line[name]:.4f}",
                f"{line[f'{name}_difference']:+.4f}",
                f"[{line[f'{name}_low']:+.4f}, {line[f'{name}_high']:+.4f}]",
            ]
        rows.append([*cells, "chosen" if line["weight"] == found["chosen"] else ""])
    return header, rows


def plot_sweep(found: Row, picture: Path) -> None:
    """Gain in the domain, and loss outside, against the weight; the chosen one marked. A PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs = [line["weight"] for line in found["weights"]]
    for name, color in (("domain", "tab:blue"), ("general", "tab:orange")):
        if f"{name}_low" not in found["weights"][0]:
            continue
        low, middle, high = (
            [line[f"{name}_{part}"] for line in found["weights"]] for part in ("low", "difference", "high")
        )
        axes.plot(xs, middle, marker="o", color=color, label=name)
        axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(found["chosen"], color="gray", linestyle=":", label=f"chosen: {found['chosen']:g}")
    axes.set(xlabel="weight of the fine-tuned model", ylabel=f"{found['metric']}, difference to the base")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic.atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
