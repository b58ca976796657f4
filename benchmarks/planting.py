"""Texts of which it is known what they are, planted among real questions and sentences: for false_negatives.py.

    reworded, duplicate, asked twice    the answer in other words, marks or questions: no negative (rewriting.py)
    near miss                           one number or name exchanged: a negative, and a hard one

Whether a clause holds the answer, and which span a question asks for, is told by the question's word (who, where, when,
how many) and by there being a single span of its kind; all else is left alone. The same rows, corpus and seed give the
same texts.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import rewriting
from harness import Row
from rewriting import WORDS, Maker, Source, at_least, tagged

NUM_FALSE, NUM_NEAR = 2000, 500
NUMBER = r"(?<![\d.,A-Za-z])\d[\d,]*(?:\.\d+)?[万亿]?(?![\d.A-Za-z])"
CHINESE_NUMBER = r"[一二两三四五六七八九十百千万亿]+"
TIME = r"(?:[\d〇零一二三四五六七八九十元]+(?:年代?|月|日|号|世纪)[初末]?)+"
TITLE = r"《[^《》\n]{2,20}》"
DOTTED = r"[\u4e00-\u9fff]{1,8}(?:·[\u4e00-\u9fff]{1,8})+"
UNIT = r"(?:多少|几)(公里|平方公里|公尺|公分|厘米|小时|分钟|英里|美元|港元|[^？?是的，\s])"
SUBJECT = r"([\u4e00-\u9fff]{3,10}?)(?=（|\(|是[一由位]|位于|，(?:又|俗|亦|也|是|为|简称))"
ORGANIZATION = r"(?:大学|学院|公司|银行|铁路局|电视台|委员会|中学|俱乐部|协会|医院|国家队|足球队)$"
PEOPLE, SURNAMES = WORDS["people"].split(), WORDS["surnames"]
GROUPS = [WORDS[name].split() for name in ("countries", "provinces", "cities")]

# -------------------------------------------------------------------------------------------- what a question asks for


def is_person(word: str) -> bool:
    """A name in Chinese form that is no other word."""
    return word in PEOPLE or (len(word) == 3 and word[0] in SURNAMES and not set(word) & set(WORDS["no_name"]))


def people_of(text: str) -> list[str]:
    """All that may be a person's name."""
    words = [word for word, tag in tagged(text) if tag in ("nr", "nrt", "nrfg") and len(word) > 1]
    return words + re.findall(DOTTED, text)


def places_of(text: str) -> list[str]:
    """All that may be a place."""
    return [word for word, tag in tagged(text) if (tag == "ns" and len(word) > 1) or place_group(word)]


def place_group(word: str) -> list[str]:
    """What may stand for a place: its group."""
    return next((group for group in GROUPS if word in group), [])


def numbers_of(query: str, text: str) -> list[str]:
    """The numbers outside dates, with the unit that the question names."""
    text, unit = re.sub(TIME, "，", text), re.search(UNIT, query)
    if unit is None:
        return re.findall(NUMBER, text)
    return [n + unit[1] for n in re.findall(rf"({NUMBER}|{CHINESE_NUMBER})\s?多?(?={re.escape(unit[1])})", text)]


def asked_for(query: str, positive: str) -> tuple[str, str] | None:
    """Kind and text of the only span that can be the answer; None where question or text leave a doubt."""
    kinds = [kind for kind, pattern in WORDS["asked"].items() if re.search(pattern, query)]
    if len(kinds) != 1:
        return None
    find: dict[str, Callable[[], list[str]]] = {
        "time": lambda: re.findall(TIME, positive),
        "count": lambda: numbers_of(query, positive),
        "person": lambda: people_of(positive),
        "place": lambda: places_of(positive),
        "title": lambda: re.findall(TITLE, positive),
    }
    spans = {span for span in find[kinds[0]]() if span not in query}
    return (kinds[0], spans.pop()) if len(spans) == 1 else None


