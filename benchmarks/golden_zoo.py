"""Record what sentence-transformers makes of the folders of tests/zoo.py, as tests/golden/zoo.json.

To rerun, in the environment of benchmarks/requirements.txt, from the repository root:

    python benchmarks/golden_zoo.py

In float32, whatever a folder is stored in. Of each family that is no refused one: the first entries of the vectors of
`zoo.TEXTS`, without a prompt; the similarity of each question of the zoo, with the family's prompt, to each passage;
and MRR@10 by its InformationRetrievalEvaluator.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.append(str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import zoo  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "zoo.json"
ENTRIES = 8  # of a vector


def load(folder: Path, trust: bool = True) -> SentenceTransformer:
    """The folder in float32, on the CPU."""
    model_kwargs = {"dtype": torch.float32}
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust, model_kwargs=model_kwargs)


def record(name: str, folder: Path) -> dict[str, Any]:
    """What it computes of one family."""
    family, model = zoo.FAMILIES[name], load(folder)
    if family.modules is None:
        model[1].pooling_mode = "mean"
    vectors = model.encode(zoo.TEXTS, prompt="")
    questions = model.encode(zoo.QUESTIONS, prompt=family.prompts[0])
    passages = model.encode(zoo.CORPUS, prompt=family.prompts[1])
    evaluator = InformationRetrievalEvaluator(
        {f"q{i}": text for i, text in enumerate(zoo.QUESTIONS)},
        {f"p{i}": text for i, text in enumerate(zoo.CORPUS)},
        {f"q{i}": {f"p{i}"} for i in range(len(zoo.QUESTIONS))},
        query_prompt=family.prompts[0],
        corpus_prompt=family.prompts[1],
    )
    (mrr,) = [value for key, value in evaluator(model).items() if key.endswith("mrr@10")]
    return {
        "dimension": model.get_embedding_dimension(),
        "max_length": model.max_seq_length,
        "similarity": model.similarity_fn_name,
        "vectors": [[round(float(x), 8) for x in row[:ENTRIES]] for row in vectors],
        "scores": [[round(float(x), 7) for x in row] for row in model.similarity(questions, passages)],
        "MRR@10": float(mrr),
    }


def main() -> None:
    """Write the file."""
    golden: dict[str, Any] = {"sentence-transformers": version("sentence-transformers"), "families": {}}
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(name for name, family in zoo.FAMILIES.items() if not family.refused):
            folder = zoo.make_folder(name, Path(root) / str(number))
            golden["families"][name] = found = record(name, folder)
            print(f"{name}: {found['dimension']} dimensions, {found['similarity']}, MRR@10 {found['MRR@10']:.4f}")
    text = json.dumps(golden, ensure_ascii=False, indent=1)
    lines = text.replace("\n     ", " ").replace("\n    ]", " ]")  # a row of numbers a line
    GOLDEN.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
