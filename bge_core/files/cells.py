"""The cells of a row as texts: questions, answers, known negatives, and whether they belong together."""

import json
import re
from html.parser import HTMLParser
from typing import Any, NamedTuple

from bge_core import UserError
from bge_core.files.columns import NO, NOTHING_SAID, YES, Columns, Wanted, word
from bge_core.files.records import Row

BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")
BETWEEN_QUESTIONS = re.compile(r"\|+|#{2,}|[;；\r\n]+")
HTML = re.compile(
    r"</?(p|br|div|span|a|b|i|u|em|strong|font|img|ul|ol|li|h[1-6]|table|tbody|tr|td|th|script|style)(\s[^<>]*)?/?>"
    r"|&(nbsp|lt|gt|amp|quot|ldquo|rdquo|#\d+);",
    re.IGNORECASE,
)
INLINE = ("span", "a", "b", "i", "u", "em", "strong", "font", "img")


class RawPair(NamedTuple):
    """The texts of a row, empty ones as ""."""

    questions: list[str]
    answers: list[str]
    negatives: list[str]
    is_negative: bool = False  # the answers are known to be wrong
    left_out: str | None = None  # why the file says that the row does not count

    @property
    def problem(self) -> str | None:
        """Why the row gives nothing, or None."""
        return self.left_out or (
            "no question" if not any(self.questions) else None if any(self.answers) else "no answer"
        )


def parse_row(row: Row, columns: Columns, from_json: bool, wanted: Wanted = NOTHING_SAID) -> RawPair:
    """The texts of a row.

    Args:
        row: a text or number a cell, or of answers and negatives a list of them.
        columns: which cells to take.
        from_json: a number where a text should be is a mistake, not a cell that a spreadsheet took for one.
        wanted: what the user says.

    Raises:
        UserError: a cell that is no text, one that holds half a character, or a label that is neither yes nor no.
    """
    questions = [_text(row[name], name, from_json) for name in columns.question]
    question = next(filter(None, questions), "")
    if columns.appended:
        question = f"{question} {_text(row[columns.appended], columns.appended, from_json)}".strip()
    similar = [text for name in columns.similar for text in _similar_questions(row[name], name, from_json)]
    answers = _texts(row[columns.answer], columns.answer, from_json)
    if not answers:
        raise UserError(f"field '{columns.answer}' is an empty list; fill it or remove the line")
    negatives = [text for name in columns.negatives for text in _texts(row[name], name, from_json)]
    questions = [question, *similar] if question else similar or [""]
    return RawPair(questions, answers, negatives, *_judge(row, columns, wanted.min_label))


def _judge(row: Row, columns: Columns, min_label: float | None) -> tuple[bool, str | None]:
    """(are the answers known to be wrong, why is the row left out)."""
    for name, words in columns.off.items():
        if word(row[name]) in words:
            return False, f"'{name}' is {row[name]}"
    if columns.label is None:
        return False, None
    name, label = columns.label, word(row[columns.label])
    if not label:
        return False, f"'{name}' is empty"
    if columns.is_score:
        try:
            return False, f"'{name}' below {min_label:g}" if min_label is not None and float(
                label
            ) < min_label else None
        except ValueError:
            raise UserError(f"field '{name}' is {row[name]!r}; it must be a number") from None
    if label not in YES | NO:
        raise UserError(
            f"field '{name}' is {row[name]!r}; it must be yes or no (1, 0, 是, 否, ...) as in other rows, or empty"
        )
    return label in NO, None


def _similar_questions(value: Any, name: str, from_json: bool) -> list[str]:
    values = value if isinstance(value, list) else [value]
    parts = [part for one in values for part in (BETWEEN_QUESTIONS.split(one) if isinstance(one, str) else [one])]
    return [text for text in _texts(parts, name, from_json) if text]


def _texts(value: Any, name: str, from_json: bool) -> list[str]:
    if isinstance(value, list):
        return [_text(item, f"{name}[{i}]", from_json) for i, item in enumerate(value)]
    return [_text(value, name, from_json)]


def _text(value: Any, name: str, from_json: bool) -> str:
    """The text of a cell with single spaces, "" where it is empty. UserError says what is wrong with it."""
    if value is None or value != value:  # pandas leaves NaN in an empty cell
        return ""
    if not from_json and not isinstance(value, (str, list, dict, bytes)):
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)  # workbooks: 123.0 is 123
    if not isinstance(value, str):
        found = json.dumps(value, ensure_ascii=False, default=str)[:60]
        raise UserError(f"field '{name}' is {found}; it must be a string")
    if broken := BROKEN_TEXT.search(value):
        problem = "a NUL character; remove it" if broken[0] == "\0" else "half a surrogate pair; remove it"
        if "\udc80" <= broken[0] <= "\udcff":  # what surrogateescape makes of a byte
            problem = "bytes of another encoding; convert the file, for example with iconv -f GB18030 -t UTF-8"
        raise UserError(f"field '{name}' holds at character {broken.start() + 1} {problem}")
    return " ".join(value.split())


class _Stripper(HTMLParser):
    """Collects what is no tag, with a line break where a block begins or ends."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style")
        self.parts.append("" if tag in INLINE else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")
        self.parts.append("" if tag in INLINE else "\n")

    def handle_data(self, data: str) -> None:
        self.parts.append("" if self.hidden else data)


def strip_html(value: Any) -> Any:
    """A cell (or list of cells) without tags and with its entities as characters; what holds no HTML stays as it is."""
    if isinstance(value, list):
        return [strip_html(item) for item in value]
    if not isinstance(value, str) or not HTML.search(value):
        return value
    stripper = _Stripper()
    stripper.feed(value)
    stripper.close()
    return "".join(stripper.parts).strip()
