"""Which share of the fine-tuned model? Each weight from base to fine-tuned, measured in the domain and outside.

    theta(w) = (1 - w) theta_base + w theta_finetuned,      w = 0, 0.1, ..., 1, or beyond

The weight is chosen on validation questions; what it gives is to be read off other ones. Shapes: Q questions.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bge_core import UserError
from bge_core.evaluation.significance import bootstrap_means
from bge_core.files import atomic
from bge_core.files.records import Row
from bge_core.reports.tables import text_table

logger = logging.getLogger(__name__)
MAX_POINTS = 101
UNSEEN = 0.02  # a general loss that should be seen
Score = Callable[[str], Mapping[str, np.ndarray]]
Merge = Callable[[float, str], object]
PerQuestion = Mapping[str, np.ndarray]  # "domain" and, if there are such questions, "general" -> (Q,)


@dataclass(frozen=True)
class Point:
    """A mean over questions, and its difference to the base's with the 95 % interval."""

    mean: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """What a sweep measured and chose.

    Args:
        metric: its name.
        rule: how the weight was chosen.
        chosen: this weight.
        questions: {"domain": Q, "general": Q}; general may be absent, here and below.
        resamples, seed: of the intervals.
        points: {weight: {"domain": Point, "general": Point}}, the weights rising.
    """

    metric: str
    rule: str
    chosen: float
    questions: dict[str, int]
    resamples: int
    seed: int
    points: dict[float, dict[str, Point]]

    def row(self) -> Row:
        """What sweep.json and the manifest hold."""
        lines = []
        for weight, of in self.points.items():
            line = {"weight": weight}
            for name, point in of.items():
                line |= {name: point.mean, f"{name}_difference": point.difference}
                line |= {f"{name}_low": point.low, f"{name}_high": point.high}
            lines.append(line)
        facts = asdict(self)
        del facts["points"]
        return facts | {"weights": lines}

    def table(self) -> str:
        """Each weight with its scores and the differences to the base, for a terminal."""
        header = ["weight", *(column for name in self.questions for column in (name, "to the base", "95 %")), ""]
        rows = []
        for weight, of in self.points.items():
            cells = [f"{weight:g}"]
            for point in of.values():
                cells += [f"{point.mean:.4f}", f"{point.difference:+.4f}", f"[{point.low:+.4f}, {point.high:+.4f}]"]
            rows.append([*cells, "chosen" if weight == self.chosen else ""])
        return text_table(header, rows)


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
) -> Sweep:
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
    """
    known = _measure(sorted({0.0, *weights}), merge, score, file, key, metric)
    points: dict[float, dict[str, Point]] = {}
    for weight, of in known.items():
        points[weight] = {}
        for name, value_Q in of.items():
            change_Q = value_Q - known[0.0][name]
            _, low, high = bootstrap_means(change_Q, resamples, seed)
            points[weight][name] = Point(float(value_Q.mean()), float(change_Q.mean()), float(low), float(high))
    questions = {name: len(value_Q) for name, value_Q in known[0.0].items()}
    unseen = max((of["general"].difference - of["general"].low for of in points.values() if "general" in of), default=0)
    if unseen > UNSEEN and general_weight is None:
        text = "%d general questions are few: of the weights here, a loss of %.3f could go unseen; give more"
        logger.warning(text, questions["general"], unseen)
    rule, chosen = _choose(points, general_weight)
    return Sweep(metric, rule, chosen, questions, resamples, seed, points)


def _measure(
    weights: Sequence[float], merge: Merge, score: Score, file: Path, key: str, metric: str
) -> dict[float, PerQuestion]:
    """The scores of every weight: those that `file` keeps, and what is measured now, kept at once."""
    kept = atomic.read_json(file) or {}
    if kept.get("key") != key:
        kept = {"key": key, "scores": {}}
    known: dict[float, PerQuestion] = {}
    for weight in weights:
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
    return known


def _choose(points: Mapping[float, Mapping[str, Point]], general_weight: float | None) -> tuple[str, float]:
    """The rule in words, and the weight; of equal ones the smallest."""
    if "general" not in points[0.0]:
        return "best domain score", max(points, key=lambda w: (points[w]["domain"].mean, -w))
    if general_weight is None:
        fine = [w for w, of in points.items() if of["general"].high >= 0]
        rule = "best domain score whose general loss is not significant (95 %)"
        return rule, max(fine, key=lambda w: (points[w]["domain"].mean, -w))
    a = general_weight

    def both(w: float) -> tuple[float, float]:
        return (1 - a) * points[w]["domain"].mean + a * points[w]["general"].mean, -w

    return f"largest {1 - a:g} domain + {a:g} general", max(points, key=both)
