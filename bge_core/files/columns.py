"""Which columns of a raw file are question, answer, known negatives and label: names propose, values decide."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from bge_core import UserError
from bge_core.files.text import normalize_text

# The first of these names that a file has and that holds texts is taken; anchor and positive are those of
# sentence-transformers.
TITLES = ["title", "标题", "问题标题"]
INSTRUCTIONS = ["instruction", "prompt", "指令", "指示"]
INPUTS = ["input", "输入"]
QUESTION_NAMES = [
    "query", "question", "q", "anchor", "问题", "提问", "问句", "问", "标准问", "标准问题", "标准问法", "标准问句",
    "用户问题", "用户提问", "用户问", "用户咨询", "咨询问题", "咨询", "问题描述", "问题内容", "问法", "主问题",
    "题目", "質問", "質問文", "問題", "提問", "questions", "queries", "standard_question", "user_question",
    "user_query", *INSTRUCTIONS, *INPUTS, *TITLES, "sentence1", "sentence_a", "text1", "text_a", "s1", "question1",
    "query1", "premise", "question_1", "qtext", "질문", "知识标题", "关联问题",
]  # fmt: skip
SIMILAR_NAMES = [
    *(kind + noun for kind in ("相似", "扩展", "同义") for noun in ("问", "问题", "问法", "问句", "说法")),
    "similar_questions", "similar_question", "similar_queries",
]  # fmt: skip
ANSWER_NAMES = [
    "answer", "pos", "positive", "a", "答案", "回答", "回复", "答复", "答", "解答", "标准答案", "标准回答",
    "标准回复", "客服回答", "客服回复", "参考答案", "最佳答案", "答案内容", "回答内容", "回复内容", "回答文", "答え",
    "回覆", "话术", "标准话术", "解决方案", "answers", "positives", "best_answer", "response", "reply", "passage",
    "document", "context", "output", "content", "text", "内容", "內容", "正文", "sentence2", "sentence_b", "text2",
    "text_b", "s2", "question2", "query2", "hypothesis", "question_2", "atext", "답변", "输出", "completion",
    "chosen", "默认", *SIMILAR_NAMES,
]  # fmt: skip
NEGATIVE_NAME = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?|负例|难负例|负样本")
SIMILAR_NAME = re.compile(rf"({'|'.join(SIMILAR_NAMES)})_?\d*")
LABEL_NAME = re.compile(
    r"(gold_?|true_?)?labels?|标签|标注|(is_?)?(best|correct|relevant|duplicate|match|similar|accepted)(_answer)?|relevance|"
    r"((human|similarity|relevance|relatedness)_?)?score|similarity|grade|是否(相关|匹配|正确|相似|最佳|采纳|相同|一致|同义)|最佳|相似度|"
    r"相关[性度]|得分|分数|评分"
)
OFF_NAME = re.compile(r"(是否)?已?(停用|禁用|删除|下线|失效|作废|过期)|(is_?)?(disabled?|deleted|expired|inactive)")
ON_NAME = re.compile(r"(是否)?已?(启用|有效|上线|发布|生效)|(is_?)?(enabled?|active|published)")
STATUS_NAME = re.compile(r"(知识|问题|启用|使用|发布)?状态|status|state")
NAME_NOISE = re.compile(r"^[(\[【].*?[)\]】]|[(\[【].*|[*:]")  # as in 问题(必填), (必填)问题, *问题, 问题:

# fmt: off
YES = frozenset([
    "1", "1.0", "true", "yes", "y", "t", "是", "对", "正确", "相关", "相似", "匹配", "相同", "entailment", "蕴含",
])
NO = frozenset([
    "0", "0.0", "false", "no", "n", "f", "否", "错", "错误", "不正确", "不相关", "不相似", "不匹配", "不同",
    "neutral", "contradiction", "中立", "矛盾",
])
ON = frozenset([
    "启用", "已启用", "有效", "正常", "生效", "已生效", "上线", "已上线", "已发布", "enabled", "active", "published",
])
OFF = frozenset([
    "停用", "已停用", "禁用", "已禁用", "无效", "失效", "已失效", "下线", "已下线", "已过期", "已作废", "删除",
    "已删除", "disabled", "inactive",
])
# fmt: on
NOTHING = ("-", "--", "nan", "none", "null", "n/a")
LETTER = re.compile(r"[^\W\d_]")
NO_NAME = re.compile(r"[。？！?!]$|^[-+]?\d+(\.\d+)?$")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


class UnknownColumns(UserError):
    """A table without the columns of question and answer."""


@dataclass(frozen=True)
class Wanted:
    """What the user says about the columns: the flags of prepare.py of the same names."""

    query_field: str | None = None
    answer_field: str | None = None
    min_label: float | None = None
    strip_html: bool = False

    @property
    def by_position(self) -> bool:
        """Whether the columns are given by their place, from 1, as of a file without a header line."""
        return any(field and field.isdecimal() for field in (self.query_field, self.answer_field))


NOTHING_SAID = Wanted()


class Columns(NamedTuple):
    """The names of a file's columns, as it spells them."""

    question: tuple[str, ...]  # the first of them that a row fills
    answer: str
    negatives: tuple[str, ...] = ()
    appended: str | None = None  # comes after the question: the input of an instruction
    similar: tuple[str, ...] = ()  # further questions with the same answer
    label: str | None = None
    is_score: bool = False  # the label is a number, and --min_label decides
    off: Mapping[str, Collection[str]] = {}  # the values of a column that take a row out


