"""Guards: is a candidate perhaps an answer, and so no negative? Decided from the texts alone, without a model.

    identical        the same letters and digits as a positive (width, case, script, spaces, punctuation do not count)
    same_question    a positive of a question that is the same, or nearly the same
    answer           holds the row's `answer`
    near_duplicate   says what a positive says in nearly the same words, or holds it, or is the better part of it

near_duplicates.py says when two texts are nearly the same. A candidate that lacks what the question names and the
positive holds is none.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bge_core.files.text import letters
from bge_core.mining.near_duplicates import NEAR_QUERY, NEAR_TEXT, Likeness

MIN_ANSWER = 2  # letters: a shorter answer stands in too many passages


@dataclass(frozen=True)
class GuardSettings:
    """Which guards stand; a threshold is a share from 0 to 1, and None switches its guard off."""

    identical: bool = True
    near_duplicate: float | None = NEAR_TEXT
    same_question: float | None = NEAR_QUERY
    answer: bool = True


class Guards:
    """Decides for each row of training data which candidates are no negatives.

    Args:
        queries: Q questions.
        positives: the texts that answer each.
        answers: for each row the spans that its answer consists of, if it states any.
        settings: which guards stand.
        pool: the candidates: what they have in common is no evidence.
        neighbours_QK: for each question the rows of those that an encoder finds most similar, -1 padded: where nearly
            the same questions are looked for. None: only the same ones are.
        seed: of the sample of a large pool.
    """

    def __init__(
        self,
        queries: Sequence[str],
        positives: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]],
        settings: GuardSettings,
        pool: Sequence[str],
        neighbours_QK: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.queries, self.settings = queries, settings
        self.likeness = Likeness(pool, seed)
        spans_of = [[self.likeness.form(span) for span in spans] for spans in answers]
        self.answers = [[span for span in spans if len(span) >= MIN_ANSWER] for spans in spans_of]
        self.positives = [list(dict.fromkeys(texts)) for texts in positives]
        self.others: list[list[str]] = [[] for _ in queries]  # positives of the same question in other rows
        if settings.same_question is None:
            return
        questions = Likeness(list(dict.fromkeys(queries)), seed)
        asked: defaultdict[str, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            asked[letters(query)].append(number)
        for number, query in enumerate(queries):
            same = set(asked[letters(query)])
            if neighbours_QK is not None:
                near = [row for row in neighbours_QK[number].tolist() if row >= 0 and row not in same]
                stack = questions.stack([queries[row] for row in near])
                close = questions.same_questions(query, stack, settings.same_question)
                same |= {row for row, is_same in zip(near, close.tolist(), strict=True) if is_same}
            others = dict.fromkeys(text for row in sorted(same) for text in positives[row])
            self.others[number] = [text for text in others if text not in self.positives[number]]

    def reasons(self, number: int, candidates: Sequence[str]) -> list[str | None]:
        """For each candidate the guard that says it may answer question `number`, or None."""
        own, others, form_of = self.positives[number], self.others[number], self.likeness.form
        forms = list(map(form_of, candidates))
        excluded = dict.fromkeys(map(form_of, others), "same_question")
        if self.settings.identical:
            excluded |= dict.fromkeys(map(form_of, own), "identical")
        reasons = [excluded.get(form) for form in forms]
        if self.settings.answer and self.answers[number]:
            for i, form in enumerate(forms):
                if reasons[i] is None and any(span in form for span in self.answers[number]):
                    reasons[i] = "answer"
        if self.settings.near_duplicate is not None:
            left = [i for i, reason in enumerate(reasons) if reason is None]
            stack = self.likeness.stack([candidates[i] for i in left])
            for known in (*own, *others):
                same = self.likeness.near_duplicates(known, stack, self.settings.near_duplicate)
                for j in np.flatnonzero(same).tolist():
                    if not self.likeness.lacks_subject(self.queries[number], known, stack.texts[j]):
                        reasons[left[j]] = "near_duplicate"
        return reasons
