"""Type a question, see the five best answers of the demo's corpus before and after training, side by side.

python examples/ask.py            (after make demo; ends with an empty line or Ctrl-D)
echo 小飞卡在国外取钱怎么收费 | python examples/ask.py
"""

import sys
from pathlib import Path

import numpy as np
import transformers

from bge_core.encoder.encode import encode_for_search
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.files import atomic, sources
from bge_core.reports.tables import text_table
from bge_core.search.exact import exact_search

DEMO = Path(__file__).resolve().parent.parent / "outputs" / "demo"
TOP = 5
WIDTH = 26  # characters of an answer on one line; both columns fit a terminal of 120


def main() -> int:
    """Answer questions from standard input; returns the exit code."""
    manifest = atomic.read_json(DEMO / "trained/manifest.json")
    if not manifest or manifest.get("status") != "finished":
        print("error: outputs/demo holds no trained model; run make demo first", file=sys.stderr)
        return 2
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers = sources.read_corpus(DEMO / "data/corpus.jsonl")
    base = manifest["config"]["model_name_or_path"]
    folder = DEMO.parent.parent / base
    models = {"before": load_encoder(folder if folder.is_dir() else base), "after": load_encoder(DEMO / "trained")}
    print(f"reading {len(answers)} answers with both models ...", file=sys.stderr, flush=True)
    corpora = {
        name: encode_for_search(model, answers, prompt=model.settings.passage_prompt or "", max_length=128)
        for name, model in models.items()
    }
    while question := ask():
        columns = [top_answers(models[name], corpora[name], answers, question) for name in models]
        rows = [[str(i // 2 + 1) if i % 2 == 0 else "", *cells] for i, cells in enumerate(zip(*columns, strict=True))]
        print("\n" + text_table(["", *models], rows, left=True) + "\n", flush=True)
    return 0


def ask() -> str:
    """One line from the user, '' at the end."""
    try:
        return input("问题 question> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def top_answers(model: Encoder, corpus: np.ndarray, answers: list[str], question: str) -> list[str]:
    """The five best answers, two lines each: score with the first half, then the second half."""
    query = encode_for_search(model, [question], prompt=model.settings.query_prompt or "", max_length=64)
    scores, rows = exact_search(query, corpus, TOP)
    lines = []
    for score, row in zip(scores[0], rows[0], strict=True):
        text = answers[row]
        rest = text[WIDTH : 2 * WIDTH - 1] + ("…" if len(text) > 2 * WIDTH - 1 else "")
        lines += [f"{score:.3f} {text[:WIDTH]}", f"      {rest}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
