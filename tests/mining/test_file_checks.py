"""Every kind of finding on a row that has it and on one that only looks like it; the fast ways against slow ones."""

import itertools
import random
from typing import Any

import pytest

from bge_core.files.records import check_training_row
from bge_core.mining import file_checks
from bge_core.mining.file_checks import KINDS, Finding, check_rows, summary_lines
from bge_core.mining.near_duplicates import NEAR_QUERY, NEAR_TEXT, Likeness

CLEAN = [
    {"query": "信用卡怎么申请？", "pos": ["请在手机银行首页点击申请。"], "neg": ["贷款需要收入证明。", "密码在柜台重置。"]},
    {"query": "快递几天能到？", "pos": ["一般三到五天送达。"], "neg": ["退款七天内到账。", "发票随货寄出。"]},
]  # fmt: skip


def row(**change: Any) -> dict[str, Any]:
    return {
        "query": "酒店几点退房？",
        "pos": ["中午十二点前退房。"],
        "neg": ["早餐七点开始供应。", "停车每天二十元。"],
    } | change


def found(rows: list[dict[str, Any]], **options: Any) -> dict[str, Finding]:
    for item in rows:
        assert check_training_row(item) is None
    findings = check_rows(rows, **options)
    assert all(0 < finding.count <= finding.total for finding in findings)
    assert all(finding.message.endswith(".") and finding.remedy.endswith(".") for finding in findings)
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def test_clean_data_has_no_finding() -> None:
    assert found([*CLEAN, row()]) == {}
    assert check_rows([]) == check_rows([], against=CLEAN, passage_max_len=5) == []
    assert summary_lines([]) == ["Nothing to mend was found."]


