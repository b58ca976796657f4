"""README.md of a model folder: the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bge_core import UserError
from bge_core.files.atomic import atomic_path

BEGIN, END = "<!-- evaluation -->", "<!-- /evaluation -->"  # between them stands what an evaluation wrote
USE = """
## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode(["你的问题"], prompt_name="query")
passages = model.encode(["候选文本"], prompt_name="passage")
print(queries @ passages.T)
```
"""


def write_model_card(
    folder: Path, *, title: str, facts: Mapping[str, Any], scores: Mapping[str, float] | None, prompt: str
) -> None:
    """README.md of a model folder: what it is, how it came to be, how it scored, how to load it.

    Args:
        folder: the model's.
        title: of the card.
        facts: name -> value, for the table.
        scores: metric -> value, or None.
        prompt: the query instruction that the model expects.
    """
    base = str(facts.get("base model", ""))
    data = ModelCardData(
        base_model=base if base.count("/") == 1 and not base.startswith((".", "/")) else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["bge", "sentence-transformers", "feature-extraction"],
    )
    lines = [f"# {title}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    if scores:
        lines += ["", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    lines += [USE.format(name=folder.name)]
    lines.append(f"Query instruction: {prompt!r}." if prompt else "Queries need no instruction.")
    if of_rows := facts.get("prompts of rows"):
        lines.append(f"Rows of the training data had prompts of their own: {_cell(of_rows)}. Such queries need theirs.")
    lines.append("")
    with atomic_path(folder / "README.md") as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)).save(temporary)


def read_model_card(folder: Path) -> str:
    """README.md of a model folder, "" without one; UserError where it is no UTF-8."""
    path = folder / "README.md"
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise UserError(f"--update_model_card: {path} is not UTF-8; save it as UTF-8") from None


def add_to_model_card(folder: Path, section: str) -> None:
    """Put what an evaluation says into a model folder's README.md, in place of what an earlier one said."""
    before, _, rest = (read_model_card(folder) or f"# {folder.name}\n").partition(BEGIN)
    rest = (rest.partition(END)[2] if END in rest else rest).lstrip("\n")
    with atomic_path(folder / "README.md") as temporary:
        text = f"{before.rstrip()}\n\n{BEGIN}\n\n{section}\n{END}\n{rest}"
        temporary.write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`{name}={item}`" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
