"""How good is a model: test sets, rankings, metrics, and how sure a difference is.

tasks: test sets. corpus: their texts. trec: TREC's files. metrics: a table of functions. evaluator: models on one test
set. significance: intervals, tests, thresholds. costs: what smaller vectors cost. tables, report: an evaluation as text
and as a page. Of evaluate.py, score: every model on every test set. results: the files.
"""

from bge_core.evaluation.evaluator import EvaluationResult as EvaluationResult
from bge_core.evaluation.evaluator import evaluate as evaluate
from bge_core.evaluation.tasks import RetrievalTask as RetrievalTask
from bge_core.evaluation.tasks import load_task as load_task
