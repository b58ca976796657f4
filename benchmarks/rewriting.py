"""A sentence or a question written anew without a change of what it says: for planting.py.

A maker gets a row's question and positive and gives the new text, or None where it cannot without a doubt. The words it
uses are in planted_words.toml.
"""

import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("planted_words.toml").read_text(encoding="utf-8"))
OPEN, CLOSE = "《「『“‘（(", "》」』”’）)"
ONES = "〇一二三四五六七八九"


@dataclass(frozen=True)
class Source:
    """A training row to plant for, with the corpus's sentences beside its positive ("" where there is none)."""

    row: int
    query: str
    positive: str
    before: str
    after: str


Maker = Callable[[Source, random.Random], str | None]


def parse_words(text: str) -> dict[str, list[str]]:
    """Word -> words that may stand for it."""
    table: dict[str, list[str]] = defaultdict(list)
    for group in text.split():
        words = re.split("[/>]", group)
        for word in words[:1] if ">" in group else words:
            table[word] += [other for other in words if other != word]
    return table


SYNONYMS, FUNCTION_WORDS = parse_words(WORDS["synonyms"]), parse_words(WORDS["function_words"])


@cache
def tagged(text: str) -> list[tuple[str, str]]:
    """Words and their kinds."""
    import rjieba

    words: list[tuple[str, str]] = rjieba.tag(text)
    assert "".join(word for word, _ in words) == text
    return words


def depths(text: str) -> list[int]:
    """How many quotation marks and brackets are open at each character, its own included."""
    depth, result = 0, []
    for character in text:
        depth += character in OPEN
        result.append(depth)
        depth = max(0, depth - (character in CLOSE))
    return result


def clauses_of(text: str) -> list[str]:
    """The text cut behind its commas that stand in no brackets or quotation marks."""
    depth, clauses, begin = depths(text), [], 0
    for at, character in enumerate(text):
        if (character == "，" or text[at : at + 2] == ", ") and not depth[at]:
            clauses.append(text[begin:at])
            begin = at + 1
    return [*clauses, text[begin:]]


# ------------------------------------------------------------------------------------------------------------ reworded


def at_least(number: int, change: Callable[[str, random.Random], tuple[str, int]]) -> Maker:
    """A positive with so many changes, or none."""

    def make(source: Source, rng: random.Random) -> str | None:
        text, count = change(source.positive, rng)
        return text if count >= number else None

    return make


def exchange(text: str, rng: random.Random) -> tuple[str, int]:
    """Nine in ten words outside quotation marks for others of their meaning; the text and how many."""
    ends, depth = {0}, depths(text)
    for word, _ in tagged(text):
        ends.add(max(ends) + len(word))
    out, at, count = "", 0, 0
    while at < len(text):
        known = [n for n in range(6, 0, -1) if {at, at + n} <= ends and text[at : at + n] in SYNONYMS and not depth[at]]
        word = text[at : at + (known[0] if known else 1)]
        at += len(word)
        if known and rng.random() < 0.9:
            word, count = rng.choice(SYNONYMS[word]), count + 1
        out += word
    return out, count


def change_function_words(text: str, rng: random.Random) -> tuple[str, int]:
    """Function words dropped, added, or in their other form; the text and how many."""
    words, depth, out, at, count, none = tagged(text), depths(text), "", 0, 0, ("", "x")
    for i, (word, tag) in enumerate(words):
        (before, tag_before), (after, tag_after) = words[i - 1] if i else none, (words + [none])[i + 1]
        new = word
        if depth[at]:
            pass
        elif word in FUNCTION_WORDS:
            joins = word in "和与" and min(len(before), len(after)) < 2  # 和语, 与会: a word cut in two
            if tag_before != "m" and not joins and not (word in "并且" and after[:1] in "不未没非无"):
                new = rng.choice(FUNCTION_WORDS[word])
        elif (word == "了" and tag_before == "v") or (word == "的" and {tag_before, tag_after} <= {"n", "ns"}):
            new = "" if word == "了" or len(before + after) >= 4 else word
        elif word == "后" and tag == "f" and (tag_before in ("v", "vn") or before in ("年", "月", "日")):
            new = "之后"
        elif word == "中" and tag == "f" and re.search(r"在[^，。；]{2,12}$", out):
            new = "之中"
        elif word == "于" and tag_before in ("n", "nr", "ns", "x") and after[:1].isdigit():
            new = "在"
        elif word == "在" and re.fullmatch(r"\d{4}", after):
            new = "于"
        out, at, count = out + new, at + len(word), count + (new != word)
    return out, count


