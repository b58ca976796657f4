"""Which columns of a raw file are the question, the answer and the known negatives."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bge_core import UserError
from bge_core.files.text import normalize_text

# The first of these names that a file has is taken; anchor and positive are those of sentence-transformers.
QUESTION_NAMES = [
    "query", "question", "q", "anchor", "问题", "提问", "问句", "问", "标准问", "标准问题", "标准问法", "用户问题",
    "用户提问", "用户问", "用户咨询", "咨询问题", "咨询", "问题描述", "问题内容", "问法", "questions", "queries",
    "instruction", "prompt", "title", "标题", "问题标题",
]  # fmt: skip
ANSWER_NAMES = [
    "answer", "pos", "positive", "a", "答案", "回答", "回复", "答复", "答", "解答", "标准答案", "标准回答", "标准回复",
    "客服回答", "客服回复", "参考答案", "最佳答案", "答案内容", "回答内容", "回复内容", "answers", "positives",
    "response", "reply", "passage", "document", "output", "content", "text", "内容", "正文",
]  # fmt: skip
NEGATIVE_NAME = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?|负例|难负例|负样本")
NAME_NOISE = re.compile(r"\(.*?\)|\[.*?\]|【.*?】|[*:]")  # as in 问题(必填), *问题, 问题:


class Columns(NamedTuple):
    """The names of a file's columns, as it spells them."""

    question: str
    answer: str
    negatives: tuple[str, ...]


Find = Callable[[tuple[str, ...]], Columns]


def _plain_name(name: object) -> str:
    return NAME_NOISE.sub("", normalize_text(str(name))).strip().casefold()


@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[str, ...], query_field: str | None = None, answer_field: str | None = None) -> Columns:
    """The columns of question, answer and known negatives. Case, spaces and a "(...)" in a name do not matter.

    Args:
        names: all columns of the file.
        query_field: take this column as the question instead of looking for a common name.
        answer_field: likewise for the answer.

    Raises:
        UserError: one of the two is missing or there twice; says what was found and which flag to use.
    """
    plain = [_plain_name(name) for name in names]

    def find(what: str, flag: str, wanted: Sequence[str]) -> str:
        for name in wanted:
            if plain.count(name) > 1:
                raise UserError(f"has {plain.count(name)} columns named '{name}'; rename all but one of them")
            if name in plain:
                return names[plain.index(name)]
        found = ", ".join(f"'{name}'" for name in names[:20]) or "none"
        other = f" or another name of the {what}" if len(wanted) > 1 else ""
        raise UserError(f"no field '{wanted[0]}'{other}; found: {found}; add it, or say with {flag} which it is")

    question = find("question", "--query_field", [_plain_name(query_field)] if query_field else QUESTION_NAMES)
    answer = find("answer", "--answer_field", [_plain_name(answer_field)] if answer_field else ANSWER_NAMES)
    negatives = [name for name, short in zip(names, plain, strict=True) if NEGATIVE_NAME.fullmatch(short)]
    return Columns(question, answer, tuple(name for name in negatives if name not in (question, answer)))
