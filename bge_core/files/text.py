"""When two texts are the same."""

import hashlib
import re
import unicodedata

_NO_LETTERS = re.compile(r"[\W_]+")
_UNITS = str.maketrans(
    {"㎟": "mm²", "㎠": "cm²", "㎡": "m²", "㎢": "km²"} | {"㎣": "mm³", "㎤": "cm³", "㎥": "m³", "㎦": "km³"}
)
_RAISED = re.compile("([²³¹⁰-ₜ㎟-㎦]+)")  # superscripts, subscripts, and what holds some: NFKC would make 106 of 10⁶


def _nfkc(text: str) -> str:
    """NFKC of all but superscripts and subscripts, which mean something else than the characters they fold to."""
    parts = _RAISED.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    parts[1::2] = [part.translate(_UNITS) for part in parts[1::2]]
    return "".join(parts)


def normalize_text(text: str) -> str:
    """NFKC (superscripts stay) and single spaces: the form in which two texts are "the same" in this project."""
    return " ".join(_nfkc(text).split())


def fold(text: str) -> str:
    """NFKC (superscripts stay) without case: what two texts share that differ in width and case only."""
    return _nfkc(text).casefold()


def letters(text: str) -> str:
    """Letters and digits alone, folded: what two texts share that differ in form only."""
    return _NO_LETTERS.sub("", fold(text))


def text_id(text: str) -> int:
    """63-bit hash of the normalized text (blake2b); equal texts have equal ids in every process and every run."""
    digest = hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