# name: what a row must have to be found, and what only looks like it
ONE_ROW = {
    "contradictions": ({"neg": ["停车每天二十元。", " 中午十二点前退房｡"]}, {"neg": ["中午十一点前退房。", "停车每天二十元。"]}),
    "query_among_negatives": ({"neg": ["酒店几点退房?", "停车每天二十元。"]}, {"neg": ["酒店几点入住？", "停车每天二十元。"]}),
    "positive_is_query": ({"pos": ["酒店几点退房?", "中午十二点前退房。"]}, {"pos": ["酒店几点退房哦", "中午十二点前退房。"]}),
    "repeated_texts": ({"neg": ["停车每天二十元。", "停车每天二十元｡"]}, {"neg": ["停车每天二十元。", "停车每天三十元。"]}),
    "near_contradictions": ({"neg": ["中午十二点前退房！", "停车每天二十元。"]}, {"neg": ["中午十一点前退房！", "停车每天二十元。"]}),
    "short_positives": ({"pos": ["十二点"]}, {"pos": ["在十二点。"]}),
    "no_negatives": ({"neg": None}, {}),
    "uneven_negatives": ({"neg": ["停车每天二十元。"]}, {}),
    "empty_texts": ({"neg": ["？！…", "停车每天二十元。"]}, {"neg": ["7", "停车每天二十元。"]}),
    "replacement_characters": ({"pos": ["中午十二点前退\ufffd。"]}, {}),
    "scores_constant": ({"pos_scores": [0.5], "neg_scores": [0.5, 0.5]}, {"pos_scores": [0.5], "neg_scores": [0.5, 0.4]}),
    "scores_above": ({"pos_scores": [0.5], "neg_scores": [0.4, 0.6]}, {"pos_scores": [0.5], "neg_scores": [0.5, 0.4]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_ROW)
def test_what_is_wrong_within_a_row(name: str) -> None:
    bad, good = ONE_ROW[name]
    clean: list[dict[str, Any]] = [dict(item) for item in CLEAN]
    if "scores" in name:  # a score somewhere is asked of all rows
        clean = [item | {"pos_scores": [1.0], "neg_scores": [0.1, 0.2]} for item in clean]
    finding = found([*clean, row(**bad)])[name]
    assert finding.count == 1 and finding.severity == KINDS[name][0]
    assert finding.examples[0]["row"] == 3  # counted from 1
    assert name not in found([*clean, row(**good)])


def test_a_contradiction_across_rows_needs_the_same_query() -> None:
    other = row(
        pos=["停车每天二十元。"], neg=["早餐七点开始供应。", "泳池免费开放。"]
    )  # row()'s negative is its positive
    findings = found([row(), other])
    assert (findings["contradictions"].count, findings["contradictions"].total) == (1, 2)
    assert findings["contradictions"].examples == [{"row": 1, "query": "酒店几点退房？", "text": "停车每天二十元。"}]
    assert findings["repeated_queries"].examples == [{"row": 2, "query": "酒店几点退房？"}]
    assert "contradictions" not in found([row(), other | {"query": "停车多少钱？"}])
    assert "contradictions" in found([row(), other | {"query": "酒店几点退房?"}])  # half width


def test_identical_rows_and_repeated_queries_are_told_apart() -> None:
    same = row(query="酒店几点退房?")
    findings = found([row(), same, row(), row(pos=["十二点之前。"]), row(prompt="查询：")])
    assert findings["identical_rows"].count == 2 and findings["repeated_queries"].count == 2
    assert [e["row"] for e in findings["identical_rows"].examples] == [2, 3]


def test_no_negatives_anywhere_is_nothing_unusual_but_worth_saying() -> None:
    findings = found([{"query": item["query"], "pos": item["pos"]} for item in CLEAN])
    assert list(findings) == ["no_negatives"] and findings["no_negatives"].count == findings["no_negatives"].total
    assert list(found([*CLEAN, row(neg=[])])) == ["no_negatives"]  # none is not few


def test_scores_that_a_part_lacks() -> None:
    scored = row(pos_scores=[1.0], neg_scores=[0.1, 0.2])
    assert found([*CLEAN, scored])["scores_missing"].count == 2
    assert found([*CLEAN, row(pos_scores=[1.0])])["scores_missing"].count == 3  # what mining without a teacher leaves
    assert "scores_missing" not in found([scored, row(query="怎么停车？", neg=[], pos_scores=[1.0])])
    two = row(pos=["中午十二点前退房。", "正午。请退房"], pos_scores=[0.9, 0.3], neg_scores=[0.5, 0.2])
    assert (found([two])["scores_above"].count, found([two])["scores_above"].total) == (1, 2)  # the lowest positive


@pytest.mark.parametrize(
    "broken", ["中午十二点前退房".encode().decode("latin-1"), "“重置”密码。".encode().decode("cp1252", "replace"),
               "密码，在柜台，重置".encode().decode("gbk", "replace"), "重置锟斤拷密码"],
)  # fmt: skip
def test_wrong_encodings_are_seen(broken: str) -> None:
    assert found([row(pos=[broken])])["mojibake"].count == 1


def test_other_languages_are_no_mojibake() -> None:
    texts = ["Le café « élevé » à Genève coûte 3 €.", "un café\u00a0: 3\u00a0€", "Größe: 30 °C ± 2 µm, naïve façade", "ÀÉÎÕÜ ¿Qué?", "「東京」の天気",
             "안녕하세요", "烫烫烫的火锅", "一把锛子"]  # fmt: skip
    assert "mojibake" not in found([row(pos=texts)])


def test_hubs_count_different_queries() -> None:
    rows = [row(query=f"第{i}种问法？") for i in range(10)]
    assert found(rows)["hubs"].examples == [{"text": "中午十二点前退房。", "queries": 10, "query": "第0种问法?"}]
    assert "hubs" not in found(rows[:9]) and "hubs" not in found([row()] * 20)


def test_leaks_are_counted_apart() -> None:
    train = [*CLEAN, row(query="2019年的年会在哪里举行？")]
    test = [
        {"query": "信用卡怎么申请?", "pos": ["去网点。"]},  # the same
        {"query": "请问信用卡怎么申请？", "pos": ["去网点。"]},  # near
        {"query": "储蓄卡怎么申请？", "pos": ["去网点。"]},  # of another
        {"query": "2019年的年会，在哪里举行呢", "pos": ["一般三到五天送达。"]},  # near, and a positive
        {"query": "2018年的年会在哪里举行？", "pos": ["广州。"]},  # another year, another question
    ]
    findings = found(train, against=test)
    assert {name: finding.count for name, finding in findings.items()} == {
        "shared_queries": 1, "near_shared_queries": 2, "shared_positives": 1,
    }  # fmt: skip
    assert [finding.severity for finding in findings.values()] == ["bad", "warning", "note"]
    assert {finding.total for finding in findings.values()} == {5}
    assert findings["near_shared_queries"].examples[1]["training_query"] == "2019年的年会在哪里举行?"


def noisy(rng: random.Random, text: str, edits: int) -> str:
    for _ in range(edits):
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", "呢", "的，", "甲"]) + text[place + rng.randrange(2) :]
    return text


def test_near_queries_are_those_that_comparing_all_pairs_finds() -> None:
    rng = random.Random(0)
    words = [
        "信用卡",
        "贷款",
        "密码",
        "快递",
        "退款",
        "酒店",
        "签证",
        "发票",
        "会员",
        "物流",
        "怎么办理",
        "多久到账",
        "在哪里查",
    ]
    train = list(dict.fromkeys("".join(rng.choices(words, k=5)) for _ in range(300)))
    test = [noisy(rng, rng.choice(train), rng.randrange(1, 4)) for _ in range(200)]
    asked = [query for query in test if query not in train]
    likeness = Likeness([*train, *asked])
    each = [likeness.stack([other]) for other in train]
    expected = [any(likeness.same_questions(query, other, NEAR_QUERY)[0] for other in each) for query in asked]
    assert 40 < sum(expected) < len(expected) - 40
    rows = [{"query": query, "pos": [query + "，见说明"]} for query in train]
    findings = found(rows, against=[{"query": query, "pos": ["无"]} for query in test])
    assert findings["near_shared_queries"].count == sum(expected)


def test_near_contradictions_are_those_that_comparing_all_pairs_finds() -> None:
    rng = random.Random(1)
    base = "这是一段关于信用卡申请条件与办理流程的说明，请持有效证件前往就近网点办理，谢谢配合"
    rows = []
    for i in range(100):
        positive = "".join(rng.sample(base, rng.choice([3, 8, 20, 40])))
        negatives = dict.fromkeys(noisy(rng, positive, rng.randrange(1, 5)) or "空" for _ in range(3))
        rows.append({"query": f"问题{i}", "pos": [positive], "neg": [text for text in negatives if text.strip()]})
    pairs = [(r["pos"][0], text) for r in rows for text in r["neg"] if text != r["pos"][0]]
    likeness = Likeness(list(dict.fromkeys(text for r in rows for text in (*r["pos"], *r["neg"]))))
    expected = sum(likeness.near_duplicates(one, likeness.stack([other]), NEAR_TEXT)[0] for one, other in pairs)
    assert 20 < expected < len(pairs) - 20
    assert found(rows)["near_contradictions"].count == expected


def test_lengths_are_counted_in_tokens_or_guessed_from_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(query="问" * 6, pos=["答" * 9], neg=["答" * 9, "否" * 8]), row(query="问" * 6)]
    counted = found(rows, query_max_len=7, passage_max_len=20, count_tokens=lambda texts: [2 * len(t) for t in texts])
    assert (counted["queries_cut"].count, counted["queries_cut"].total) == (1, 1)  # each text once
    assert "estimate" not in counted["queries_cut"].message and "passages_cut" not in counted
    guessed = found(rows, query_max_len=8, passage_max_len=10)
    assert "queries_cut" not in guessed  # with the two special tokens, just 8
    assert guessed["passages_cut"].count == 3 and "estimate" in guessed["passages_cut"].message
    assert "the longest has 11" in guessed["passages_cut"].message
    monkeypatch.setattr(file_checks, "MAX_SAMPLE", 2)
    sampled = found(rows, passage_max_len=10)["passages_cut"]
    assert sampled.total == 2 and "of a sample" in sampled.message


def test_the_worst_comes_first_and_examples_are_few_and_short() -> None:
    long = "长" * 500
    rows = [row(query=f"{i}{long}", neg=["中午十二点前退房。"] if i else [long, long]) for i in range(9)]
    findings = check_rows(rows)
    ranks = [{"bad": 0, "warning": 1, "note": 2}[finding.severity] for finding in findings]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    first = findings[0]
    assert (first.name, first.count, len(first.examples)) == ("contradictions", 8, 5)
    assert all(len(str(value)) <= 120 for example in first.examples for value in example.values())
    lines = summary_lines(findings)
    assert lines[0].startswith("BAD      8 of 9 rows ") and lines[1].startswith("         -> Take it out")
    assert lines[2].strip().startswith("row 2 | query 1长") and all(len(line) < 250 for line in lines)


def test_every_kind_is_found_somewhere() -> None:
    """The table holds no kind that no check gives."""
    tested = {*ONE_ROW, "scores_missing", "shared_queries", "near_shared_queries", "shared_positives", "identical_rows",
              "repeated_queries", "mojibake", "hubs", "queries_cut", "passages_cut"}  # fmt: skip
    assert tested == set(KINDS)


def test_rows_are_left_alone() -> None:
    rows = [row(), row(neg=None), *CLEAN]
    before = repr(rows)
    assert check_rows(rows, against=CLEAN) == check_rows(rows, against=CLEAN)
    assert repr(rows) == before
    for one, other in itertools.pairwise([check_rows(list(order)) for order in itertools.permutations(rows[:3])]):
        assert {f.name for f in one} == {f.name for f in other}