def last_clause_cut(source: Source, rng: random.Random) -> str | None:
    """Without its last clause, where the only span that can be the answer stands before it."""
    clauses, asked = rewriting.clauses_of(source.positive), asked_for(source.query, source.positive)
    if len(clauses) < 3 or asked is None or source.positive[-1] != "。":
        return None
    kept, cut = "，".join(clauses[:-1]) + "。", clauses[-1]
    shared = any(source.query[i : i + 2] in cut for i in range(len(source.query) - 1))
    return kept if asked[1] in kept and asked[1] not in cut and not shared and len(cut) >= 5 else None


# --------------------------------------------------------------------------------------------------------- near misses


def subject_of(query: str, positive: str) -> str:
    """The name that the positive begins with, if the question is about it."""
    match, bad = re.match(SUBJECT, positive), {"c", "d", "p", "r", "v", "m", "t", "f", "uj", "ul", "u", "zg"}
    if match is None or match[1] not in query or any(tag in bad for _, tag in tagged(match[1])):
        return ""
    return match[1]


def organizations_of(text: str) -> list[str]:
    """Institutions by the words' own tags, with the kind of institution as their end."""
    return [word for word, tag in tagged(text) if tag == "nt" and len(word) >= 4 and re.search(ORGANIZATION, word)]


class Names:
    """What stands elsewhere in the corpus, by kind: all names and numbers that may stand for another."""

    def __init__(self, sources: Sequence[Source], corpus: Sequence[str]) -> None:
        self.text = text = "\n".join(corpus)
        self.years = sorted(set(re.findall(r"(?<!\d)\d{3,4}(?=年)", text)))
        self.titles = sorted(set(re.findall(TITLE, text)))
        self.people = [name for name in PEOPLE if name in text]
        organizations, subjects, counts = defaultdict(set), defaultdict(set), defaultdict(set)
        for sentence in corpus:
            for word in organizations_of(sentence):
                organizations[word[-2:]].add(word)
            numbers = rf"({NUMBER}|{CHINESE_NUMBER})(公里|[\u4e00-\u9fff])"
            for number, unit in re.findall(numbers, re.sub(TIME, "，", sentence)):
                counts[unit].add(number)
        for source in sources:
            if subject := subject_of(source.query, source.positive):
                subjects[subject[-2:]].add(subject)
        self.organizations, self.subjects, self.counts = (
            {key: sorted(words) for key, words in table.items()} for table in (organizations, subjects, counts)
        )

    def other_years(self, old: str) -> list[str]:
        """Times of the same form, up to 15 years away."""
        year = re.match(r"(\d{3,4})年(代?)", old)
        if year is None:
            return []
        near = [y for y in self.years if 0 < abs(int(y) - int(year[1])) <= 15 and len(y) == len(year[1])]
        return [y + old[len(year[1]) :] for y in near if not year[2] or y[-1] == "0"]

    def other_counts(self, old: str) -> list[str]:
        """Numbers with as many digits, of the same unit."""
        match = re.match(rf"{NUMBER}|{CHINESE_NUMBER}", old)
        assert match is not None
        number, rest = match[0], old[match.end() :]
        unit = rest.strip()
        known = self.counts.get(unit if unit in self.counts else unit[:1], [])
        if not unit:
            known = sorted(set().union(*self.counts.values()))
        if number[0].isdigit():
            shape = re.sub(r"\d", "0", number)
            known = [n for n in known if re.sub(r"\d", "0", n) == shape]
        else:
            known = [n for n in known if re.fullmatch(r"[两二三四五六七八九十]+", n) and len(n) == len(number)]
        same = {number, number.translate(str.maketrans("二两", "两二"))}
        return [n + rest for n in known if n not in same] if number != "一" else []

    def other(self, kind: str, old: str, source: Source, rng: random.Random) -> str | None:
        """Another of the same kind that stands elsewhere in the corpus and in neither question nor positive."""
        of_kind: dict[str, Callable[[], list[str]]] = {
            "time": lambda: self.other_years(old),
            "count": lambda: self.other_counts(old),
            "person": lambda: self.people if is_person(old) else [],
            "place": lambda: [place for place in place_group(old) if place in self.text],
            "title": lambda: self.titles,
            "organization": lambda: self.organizations.get(old[-2:], []),
            "subject": lambda: self.subjects.get(old[-2:], []),
        }
        both = source.query + source.positive
        names = [name for name in of_kind[kind]() if name not in both and name not in old and old not in name]
        return rng.choice(names) if names else None


