"""JSON layouts whose questions and answers lie deeper than in a row: reading comprehension, conversations."""

from collections.abc import Callable, Iterator
from typing import Any

from bge_core.files.records import Row

Note = Callable[[str], None]
TURNS = ("conversations", "conversation", "messages")
ASKS, REPLIES = ("human", "user"), ("gpt", "assistant", "bot")


def unnest(row: Any, note: Note) -> Iterator[Any]:
    """Yield the rows with question and answer that an object stands for: mostly itself.

    Args:
        row: a JSON value.
        note: is told which layout was met.
    """
    if not isinstance(row, dict):
        yield row
    elif isinstance(row.get("paragraphs"), list):
        for paragraph in row["paragraphs"]:
            yield from unnest(paragraph, note)
    elif isinstance(row.get("qas"), list):
        note("SQuAD or CMRC layout: the answer of a question is the whole passage, the spans are left out")
        passage = row.get("context", row.get("context_text"))
        for asked in row["qas"]:
            question = asked.get("question", asked.get("query_text"))
            yield {"question": question, "context": None if asked.get("is_impossible") else passage}
    elif any(isinstance(row.get(name), list) for name in TURNS):
        note("conversations: the first question and the reply to it; what comes later is left out")
        yield _first_exchange(next(row[name] for name in TURNS if name in row), row.get("chosen"))
    else:
        yield row


def _first_exchange(turns: list[Any], preferred: Any) -> Row:
    """The first question and the reply to it, or else the reply that was preferred to another."""
    question = None
    for turn in turns:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker in ASKS and question is None:
            question = text
        elif speaker in REPLIES and question is not None:
            return {"question": question, "answer": text}
    text = preferred.get("value", preferred.get("content")) if isinstance(preferred, dict) else preferred
    return {"question": question, "answer": text}


def rows_of(value: Any) -> list[Any]:
    """The rows of a JSON file's one value: a list, {"data": [...]} under any name, or one object."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or any(name in value for name in ("paragraphs", "qas", *TURNS)):
        return [value]
    lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
    return lists[0] if len(lists) == 1 else [value]
