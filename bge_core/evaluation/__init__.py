"""How good is a model: test sets, rankings, metrics, intervals, costs and the report."""

from bge_core.evaluation.evaluator import evaluate as evaluate
