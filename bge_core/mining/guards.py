"""Guards: is a candidate perhaps an answer, and so no negative? Decided from the texts alone, without a model.

    identical        the same letters and digits as a positive (width, case, script, spaces, punctuation do not count)
    same_question    a positive of a question that is the same, or nearly the same
    answer           holds the row's `answer`
    near_duplicate   says what a positive says in nearly the same words, or holds it, or is the better part of it

Nearly the same words are no proof: 1998 for 1997, or one name for another, makes the best of all negatives. So two
texts that are close count as the same only if they agree on their facts, which are numbers, names and rare words. Where
each has a number, or each a name or rare word, that the other lacks, they speak of different things; so they do where
one denies what the other says (不支持, 支持), where opposites stand against each other (前, 后), and where the question
names something that the positive holds and the candidate does not.

    close(p, c)  =  max(edit ratio of the letters, token-set ratio of the words) >= threshold
    same(p, c)   =  close(p, c) and not facts_differ(p, c)

The token-set ratio does not see the order of the words, and is 1 where one text holds all words of the other. Questions
are compared by the token-sort ratio, which has no such mercy, must not ask for different things (who, when, ...), and
must name the same things: 退货几天 and 金卡退货几天 have two answers.
"""

import functools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_core.files.text import fold, letters
from bge_core.mining.near_duplicates import alike, holds_number, numbers, with_digits

MIN_ANSWER = 2  # letters: a shorter answer stands in too many passages
MAX_SAMPLE = 50_000  # texts to count words in
RARE = 1 / 2000  # a word in a smaller share of the texts is rare
MIN_PART = 0.5  # a candidate this much shorter than the positive is no duplicate, even if the positive holds it
SUBJECT = 3  # letters that a question and its answer both begin with: of two, most are words and no names
_TITLE = re.compile(r"《([^《》]+)》")
_LATIN = re.compile(r"[a-z][a-z0-9]*")
_ASKS = {  # what a question asks for: its shortest form, and the others
    "何人": re.compile("谁|何人|哪位|哪个人|什么人"),
    "何时": re.compile("何时|什么时[候间]|哪一?年|何年|哪一?天|几[年月日号点]"),
    "何处": re.compile("哪里|哪儿|何处|何地|什么地[方点]"),
    "何故": re.compile("为什么|为何|缘何|什么原因"),
    "几何": re.compile("多少|几[个位种条座层名家岁届部次]?"),
}
_POLITE = re.compile("请问|[吗呢呀啊吧]?[？?]")
_NEGATION = re.compile("(?:没有?|不|未|无法?|勿)(.*)")
_OPPOSITES = "前后 上下 内外 左右 开关 退换 增减 升降 进出 买卖 借还 存取 收付 男女 高低 多少 大小 长短 早晚 日周月季年"
_GENERIC = "时候 时间 意思 方法 办法 方式 原因 地方 名字 名称 问题 情况 东西 内容 年份 日期 多久 人 个 次"
_NAME_TAGS = frozenset(("nr", "ns", "nt", "nz"))  # of people, places, organizations and others
_FUNCTION = frozenset("的地得了着过在于与和及或是为则也都并而且又被把将对向从到由以其之这那该有等所就还")


def words(text: str) -> str:
    """The words of a text that carry meaning, joined by spaces, as Chinese is segmented by jieba's dictionary."""
    import rjieba

    found = (word.strip() for word in rjieba.cut(fold(text)))
    return " ".join(word for word in found if any(map(str.isalnum, word)) and not _FUNCTION.issuperset(word))


@functools.cache
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def _simplified(text: str) -> str:
    """Folded, in simplified characters."""
    simplified: str = _converter().convert(fold(text))
    return simplified


def asks(question: str) -> frozenset[str]:
    """What a question asks for, as far as its words say: 何人, 何时, 何处, 何故, 几何."""
    return frozenset(kind for kind, form in _ASKS.items() if form.search(question))


def plain_question(question: str) -> str:
    """The question with one word for each thing asked for, and without courtesies."""
    for kind, form in _ASKS.items():
        question = form.sub(kind, question)
    return _POLITE.sub("", question)


