"""How alike two texts are, by letters or by words, and which numbers they hold: 1998 for 1997 is another fact."""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from bge_core.files.text import letters

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|[零〇一二两三四五六七八九十百千万亿]+")
_DIGITS = {char: value for value, chars in enumerate(("零〇", "一", "二两", *"三四五六七八九")) for char in chars}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_letters = functools.lru_cache(maxsize=200_000)(letters)


def alike(
    texts: Sequence[str],
    others: Sequence[str],
    at_least: float = 0.0,
    *,
    by: str = "letters",
    workers: int = 1,
) -> np.ndarray:
    """(n, m) float32: how much of two texts agrees, from 0 to 1; 0 where it is less than `at_least`.

    letters        2 * (letters in the same order) / (letters of both)
    words          the same of the words, sorted: their order does not count
    set of words   likewise, and 1 where one text has all words of the other
    """
    from rapidfuzz import fuzz, process

    if not texts or not others:
        return np.zeros((len(texts), len(others)), dtype=np.float32)
    scorer = {"letters": fuzz.ratio, "words": fuzz.token_sort_ratio, "set of words": fuzz.token_set_ratio}[by]
    found: np.ndarray = process.cdist(texts, others, scorer=scorer, score_cutoff=100 * at_least, workers=workers)
    return found / np.float32(100)


def nearly_same(texts: Sequence[str], others: Sequence[str], at_least: float, *, workers: int = 1) -> np.ndarray:
    """(n, m) bool: the letters are the same, or as much alike as asked for, and then the numbers are the same."""
    ours, theirs = list(map(_letters, texts)), list(map(_letters, others))
    found = alike(ours, theirs, at_least, workers=workers) > 0
    for i, j in np.argwhere(found).tolist():
        same = ours[i] == theirs[j] or numbers(texts[i]) == numbers(others[j])
        found[i, j] = same and ours[i] != ""
    return found


def numbers(text: str) -> frozenset[str]:
    """The numbers of a text, in digits: 1998年, 一九九八年 and １９９８ have the same."""
    return frozenset(_value(number) for number in _NUMBER.findall(unicodedata.normalize("NFKC", text)))


def with_digits(text: str) -> str:
    """The text with its numbers in digits."""
    return _NUMBER.sub(lambda found: _value(found[0]), text)


def holds_number(text: str) -> bool:
    """Whether there is any number."""
    return _NUMBER.search(text) is not None


def _value(number: str) -> str:
    number = number.replace(",", "")
    if number[0].isdigit():
        return number
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