def lead(source: Source, rng: random.Random) -> str | None:
    """A phrase before the sentence."""
    bound = tagged(source.positive)[0][1] in ("c", "d", "p", "r", "x", "m")
    return None if bound else rng.choice(WORDS["leads"]) + source.positive


BOUND = (  # what ties a clause to the one before it or to its time
    "而|但|则|又|也|还|并|且|因|所以|故|就|便|才|再|后|最|终|其|该|此|这|那|他|她|它|者|同|当|时|直到|使|令|让|导致|造成"
    "|例如|如|否|若|虽|仅|甚|更|从|分别|以|第[一二三]|年|月|日|世纪|及|等|曾|已|包括|即|或|只|前|称|了|、.*的|[：:；;。]"
)


def clause_order(source: Source, rng: random.Random) -> str | None:
    """Two clauses that say something of the same subject, exchanged."""
    clauses, end = clauses_of(source.positive[:-1]), source.positive[-1]
    if end not in "。；":
        return None

    def kind(clause: str) -> str:
        return tagged(clause)[0][1]

    def free(clause: str) -> bool:
        return 4 <= len(clause) <= 30 and kind(clause) in ("v", "n", "vn") and not re.search(BOUND, clause)

    pairs = [i for i in range(1, len(clauses) - 1) if free(clauses[i]) and free(clauses[i + 1])]
    pairs = [i for i in pairs if kind(clauses[i]) == kind(clauses[i + 1]) and clauses[i - 1][-1:] != "称"]
    if not pairs:
        return None
    at = rng.choice(pairs)
    clauses[at : at + 2] = clauses[at + 1], clauses[at]
    return "，".join(clauses) + end


def chinese(number: int) -> str:
    """12 -> 十二, for numbers below 10,000."""
    if number == 0:
        return "零"
    out, zero = "", False
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // place % 10
        if digit:
            out += ("零" if zero and out else "") + ONES[digit] + unit
        zero = not digit
    return out[1:] if out.startswith("一十") else out


# What stands in a range, a decimal or a code is left alone.
NOT_BEFORE = r"(?<![\d.,:$＄－\-~～至到、/A-Za-z—–第][ ])(?<![\d.,:$＄－\-~～至到、/A-Za-z—–第])"
NOT_BEHIND = r"(?!\s?[－\-~～/—–至到、\d.,])"
COUNTED = r"个名位座条种间家次部首岁张届层辆艘所支队场枚颗项处组期集章"
PEOPLE_OR_MONEY = r"(?=[人元名户票吨米只枚座辆张位]|平方|公里|多)"
QUOTED = r"《[^》]*》|「[^」]*」|“[^”]*”"
TENS = r"(?<![一二三四五六七八九十百千万第])(?>([二三四五六七八九]?十[一二三四五六七八九]?))(世纪|[个名人座月日届岁])"