def plain_name(name: object) -> str:
    """A column's name without case, width, spaces around it and additions in brackets."""
    return NAME_NOISE.sub("", normalize_text(str(name))).strip().casefold()


def word(value: Any) -> str:
    """A cell as one of the words above, "" where it says nothing."""
    text = "" if value is None else normalize_text(str(value)).casefold()
    return "" if text in NOTHING else text


def holds_text(values: Sequence[Any]) -> bool:
    """Whether any of the cells is a text, or a list of texts: not a number, an id or a list of ids."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return any(isinstance(item, str) and LETTER.search(item) for item in flat)


def find_columns(names: Sequence[str], values: Mapping[str, Sequence[Any]], wanted: Wanted = NOTHING_SAID) -> Columns:
    """The columns of question, answer, known negatives and label.

    Case, spaces and a "(...)" in a name do not matter. Of several columns whose names fit, the first that holds texts.

    Args:
        names: all columns of the file.
        values: some cells of each of them.
        wanted: what the user says.

    Raises:
        UnknownColumns: question or answer is missing; says what was found and which flag to use.
        UserError: one of the two is there twice, or the label is neither yes nor no and `min_label` is None.
    """
    plain = [plain_name(name) for name in names]

    def fitting(field: str | None, common: Sequence[str], other: str | None) -> list[str]:
        found = (plain.index(name) for name in ([plain_name(field)] if field else common) if name in plain)
        return [names[i] for i in found if names[i] != other]

    def choose(what: str, flag: str, field: str | None, common: Sequence[str], found: Sequence[str]) -> str:
        if not found:
            shown = ", ".join(f"'{name}'" for name in names[:20]) or "none"
            or_other = "" if field else f" or another name of the {what}"
            remedy = f"add it, or say with {flag} which it is"
            raise UnknownColumns(f"no field '{field or common[0]}'{or_other}; found: {shown}; {remedy}")
        name = next((name for name in found if holds_text(values[name])), found[0])
        if (times := plain.count(plain_name(name))) > 1:
            raise UserError(f"has {times} columns named '{plain_name(name)}'; rename all but one of them")
        return name

    given_answer = next(iter(fitting(wanted.answer_field, [], None)), None)
    questions = fitting(wanted.query_field, QUESTION_NAMES, given_answer)
    question = choose("question", "--query_field", wanted.query_field, QUESTION_NAMES, questions)
    answers = fitting(wanted.answer_field, ANSWER_NAMES, question)
    answer = choose("answer", "--answer_field", wanted.answer_field, ANSWER_NAMES, answers)
    titles = [name for name in questions if plain_name(name) in TITLES and name not in (question, answer)]
    appends = plain_name(question) in INSTRUCTIONS and not wanted.query_field
    appended = next((name for name in questions if appends and plain_name(name) in INPUTS), None)
    taken = {question, answer, appended, *titles}
    rest = {name: short for name, short in zip(names, plain, strict=True) if name not in taken}
    in_words = holds_text(values[answer])  # numbers beside texts are ids
    negatives = [name for name, short in rest.items() if NEGATIVE_NAME.fullmatch(short)]
    label, is_score = _find_label(rest, values, wanted, no_header=plain == [str(i + 1) for i in range(len(plain))])
    off = {name: _off_words(short, values[name]) for name, short in rest.items()}
    return Columns(
        question=(question, *titles),
        answer=answer,
        negatives=tuple(name for name in negatives if holds_text(values[name]) or not in_words),
        appended=appended,
        similar=tuple(n for n, short in rest.items() if SIMILAR_NAME.fullmatch(short) and holds_text(values[n])),
        label=label,
        is_score=is_score,
        off={name: words for name, words in off.items() if words},
    )


def _find_label(
    rest: Mapping[str, str], values: Mapping[str, Sequence[Any]], wanted: Wanted, no_header: bool
) -> tuple[str | None, bool]:
    """The column that says whether the answer fits, and whether it says so by a number."""
    scores = {}
    for name in (name for name, short in rest.items() if no_header or LABEL_NAME.fullmatch(short)):
        words = {word(value) for value in values[name]} - {""}
        others = words - YES - NO
        if others and all(NUMBER.fullmatch(one) for one in words):
            scores[name] = sorted(map(float, words))
        elif words and (not others or (words & YES and words & NO and not no_header)):
            return name, False
    for name, numbers in scores.items():
        if wanted.min_label is None:
            lowest, highest = numbers[0], numbers[-1]
            least = highest * 0.8 if highest <= 1 else math.ceil(highest * 0.8)
            raise UserError(
                f"column '{name}' holds numbers from {lowest:g} to {highest:g}, which say neither yes nor no; add "
                f"--min_label {least:g}: rows at or above it are pairs, the others are left out ({lowest:g} takes all)"
            )
        return name, True
    return None, False


def _off_words(name: str, values: Sequence[Any]) -> frozenset[str]:
    """The values of a column of this name that take a row out; none where it holds none of these words."""
    words = {word(value) for value in values} - {""}
    for pattern, off, on in ((OFF_NAME, YES | OFF, NO | ON), (ON_NAME, NO | OFF, YES | ON), (STATUS_NAME, OFF, ON)):
        if pattern.fullmatch(name) and (words & off or (words and words <= off | on)):
            return off
    return frozenset()


def names_columns(cells: Sequence[Any], wanted: Wanted) -> bool:
    """Whether these cells of a table are names of columns, those of question and answer among them."""
    plain = {plain_name(cell) for cell in cells}
    questions = [plain_name(wanted.query_field)] if wanted.query_field else QUESTION_NAMES
    answers = [plain_name(wanted.answer_field)] if wanted.answer_field else ANSWER_NAMES
    found = plain.intersection(questions), plain.intersection(answers)
    return all(found) and len(found[0] | found[1]) > 1


def refuse_header(cells: Sequence[Any], wanted: Wanted) -> NoReturn:
    """Raise UnknownColumns that says whether these first cells are other names, or no names at all."""
    names = ["" if cell is None else str(cell) for cell in cells]
    if len(names) > 1 and any(len(name) > 24 or NO_NAME.search(name) or word(name) in YES | NO for name in names):
        shown = ", ".join(f"'{name[:30]}'" for name in names[:10])
        raise UnknownColumns(
            f"has no header line; the first row is {shown}; say which columns are question and answer, counted from 1, "
            "as --query_field 1 --answer_field 2 (the first row is then one like the others), or add a line with names"
        )
    find_columns(names, dict.fromkeys(names, ()), wanted)
    raise AssertionError(names)  # names_columns would have found them


def holds_yes_and_no(values: Sequence[Any]) -> bool:
    """Whether the cells hold both of the words and no other."""
    words = {word(value) for value in values} - {""}
    return words <= YES | NO and bool(words & YES) and bool(words & NO)