def common_words(texts: Sequence[str], seed: int = 0) -> frozenset[str]:
    """The words that at least one of 2,000 texts holds, counted on a sample: all others are rare.

    Few texts cannot tell: there, too, verbs and the like are common that stand in one text alone.
    """
    import rjieba

    chosen = random.Random(seed).sample(range(len(texts)), min(len(texts), MAX_SAMPLE))
    counts = Counter(word for i in chosen for word in set(words(texts[i]).split()))
    common = {word for word, count in counts.items() if count >= max(2, RARE * len(chosen))}
    if RARE * len(chosen) < 2:
        common.update(word for word in counts if not any(_names_something(tag) for _, tag in rjieba.tag(word)))
    return frozenset(common)


def _names_something(tag: str) -> bool:
    """Whether jieba's tag is that of a noun, a time, a place, a direction, a number, or of another script."""
    return tag[0] in "ntsfmjb" or tag in ("eng", "x")


def opposed(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two texts, given as words, denies a word of the other, or opposites stand against each other."""
    for ours, theirs in ((one, other), (other, one)):
        denied, denied_there, text = _denied(ours), _denied(theirs), " ".join(theirs)
        if any(word in text and word not in denied_there for word in denied):
            return True
    alone = ["".join(set(ours) - set(theirs)) for ours, theirs in ((one, other), (other, one))]
    for kind in _OPPOSITES.split():
        here, there = (set(kind) & set(text) for text in alone)
        if here and there and not here & there:
            return True
    return False


def _denied(words: Sequence[str]) -> set[str]:
    """The words behind a negation: 支持 of 不支持."""
    found = zip(words, [*words[1:], ""], strict=True)
    return {match[1] or after for word, after in found if (match := _NEGATION.fullmatch(word))} - {""}


@dataclass(frozen=True)
class GuardSettings:
    """Which guards stand; a threshold is a ratio from 0 to 1, and None switches its guard off."""

    identical: bool = True
    near_duplicate: float | None = 0.85
    same_question: float | None = 0.85
    answer: bool = True


class Guards:
    """Decides for each row of training data which candidates are no negatives.

    Args:
        queries: Q questions.
        positives: the texts that answer each.
        answers: for each row the spans that its answer consists of, if it states any.
        settings: which guards stand.
        common: words that are no names, see `common_words`.
        neighbours_QK: for each question the rows of those that an encoder finds most similar, -1 padded: where nearly
            the same questions are looked for. None: only the same ones are.
    """

    def __init__(
        self,
        queries: Sequence[str],
        positives: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]],
        settings: GuardSettings,
        common: frozenset[str] = frozenset(),
        neighbours_QK: np.ndarray | None = None,
    ) -> None:
        self.queries, self.settings, self.common = queries, settings, common
        self._forms = functools.lru_cache(maxsize=200_000)(self._find_forms)
        self._facts = functools.lru_cache(maxsize=200_000)(self._find_facts)
        self._named = functools.lru_cache(maxsize=200_000)(self._find_named)
        spans_of = [[self._forms(span)[0] for span in spans] for spans in answers]
        self.answers = [[span for span in spans if len(span) >= MIN_ANSWER] for spans in spans_of]
        self.positives = [list(dict.fromkeys(texts)) for texts in positives]
        self.others: list[list[str]] = [[] for _ in queries]  # positives of the same question in other rows
        if settings.same_question is None:
            return
        asked: defaultdict[str, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            asked[letters(query)].append(number)
        for number, query in enumerate(queries):
            same = set(asked[letters(query)])
            if neighbours_QK is not None:
                near = [row for row in neighbours_QK[number].tolist() if row >= 0 and row not in same]
                close = self._same([query], [queries[row] for row in near], settings.same_question, questions=True)
                same |= {row for row, is_same in zip(near, close[0], strict=True) if is_same}
            others = dict.fromkeys(text for row in sorted(same) for text in positives[row])
            self.others[number] = [text for text in others if text not in self.positives[number]]

    @staticmethod
    def _find_forms(text: str) -> tuple[str, str]:
        """A text's letters, and its words, with numbers in digits."""
        text = with_digits(_simplified(text))
        return letters(text), words(text)

    def _find_facts(self, text: str) -> tuple[str, frozenset[str], frozenset[str]]:
        """A text's letters, its numbers, and its names and rare words."""
        import rjieba

        clean = _simplified(text)
        tagged = [word.strip("".join(_FUNCTION)) for word, tag in rjieba.tag(clean) if tag[:2] in _NAME_TAGS]
        rare = [word for word in self._forms(text)[1].split() if word not in self.common and not holds_number(word)]
        names = [letters(name) for name in (*tagged, *rare, *_TITLE.findall(clean), *_LATIN.findall(clean))]
        return letters(clean), numbers(clean), frozenset(filter(None, names))

    def _lacks_subject(self, query: str, positive: str, candidate: str) -> bool:
        """Whether the question names something that the positive holds and the candidate does not.

        Names are those of `_find_facts`, and what question and positive both begin with: a name may be made of common
        words, and begins as it does in one place only.
        """
        (asked, _, names), (there, *_), (here, *_) = map(self._facts, (query, positive, candidate))
        named = names | {asked[:SUBJECT]} if there[:SUBJECT] == asked[:SUBJECT] else names
        return any(name in there and name not in here for name in named)

    def facts_differ(self, one: str, other: str) -> bool:
        """Whether each text has a number, or each a name or rare word, that the other lacks, or they are opposed."""
        (plain_one, numbers_one, names_one), (plain_other, numbers_other, names_other) = map(self._facts, (one, other))
        if numbers_one - numbers_other and numbers_other - numbers_one:
            return True
        if opposed(self._forms(one)[1].split(), self._forms(other)[1].split()):
            return True
        return any(name not in plain_other for name in names_one) and any(name not in plain_one for name in names_other)

    def questions_differ(self, one: str, other: str) -> bool:
        """Whether one question names something, be it a common thing, that the other does not."""
        (plain_one, named_one), (plain_other, named_other) = map(self._named, (one, other))
        return any(name not in plain_other for name in named_one) or any(name not in plain_one for name in named_other)

    def _find_named(self, question: str) -> tuple[str, frozenset[str]]:
        """A question's letters, and what it names."""
        import rjieba

        clean = self._forms(question)[0]
        names = {word for word, tag in rjieba.tag(clean) if _names_something(tag)}
        return clean, frozenset(names - {*_GENERIC.split(), *_ASKS})

    def _same(
        self, texts: Sequence[str], candidates: Sequence[str], threshold: float, questions: bool = False
    ) -> np.ndarray:
        """(texts, candidates) bool: close in letters or words, and no fact differs."""
        if questions:
            texts, candidates = list(map(plain_question, texts)), list(map(plain_question, candidates))
        ours, theirs = list(map(self._forms, texts)), list(map(self._forms, candidates))
        found = np.zeros((len(texts), len(candidates)), dtype=bool)
        for form, by in ((0, "letters"), (1, "words" if questions else "set of words")):
            found |= alike([one[form] for one in ours], [other[form] for other in theirs], threshold, by=by) > 0
        for i, j in np.argwhere(found).tolist():
            one, other = texts[i], candidates[j]
            if questions:
                fits = not (asks(one) and asks(other) and asks(one) != asks(other))
                fits = fits and not self.questions_differ(one, other)
            else:
                fits = len(self._forms(other)[0]) >= MIN_PART * len(self._forms(one)[0])
            found[i, j] = fits and not self.facts_differ(one, other)
        return found

    def reasons(self, number: int, candidates: Sequence[str]) -> list[str | None]:
        """For each candidate the guard that says it may answer question `number`, or None."""
        own, others = self.positives[number], self.others[number]
        forms = [self._forms(text)[0] for text in candidates]
        excluded = dict.fromkeys((self._forms(text)[0] for text in others), "same_question")
        if self.settings.identical:
            excluded |= dict.fromkeys((self._forms(text)[0] for text in own), "identical")
        reasons = [excluded.get(form) for form in forms]
        if self.settings.answer and self.answers[number]:
            for i, form in enumerate(forms):
                if reasons[i] is None and any(span in form for span in self.answers[number]):
                    reasons[i] = "answer"
        if self.settings.near_duplicate is not None:
            left = [i for i, reason in enumerate(reasons) if reason is None]
            known = [*own, *others]
            same = self._same(known, [candidates[i] for i in left], self.settings.near_duplicate)
            for i, j in np.argwhere(same).tolist():
                if not self._lacks_subject(self.queries[number], known[i], candidates[left[j]]):
                    reasons[left[j]] = "near_duplicate"
        return reasons
