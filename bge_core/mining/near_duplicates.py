"""Whether two texts say the same: how much of what tells texts apart they share, and whether their facts agree.

    w(t)         =  ln((N + 1) / n(t))                       of the N texts of a set n(t) hold the term t
    containment  =  w(A & B) / min(w(A), w(B))               w of a set of terms: their sum
    resemblance  =  w(A & B) / w(A | B)

Terms are characters, Latin words and numbers. What all texts of the set have in common, as a polite frame around every
answer, weighs nothing.

Nearly the same words are no proof: 1998 for 1997, or one name for another, makes another fact. So texts that are close
are the same only if not each of them says something that counts more often than the other says it. Numbers, Latin
words and names count; other words do if they are rare, w(t) >= RARE * ln(N + 1). Nor may one deny what the other says.

Source: w: inverse document frequency, Spaerck Jones 1972. Containment and resemblance: Broder 1997, here with weights.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bge_core.files.text import fold, letters

NEAR_TEXT, NEAR_QUERY = 0.82, 0.8  # containment of two passages, resemblance of two questions: the defaults
RARE = 0.75  # of the most that a word can weigh
MIN_PART = 0.4  # of a text's weight; what holds less of it is no duplicate, though it may be part of it
MIN_SHARED = 1.5  # in units of ln(N + 1): less in common is no evidence
MIN_TEXTS = 1000  # fewer texts cannot tell that a word is rare
MAX_SAMPLE = 50_000  # texts to count in
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?[万亿]?|[零〇一二两三四五六七八九十百千万亿]+")
_DIGITS = {char: value for value, chars in enumerate(("零〇", "一", "二两", *"三四五六七八九")) for char in chars}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHARACTER = "\u3040-\u30ff\u3400-\u9fff"
_FACT = re.compile(rf"\d+(?:\.\d+)?|[^\W\d_{_CHARACTER}]+")
_STATED = re.compile(r"\d+(?:\.\d+)?|[a-z]+")  # facts that are no Chinese number, whose 一 need not be one
_TERM = re.compile(rf"[{_CHARACTER}]|{_FACT.pattern}")
_NAMES = ("nr", "ns", "nt", "nz")  # jieba's tags of people, places, organizations and others
_DENIED = re.compile("(?:不|没有?|未|无|勿|别)(..)")


class _Said(NamedTuple):
    """What a text says: its letters, its facts and other words (True: a name), and what it denies and nowhere says."""

    letters: str
    facts: Counter[str]
    words: dict[str, bool]
    denied: frozenset[str]


class Stacked(NamedTuple):
    """Texts with their forms, the numbers of all their terms, the row of each, and (m,) w of each row."""

    texts: Sequence[str]
    forms: Sequence[str]
    numbers: np.ndarray
    rows: np.ndarray
    weights: np.ndarray


class Likeness:
    """Compares texts by what tells those of a set apart.

    Args:
        texts: the set; of more than MAX_SAMPLE a sample is counted.
        seed: of the sample.
    """

    def __init__(self, texts: Sequence[str], seed: int = 0) -> None:
        chosen = random.Random(seed).sample(range(len(texts)), min(len(texts), MAX_SAMPLE))
        self._sample = [texts[i] for i in chosen]
        counts = Counter(term for text in self._sample for term in set(_TERM.findall(plain(text))))
        self.most = math.log(len(chosen) + 1)  # ln(N + 1): what a term weighs that one text has, or none
        self._number_of = {term: number for number, term in enumerate(counts)}
        others = np.maximum(1, np.fromiter(counts.values(), dtype=np.float64, count=len(counts)) - 1)
        self._weights = self.most - np.log(others)
        self._is_own = np.zeros(len(counts), dtype=bool)  # scratch: of each term, whether the text at hand has it
        self._terms = functools.lru_cache(maxsize=200_000)(self._find_terms)
        self._said = functools.lru_cache(maxsize=20_000)(_find_said)

    def form(self, text: str) -> str:
        """The text's letters and digits, in simplified characters, with numbers in digits."""
        return self._terms(text)[0]

    def stack(self, texts: Sequence[str]) -> Stacked:
        """Texts made ready to be compared with others."""
        found = [self._terms(text) for text in texts]
        forms, numbers_of = [form for form, _ in found], [numbers for _, numbers in found]
        if num_new := len(self._number_of) - len(self._weights):  # terms that the set does not have
            self._weights = np.concatenate([self._weights, np.full(num_new, self.most)])
            self._is_own = np.zeros(len(self._weights), dtype=bool)
        numbers = np.concatenate([*numbers_of, np.zeros(0, dtype=np.int32)])
        rows = np.repeat(np.arange(len(texts)), list(map(len, numbers_of)))
        return Stacked(texts, forms, numbers, rows, np.bincount(rows, self._weights[numbers], minlength=len(texts)))

    def containment(self, text: str, others: Stacked) -> np.ndarray:
        """(m,) w(A & B) / min(w(A), w(B)); 0 where they share too little."""
        own, shared = self._shared(text, others)
        enough = (shared >= MIN_SHARED * self.most) & (shared >= MIN_PART * own)
        return np.where(enough, shared / np.maximum(np.minimum(own, others.weights), 1e-9), 0.0)

    def near_duplicates(self, text: str, others: Stacked, at_least: float) -> np.ndarray:
        """(m,) bool: has the same letters, or a containment of `at_least` and no other facts."""
        return self._confirm(text, others, self.containment(text, others) >= at_least)

    def same_questions(self, text: str, others: Stacked, at_least: float) -> np.ndarray:
        """(m,) bool: has the same letters, or a resemblance of `at_least` and no other facts, nor any more of them.

        resemblance = w(A & B) / w(A | B). Resets of iPhone 15 and iPhone 15 Pro have two answers.
        """
        own, shared = self._shared(text, others)
        found = self._confirm(text, others, shared >= at_least * np.maximum(own + others.weights - shared, 1e-9))
        for i in np.flatnonzero(found).tolist():
            pair = (text, others.texts[i]), (others.texts[i], text)
            found[i] = all(set(_STATED.findall(fold(one))) <= {*self._said(other).facts} for one, other in pair)
        return found

    def facts_differ(self, one: str, other: str) -> bool:
        """Whether each says more often than the other something that counts, or one denies what the other says."""
        ours, theirs = self._said(one), self._said(other)
        for here, there in ((ours, theirs), (theirs, ours)):
            if any(word in there.letters and word not in there.denied for word in here.denied):
                return True
        return min(self._says_more(ours, theirs), self._says_more(theirs, ours)) >= RARE

    def lacks_subject(self, question: str, answer: str, other: str) -> bool:
        """Whether `other` lacks what `question` and `answer` name: of the words in both, one of the heaviest."""
        asked, here, there = self._said(question), self._said(answer).letters, self._said(other).letters
        weights = {word: self._weight(word) for word in asked.words if word in here}
        least = RARE * max(weights.values(), default=0.0)
        return any(weight >= least and word not in there for word, weight in weights.items())

    def _shared(self, text: str, others: Stacked) -> tuple[float, np.ndarray]:
        """w(A) and (m,) w(A & B)."""
        own = self.stack([text])
        self._is_own[own.numbers] = True
        weights = self._weights[others.numbers] * self._is_own[others.numbers]
        self._is_own[own.numbers] = False
        return float(own.weights[0]), np.bincount(others.rows, weights, minlength=len(others.texts))

    def _confirm(self, text: str, others: Stacked, close: np.ndarray) -> np.ndarray:
        """(m,) bool: has the same letters, or is close and has no other facts."""
        form = self.form(text)
        found = np.array([form != "" and other == form for other in others.forms], dtype=bool)
        for i in np.flatnonzero(close & ~found).tolist():
            found[i] = not self.facts_differ(text, others.texts[i])
        return found

    def _find_terms(self, text: str) -> tuple[str, np.ndarray]:
        """A text's form, and the numbers of its terms."""
        clean = plain(text)
        numbers = {self._number_of.setdefault(term, len(self._number_of)) for term in _TERM.findall(clean)}
        return letters(clean), np.array(sorted(numbers), dtype=np.int32)

    @functools.cached_property
    def _word_counts(self) -> Counter[str]:
        return Counter(word for text in self._sample for word in _words(plain(text)))

    def _weight(self, word: str) -> float:
        return self.most - math.log(max(1, self._word_counts[word] - 1))

    def _says_more(self, here: _Said, there: _Said) -> float:
        """The weight of the heaviest that `here` says more often than `there`, as a share of the most."""
        if here.facts - there.facts:
            return 1.0
        heaviest, most = 0.0, max(self.most, math.log(MIN_TEXTS + 1))
        for word, is_name in here.words.items():
            if word not in here.facts and here.letters.count(word) > there.letters.count(word):
                heaviest = max(heaviest, 1.0 if is_name else self._weight(word) / most)
        return heaviest