def answer(kind: str, names: Names) -> Maker:
    """The span that the question asks for, exchanged."""

    def make(source: Source, rng: random.Random) -> str | None:
        text, asked = source.positive, asked_for(source.query, source.positive)
        if asked is None or asked[0] != kind:
            return None
        old = asked[1]
        if kind == "place":  # a place asked for is often given more closely than by the one name in the text
            country = re.search("哪个国家|哪国", source.query)
            if place_group(old) != GROUPS[0] if country else not re.search(rf"[于在到往]{old}(?:[，。；]|$)", text):
                return None
        if kind == "person" and re.search(rf"[{SURNAMES}·]{old}|{old}[·车路站]", text):
            return None
        whole = rf"(?<![\d.,]){re.escape(old)}(?!\d)" if old[0].isdigit() else re.escape(old)
        ranged = rf"[到至~～－第/–-]\s?{whole}|{whole}\s?[到至~～－-]"
        if kind in ("count", "time") and re.search(ranged, text):
            return None
        new = names.other(kind, old, source, rng)
        return re.sub(whole, lambda _: new, text) if new else None

    return make


def topic(kind: str, names: Names) -> Maker:
    """What the question is about, exchanged."""

    def find(query: str, text: str) -> list[str]:
        if kind == "time":
            return re.findall(r"(?<![\d－\-–—~～至到/])\d{4}年代?(?!\s?[－\-–—~～至到])", text)
        if kind == "person":
            return [n for n in people_of(text) if is_person(n) and not re.search(rf"·{n}|{n}[·车路站二]", text)]
        if kind == "place":  # only as what both begin with: elsewhere it is often no part of what is asked
            return [name for name in places_of(text) if text.startswith(name) and query.startswith(name)]
        if kind == "title":
            return re.findall(TITLE, text)
        return organizations_of(text) if kind == "organization" else [subject_of(query, text)]

    def make(source: Source, rng: random.Random) -> str | None:
        shared = {name for name in find(source.query, source.positive) if name and name in source.query}
        if len(shared) != 1:
            return None
        old = shared.pop()
        new = names.other(kind, old, source, rng)
        return source.positive.replace(old, new) if new else None

    return make


# -------------------------------------------------------------------------------------------------------- the planting

REWORDED: dict[str, Maker] = {
    "synonyms": at_least(2, rewriting.exchange),
    "function words": at_least(2, rewriting.change_function_words),
    "clause order": rewriting.clause_order,
    "leading phrase": rewriting.lead,
    "number format": at_least(1, rewriting.change_numbers),
    "neighbour behind": rewriting.neighbour_after,
    "neighbour before": rewriting.neighbour_before,
    "last clause cut": last_clause_cut,
}
DUPLICATE: dict[str, Maker] = {
    "width": rewriting.other_width,
    "case": rewriting.other_case,
    "white space": rewriting.white_space,
    "marks changed": rewriting.punctuation_changed,
    "marks dropped": rewriting.punctuation_dropped,
    "end mark dropped": rewriting.end_dropped,
    "quotation marks": rewriting.quotation_marks,
    "traditional": rewriting.traditional,
    "citation marks": rewriting.citation_marks,
    "mark-up": rewriting.markup,
}
QUESTIONS: dict[str, Callable[[str, random.Random], str | None]] = {
    "same question": lambda query, rng: query,
    "particles": rewriting.particles,
    "question words": rewriting.question_words,
    "word order": rewriting.question_order,
}
NAMED = ("time", "person", "place", "title", "organization", "subject")
Made = dict[tuple[str, str], dict[int, Row]]  # (kind, subkind) -> row -> what may be planted for it