def change_numbers(text: str, rng: random.Random) -> tuple[str, int]:
    """Numbers outside quotation marks written another way, of the same value; the text and how many."""
    zero = rng.choice("〇零")

    def dated(match: re.Match[str]) -> str:
        year = "".join((zero + ONES[1:])[int(digit)] for digit in match[1]) + "年" if match[1] else ""
        return year + "".join(chinese(int(n)) + unit for n, unit in zip(match.groups()[1:], "月日", strict=True) if n)

    def counted(match: re.Match[str]) -> str:
        return ("两" if match[1] == "2" else chinese(int(match[1]))) + match[2]

    def arabic(match: re.Match[str]) -> str:
        tens, rest = match[1].split("十")
        return str(10 * ONES.index(tens or "一") + ONES.index(rest or "〇")) + match[2]

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (rf"{NOT_BEFORE}(?>(\d{{4}})年(?:(\d{{1,2}})月(?:(\d{{1,2}})日)?)?){NOT_BEHIND}", dated),
        (rf"{NOT_BEFORE}(?>()(\d{{1,2}})月(?:(\d{{1,2}})日)?){NOT_BEHIND}", dated),
        (rf"{NOT_BEFORE}(?>(\d{{1,3}})([{COUNTED}])){NOT_BEHIND}", counted),
        (r"第(?>(\d{1,3}))(?![\d.,－\-~～/])", lambda m: "第" + chinese(int(m[1]))),
        (rf"{NOT_BEFORE}(?>(\d{{1,3}}(?:,\d{{3}})+))(?![\d,.])", lambda m: m[1].replace(",", "")),
        (rf"(?<=[\u4e00-\u9fff])(?>([1-9]\d{{4,6}})){PEOPLE_OR_MONEY}", lambda m: f"{int(m[1]):,}"),
        (rf"{NOT_BEFORE}(?>(\d+\.\d))万(?!亿)", lambda m: str(round(float(m[1]) * 10_000))),
        (rf"{NOT_BEFORE}(?>(\d{{1,3}}))[%％]{NOT_BEHIND}", lambda m: "百分之" + chinese(int(m[1]))),
    ]
    quoted = re.findall(QUOTED, text)
    for mark, part in enumerate(quoted):
        text = text.replace(part, chr(0xE000 + mark), 1)
    count = 0
    for pattern, write in rules:
        text, found = re.subn(pattern, write, text)
        count += found
    if not count:
        text, count = re.subn(TENS, arabic, text)
    for mark, part in enumerate(quoted):
        text = text.replace(chr(0xE000 + mark), part, 1)
    return text, count


def belong(one: str, other: str) -> bool:
    """Whether two sentences that follow each other seem to be of one paragraph: they share a noun."""
    nouns = [{word for word, tag in tagged(text) if tag[0] in "nj" and len(word) > 1} for text in (one, other)]
    return min(len(one), len(other)) >= 8 and bool(nouns[0] & nouns[1]) and one[-1] in "。！？；"


def neighbour_after(source: Source, rng: random.Random) -> str | None:
    """With the sentence that follows it in the corpus."""
    return source.positive + source.after if belong(source.positive, source.after) else None


def neighbour_before(source: Source, rng: random.Random) -> str | None:
    """With the sentence before it in the corpus."""
    return source.before + source.positive if belong(source.before, source.positive) else None


def other_answer(source: Source, rng: random.Random) -> str | None:
    """Another text with the answer: rewritten in several ways, or with its neighbour and rewritten lightly."""
    if rng.random() < 0.5:
        longer = rng.choice([neighbour_after, neighbour_before])(source, rng)
        return None if longer is None else exchange(longer, rng)[0]
    text = clause_order(source, rng) or source.positive
    ways = int(text != source.positive)
    text, count = exchange(text, rng)
    text, more = change_function_words(text, rng)
    text, numbers = change_numbers(text, rng)
    led = lead(replace(source, positive=text), rng)
    return (led or text) if ways + count + more + bool(numbers) >= 3 else None


# ---------------------------------------------------------------------------------------------------------- duplicates


def other_width(source: Source, rng: random.Random) -> str | None:
    """Letters and digits full width, or punctuation half width."""
    if re.search(r"[0-9A-Za-z]", source.positive) and rng.random() < 0.5:
        return re.sub(r"[0-9A-Za-z%]", lambda m: chr(ord(m[0]) + 0xFEE0), source.positive)
    return source.positive.translate(str.maketrans("，：；（）！？。", ",:;()!?."))


def other_case(source: Source, rng: random.Random) -> str | None:
    """Latin letters in lower or upper case."""
    change = rng.choice([str.lower, str.upper])
    return re.sub(r"[A-Za-z]+", lambda m: change(m[0]), source.positive)