@functools.cache
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def plain(text: str) -> str:
    """Folded, in simplified characters, with numbers in digits."""
    simplified: str = _converter().convert(fold(text))
    return with_digits(simplified)


def _words(clean: str) -> dict[str, bool]:
    """The words and facts of a plain text, segmented by jieba's dictionary, and whether each is a name."""
    import rjieba

    words = dict.fromkeys(_FACT.findall(clean), False)
    for word, tag in rjieba.tag(clean):
        form = word if word.isalnum() else letters(word)
        if form and not _FACT.search(form):
            words[form] = words.get(form, False) or (tag[:2] in _NAMES and len(form) > 1)
    return words


def _find_said(text: str) -> _Said:
    clean = plain(text)
    form, words, denied = letters(clean), _words(clean), Counter(_DENIED.findall(letters(clean)))
    only_denied = frozenset(word for word, count in denied.items() if form.count(word) == count)
    return _Said(form, Counter(_FACT.findall(clean)), words, only_denied)


def with_digits(text: str) -> str:
    """The text with its numbers in digits: 一九九八年 as 1998年, 三百 as 300, 1.2万 as 12000."""
    return _NUMBER.sub(lambda found: _value(found[0]), text)


def _value(number: str) -> str:
    number = number.replace(",", "")
    if number[0].isdigit():
        whole, _, part = number.rstrip("万亿").partition(".")
        zeros = 4 * number.count("万") + 8 * number.count("亿")
        digits = whole + part.ljust(zeros, "0")[:zeros] if zeros else whole
        rest = part[zeros:].rstrip("0") if zeros else part
        return (digits.lstrip("0") or "0" if zeros else digits) + (f".{rest}" if rest else "")
    if not set(number) & {*_UNITS, "万", "亿"}:
        return "".join(str(_DIGITS[char]) for char in number).lstrip("0") or "0"
    high, total, section, digit = 0, 0, 0, 0
    for char in number:
        if char in _DIGITS:
            digit = _DIGITS[char]
        elif char == "亿":
            high, total, section, digit = high + (total + section + digit or 1) * 10**8, 0, 0, 0
        elif char == "万":
            total, section, digit = total + (section + digit or 1) * 10**4, 0, 0
        else:
            section, digit = section + (digit or 1) * _UNITS[char], 0
    return str(high + total + section + digit)