def make_all(sources: Sequence[Source], corpus: Sequence[str], questions: set[str], seed: int) -> Made:
    """What every maker gives for every row; `questions` are all that there are."""
    names = Names(sources, corpus)
    near_misses = {f"asked: {kind}": answer(kind, names) for kind in WORDS["asked"]}
    near_misses |= {f"named: {kind}": topic(kind, names) for kind in NAMED}
    twice: dict[str, Maker] = dict.fromkeys(QUESTIONS, rewriting.other_answer)
    kinds = {"reworded": REWORDED, "duplicate": DUPLICATE, "asked twice": twice, "near miss": near_misses}
    made, texts = Made(), set(corpus)
    for kind, subkind, make in ((k, s, make) for k, makers in kinds.items() for s, make in makers.items()):
        made[kind, subkind] = {}
        for source in sources:
            rng = random.Random(f"{seed} {kind} {subkind} {source.row}")
            text = make(source, rng)
            if text is None or text == source.positive or text in texts:
                continue
            new: Row = {"kind": kind, "subkind": subkind, "row": source.row, "query": source.query, "text": text}
            new["positive"] = source.positive
            if kind == "asked twice":
                new["question"] = QUESTIONS[subkind](source.query, rng)
                if new["question"] in questions - {source.query} or new["question"] is None:
                    continue
            made[kind, subkind][source.row] = new
    return made


def choose(made: Made, counts: dict[str, int], positives: list[str]) -> list[Row]:
    """`counts` of each kind, evenly over its subkinds, each positive once; the scarcest subkinds choose first."""
    chosen: dict[tuple[str, str], list[Row]] = {key: [] for key in made}
    used: set[str] = set()

    def take(key: tuple[str, str], number: int) -> None:
        for row, planted in made[key].items():
            if number > 0 and not used & {positives[row], planted["text"]}:
                used.update((positives[row], planted["text"]))
                chosen[key].append(planted)
                number -= 1

    def number_of(kind: str) -> int:
        return sum(len(some) for (other, _), some in chosen.items() if other == kind)

    scarcest = sorted(made, key=lambda key: (len(made[key]), key))
    for key in scarcest:
        take(key, counts[key[0]] // sum(kind == key[0] for kind, _ in made))
    for kind, count in counts.items():
        before = -1
        while before < number_of(kind) < count:  # what some subkinds lack, others give, one each in turn
            before = number_of(kind)
            for key in scarcest:
                if key[0] == kind and number_of(kind) < count:
                    take(key, 1)
    return [planted for key in made for planted in chosen[key]]


def plant(rows: list[Row], corpus: list[str], seed: int) -> tuple[list[Row], list[str], list[Row]]:
    """The training rows, the candidates, and what was planted.

    Returns:
        rows: the given ones, then a new one for each question asked twice.
        pool: the corpus and the planted texts, shuffled.
        planted: `kind`, `subkind`, `row` and `query` for which the text is planted, `text`, `positive`.
    """
    place, around = {text: i for i, text in enumerate(corpus)}, ["", *corpus, ""]
    positives = [row["pos"][0] for row in rows]
    sources = [
        Source(i, row["query"], text, around[place[text]], around[place[text] + 2])
        for i, (row, text) in enumerate(zip(rows, positives, strict=True))
        if len(row["pos"]) == 1 and text in place
    ]
    random.Random(seed).shuffle(sources)
    third = NUM_FALSE // 3
    counts = {"reworded": third + 1, "duplicate": third + 1, "asked twice": third // 2, "near miss": NUM_NEAR}
    rows, planted = list(rows), []
    for new in choose(make_all(sources, corpus, {row["query"] for row in rows}, seed), counts, positives):
        question = new.pop("question", None)
        planted.append(new)
        if question is not None:  # each positive is false for the other's row
            other = {"row": len(rows), "query": question, "text": new["positive"], "positive": new["text"]}
            planted.append(new | other)
            rows.append({"query": question, "pos": [new["text"]]})
    pool = list(dict.fromkeys([*corpus, *(new["text"] for new in planted)]))
    random.Random(seed).shuffle(pool)
    return rows, pool, planted
