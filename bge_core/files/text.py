"""When two texts are the same."""

import hashlib
import re
import unicodedata

_NO_LETTERS = re.compile(r"[\W_]+")


def normalize_text(text: str) -> str:
    """NFKC and single spaces: the form in which two texts are "the same" everywhere in this project."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def fold(text: str) -> str:
    """NFKC without case: what two texts share that differ in width and case only."""
    return unicodedata.normalize("NFKC", text).casefold()


def letters(text: str) -> str:
    """Letters and digits alone, folded: what two texts share that differ in form only."""
    return _NO_LETTERS.sub("", fold(text))


def text_id(text: str) -> int:
    """63-bit hash of the normalized text (blake2b); equal texts have equal ids in every process and every run."""
    digest = hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
