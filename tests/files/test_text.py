"""When two texts are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_core.files.text import letters, normalize_text, text_id


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ＡＢＣ１２３", "ABC123"),  # full width and half width
        ("怎么办？（急）", "怎么办?(急)"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("怎么\u3000办", "怎么 办"),  # ideographic space
        (" 怎么\t\n 办\u00a0", "怎么 办"),
        ("ﬁ①", "fi1"),
    ],
)
def test_texts_that_are_the_same(first: str, second: str) -> None:
    assert normalize_text(first) == normalize_text(second) == second
    assert text_id(first) == text_id(second)


def test_texts_that_differ() -> None:
    texts = ["怎么办", "怎么 办", "怎么办。", "A", "a", "", "国", "國"]
    assert len({text_id(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("first", "second"), [("10⁶", "106"), ("5²", "52"), ("x³", "x3"), ("H₂O", "H2O"), ("10⁻³", "10-3"), ("aⁿ", "an")]
)
def test_superscripts_mean_something_else(first: str, second: str) -> None:
    assert text_id(first) != text_id(second) and letters(first) != letters(second)
    assert text_id(f"共１２㎡，{first}") == text_id(f"共12m²,{first}")  # what stands around them is folded


def test_text_id_is_the_same_everywhere_and_fits_int64() -> None:
    assert text_id("年费是多少") == 3508542199132850661
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(1000))


@given(st.text())
def test_normalize_text_is_idempotent(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert text_id(once) == text_id(text)