def white_space(source: Source, rng: random.Random) -> str | None:
    """White space added, seen or unseen, or taken away."""
    text = source.positive
    between = r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])"
    ways = [re.sub(between, " ", text), re.sub(r"([，。；：])", r"\1 ", text), "\u3000\u3000" + text]
    ways += [text.replace(" ", ""), re.sub(r"([，；：])", "\\1\u200b", text), "\ufeff" + text]
    ways.append(re.sub(r"([，；])", "\\1\n", text))
    return rng.choice([way for way in ways if way != text])


def punctuation_changed(source: Source, rng: random.Random) -> str | None:
    """Marks inside the sentence for others that stand in their place."""
    inside, end = source.positive[:-1], source.positive[-1]
    new = inside.translate(str.maketrans("；、：·－～（）", "，，，・—-【】"))
    return new + {"。": "；", "；": "。"}.get(end, end) if new != inside else None


def punctuation_dropped(source: Source, rng: random.Random) -> str | None:
    """No marks, or white space for them."""
    if len(clauses_of(source.positive)) == 1 or re.search(r"\d[，、；：.]\d", source.positive):
        return None
    text = re.sub(r"[，、。；：！？]", rng.choice(["", " "]), source.positive)
    return re.sub(r"[（）()「」『』“”\"]", "", text).strip()


def end_dropped(source: Source, rng: random.Random) -> str | None:
    """Without the mark at its end."""
    return source.positive[:-1] if source.positive[-1] in "。；" else None


def quotation_marks(source: Source, rng: random.Random) -> str | None:
    """One kind of quotation marks for another."""
    pairs = ["“”", "「」", "『』", "«»", '""']
    own = [pair for pair in pairs if pair[0] in source.positive and pair[1] in source.positive]
    if not own:
        return None
    other = rng.choice([pair for pair in pairs if pair != own[0]])
    return source.positive.translate(str.maketrans(own[0], other)) if own[0] != '""' else None


def traditional(source: Source, rng: random.Random) -> str | None:
    """Its common characters in traditional form."""
    simplified = WORDS["simplified"]
    if len(set(source.positive) & set(simplified)) < 3:
        return None
    return source.positive.translate(str.maketrans(simplified, WORDS["traditional"]))


def citation_marks(source: Source, rng: random.Random) -> str | None:
    """Marks of references, as copied from an encyclopedia."""
    text, mark, clauses = source.positive, rng.randint(2, 30), clauses_of(source.positive)
    end = f"[{mark}]" if rng.random() < 0.5 else f"[{mark}][{mark + 1}]"
    if len(clauses) > 2 and rng.random() < 0.5:
        clauses[rng.randrange(len(clauses) - 1)] += f"[{mark - 1}]"
        text = "，".join(clauses)
    return text + end


def markup(source: Source, rng: random.Random) -> str | None:
    """What is left of a page's mark-up."""
    text, clauses = source.positive, clauses_of(source.positive)
    bold = f"**{clauses[0]}**" + text[len(clauses[0]) :]
    return rng.choice([f"<p>{text}</p>", "&nbsp;&nbsp;" + text, "，<br/>".join(clauses), bold])


# ----------------------------------------------------------------------------------------------------------- questions


def particles(query: str, rng: random.Random) -> str | None:
    """Politeness, particles, the mark at the end."""
    plain = query.rstrip("？?。 ")
    ways = ["请问" + query, plain, plain + "呢？", "请问" + plain, f"我想知道{plain}", f"想请教一下，{query}"]
    return rng.choice([way for way in ways if way != query])


def question_words(query: str, rng: random.Random) -> str | None:
    """Question words and verbs for others."""
    new = query
    for pattern, *words in rng.sample(WORDS["question_words"], len(WORDS["question_words"])):
        if new == query:
            new = re.sub(pattern, rng.choice(words), query, count=1)
    return new if new != query else None


def question_order(query: str, rng: random.Random) -> str | None:
    """The words in another order."""
    matches = ((re.fullmatch(pattern, query.rstrip("？?")), order) for pattern, order in WORDS["question_orders"])
    return next((match.expand(order) + "？" for match, order in matches if match), None)
