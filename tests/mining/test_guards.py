"""The guards: what may be an answer is found, what differs in a fact is kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core.files.text import letters
from bge_core.mining.guards import Guards, GuardSettings, asks, common_words, opposed, words
from bge_core.mining.near_duplicates import numbers

POSITIVE = "北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。"
QUESTION = "北京大学创立于哪一年？"
OFF = {"identical": False, "near_duplicate": None, "same_question": None, "answer": False}
COMMON = frozenset(
    [
        "位于",
        "坐落",
        "坐落于",
        "创立",
        "创建",
        "中国",
        "近代",
        "第一所",
        "国立",
        "大学",
        "一般",
        "认为",
        "据悉",
        "其",
        "校园",
        "很",
        "美丽",
        "办学",
        "历史",
        "悠久",
    ]
)


def guards(positive: str = POSITIVE, *, answers: list[str] | None = None, **settings: object) -> Guards:
    """One question with one positive."""
    return Guards([QUESTION], [[positive]], [answers or []], GuardSettings(**settings), COMMON)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("１９９８年", {"1998"}),
        ("一九九八年", {"1998"}),
        ("二〇〇五", {"2005"}),
        ("12,000人和3.5米", {"12000", "3.5"}),
        ("十二个", {"12"}),
        ("三百二十一", {"321"}),
        ("一百零五", {"105"}),
        ("两万五千", {"25000"}),
        ("三亿", {"300000000"}),
        ("一亿两千万", {"120000000"}),
        ("没有", set()),
    ],
)
def test_numbers_are_read_in_both_scripts(text: str, found: set[str]) -> None:
    assert numbers(text) == found


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 10**9 - 1))
def test_a_number_in_chinese_is_the_same_number(value: int) -> None:
    """Written out by the textbook rule, an independent way round."""
    units = ["", "十", "百", "千"]

    def below_ten_thousand(n: int) -> str:
        text, gap = "", False
        for power in (3, 2, 1, 0):
            digit = n // 10**power % 10
            if digit:
                text += ("零" if gap and text else "") + "零一二三四五六七八九"[digit] + units[power]
                gap = False
            else:
                gap = True
        return text

    parts = [(value // 10**8, "亿"), (value // 10**4 % 10**4, "万"), (value % 10**4, "")]
    text = ""
    for number, unit in parts:
        if number:
            text += ("零" if text and number < 1000 else "") + below_ten_thousand(number) + unit
    assert numbers(text or "零") == {str(value)}


def test_form_does_not_count() -> None:
    assert letters("《Ａbc》， 一二。") == letters("abc一二") == "abc一二"
    found = guards(**OFF | {"identical": True}).reasons(0, [
        POSITIVE.replace("，", ",").replace("。", ""), f"  {POSITIVE} ", POSITIVE.replace("1898", "１８９８"),
        POSITIVE.replace("1898", "一八九八"), "北京大學位於北京市海淀區，創立於1898年，是中國近代第一所國立大學。",
        POSITIVE.replace("1898", "1899"),
    ])  # fmt: skip
    assert found == [*["identical"] * 5, None]


def test_a_text_that_lacks_what_the_question_names_is_a_negative() -> None:
    positive = "燕京旧院是由美国教会在北京创办的大学，设有文理两科。"
    candidate = "又一旧院是由美国教会在北京创办的大学，设有文理两科。"
    common = frozenset(words(positive + candidate).split()) - {"燕京"}
    asked = [
        Guards([query], [[positive]], [[]], GuardSettings(), common) for query in ("燕京旧院由谁创办？", "谁创办的？")
    ]
    assert [guard.reasons(0, [candidate])[0] for guard in asked] == [None, "near_duplicate"]


@pytest.mark.parametrize(
    "candidate",
    [
        "据悉，北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。",  # a phrase before it
        "北京大学创立于1898年，位于北京市海淀区，是中国近代第一所国立大学。",  # another order
        "北京大学坐落于北京市海淀区，创建于1898年，是中国近代的第一所国立大学",  # other words
        "北京大学创立于一八九八年，位于北京市海淀区，是中国近代第一所国立大学。",  # the number in words
        "北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。其校园很美丽，办学历史悠久。",  # and more
        "北京大学位于北京市海淀区，创立于1898年。",  # the better part of it
    ],
)
def test_the_same_in_nearly_the_same_words(candidate: str) -> None:
    assert guards().reasons(0, [candidate]) == ["near_duplicate"]
    assert guards(near_duplicate=None).reasons(0, [candidate]) == [None]


@pytest.mark.parametrize(
    "candidate",
    [
        "北京大学位于北京市海淀区，创立于1899年，是中国近代第一所国立大学。",  # another year
        "北京大学位于北京市海淀区，创立于一九〇二年，是中国近代第一所国立大学。",
        "武汉大学位于武汉市武昌区，创立于1898年，是中国近代第一所国立大学。",  # another name
        "北京大学。",  # a scrap
        "上海今天下雨。",
    ],
)
def test_another_fact_is_a_negative(candidate: str) -> None:
    assert guards().reasons(0, [candidate]) == [None]


def test_an_answer_within_a_passage() -> None:
    guard = guards(answers=["1898年", "八"])
    assert guard.reasons(0, ["戊戌变法发生在 １８９８年", "第八届", "1998年"]) == ["answer", None, None]
    assert guards(answers=["1898年"], answer=False).reasons(0, ["戊戌变法发生在1898年"]) == [None]


def rows_of(*questions: str) -> Guards:
    """Questions with unlike positives, each the others' neighbour."""
    near = np.array([[*range(len(questions)), -1]] * len(questions))
    positives = [[f"甲{'天地玄黄宇宙洪荒'[i]}文"] for i in range(len(questions))]
    return Guards(questions, positives, [[]] * len(questions), GuardSettings(), COMMON, near)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("北京大学创立于哪一年", True),  # punctuation
        ("北京大学创立于何年？", True),
        ("请问北京大学创立于哪一年？", True),
        ("北京大学创立于哪里？", False),  # asks for something else
        ("武汉大学创立于哪一年？", False),  # of another
        ("今天天气怎么样？", False),
    ],
)
def test_positives_of_the_same_question(other: str, same: bool) -> None:
    found = rows_of(QUESTION, other)
    want = "same_question" if same else None
    assert found.reasons(0, ["甲地文"]) == [want] and found.reasons(1, ["甲天文"]) == [want]
    off = Guards([QUESTION, other], [["甲天文"], ["甲地文"]], [[], []], GuardSettings(**OFF), COMMON)  # type: ignore[arg-type]
    assert off.reasons(0, ["甲地文"]) == [None]


def test_without_neighbours_only_equal_questions_are_found() -> None:
    questions = [QUESTION, "北京大学创立于哪一年", "请问北京大学创立于哪一年？"]
    guard = Guards(questions, [["甲天"], ["甲地"], ["甲玄"]], [[]] * 3, GuardSettings(), COMMON)
    assert guard.reasons(0, ["甲地", "甲玄"]) == ["same_question", None]


def test_what_a_question_asks_for() -> None:
    assert asks("谁在何时建的？") == {"何人", "何时"} and asks("有多少人") == {"几何"}
    assert asks("为什么") == {"何故"} and asks("在哪里") == {"何处"} and asks("是什么") == frozenset()


def test_common_words_are_counted_on_texts() -> None:
    texts = ["大学位于北京"] * 1000 + [f"大学位于第{i}号" for i in range(1000)] + ["巴黎"]
    assert common_words(texts) >= set(words("大学位于北京").split()) and "巴黎" not in common_words(texts)
    assert common_words(texts, seed=1) == common_words(texts, seed=1)
    assert common_words([]) == frozenset()


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_taken(positive: str, candidate: str) -> None:
    found = Guards([candidate], [[positive]], [[candidate]], GuardSettings()).reasons(0, [candidate, positive])
    assert found[1] is not None or not letters(positive)
    assert set(found) <= {None, "identical", "answer", "near_duplicate", "same_question"}


@pytest.mark.parametrize(
    ("query", "positive", "candidate", "reason"),
    [  # names of common words: what question and positive begin with
        ("大曲车站在哪里？", "大曲车站位于青森县上北郡的六户町犬落濑。", "三泽车站位于青森县上北郡的六户町犬落濑。", None),
        ("大曲车站在哪里？", "大曲车站位于青森县上北郡的六户町犬落濑。", "据悉，大曲车站位于青森县上北郡的六户町犬落濑。",
         "near_duplicate"),
        ("哪里有大曲车站？", "大曲车站位于青森县上北郡的六户町犬落濑。", "大曲车站坐落于青森县上北郡的六户町犬落濑。",
         "near_duplicate"),
    ],
)  # fmt: skip
def test_another_subject_is_no_duplicate(query: str, positive: str, candidate: str, reason: str | None) -> None:
    common = frozenset(words("大曲三泽车站位于坐落据悉青森县上北郡的六户町犬落濑哪里").split())
    guards = Guards([query], [[positive]], [[]], GuardSettings(), common)
    assert guards.reasons(0, [candidate]) == [reason]


# ----------------------------------------------------------------------------------------------------- a shop's answers

# Two questions with different facts: the answer of each is the best negative of the other.
DIFFERENT = [
    ("金卡无理由退货几天", "金卡用户签收后15天内可退。", "钻石卡无理由退货几天？", "钻石卡用户签收后30天内可退。"),
    ("无理由退货是几天？", "普通用户签收后7天内可退。", "金卡无理由退货几天", "金卡用户签收后15天内可退。"),
    (
        "怎么开通免密支付？",
        "在“设置—支付—免密支付”里点开通。",
        "怎么关闭免密支付？",
        "在“设置—支付—免密支付”里点关闭。",
    ),
    ("信用卡退款多久到账？", "信用卡退款3至7个工作日到账。", "借记卡退款多久到账？", "借记卡退款1至3个工作日到账。"),
    (
        "生鲜支持七天无理由退货吗？",
        "生鲜商品不支持七天无理由退货。",
        "家电支持七天无理由退货吗？",
        "家电商品支持七天无理由退货。",
    ),
    ("月卡会员多少钱？", "月卡会员每月15元。", "年卡会员多少钱？", "年卡会员每年148元。"),
    ("怎么申请退货？", "在订单页点“申请售后—退货退款”。", "怎么申请换货？", "在订单页点“申请售后—换货”。"),
    ("收货前可以退款吗？", "收货前可以申请仅退款。", "收货后可以退款吗？", "收货后须退货才能退款。"),
    ("iPhone15的保修期多久", "iPhone15保修1年。", "iPhone15 Pro的保修期多久", "iPhone15 Pro保修2年。"),
    ("能用花呗吗？", "支持花呗付款。", "不能用花呗吗？", "秒杀商品不支持花呗付款。"),
]
# The same said twice, under different questions.
ALIKE = [
    ("怎么修改收货人？", "发货之前，可在订单详情页修改收货人姓名和电话。",
     "收货人写错了", "在订单详情页可以修改收货人的姓名与电话，须在发货之前。"),
    ("会员费能退吗？", "会员开通后7天内未使用权益的，可以全额退款。",
     "开了会员后悔了", "开通会员7天内，没有使用过权益的，可全额退款。"),
    ("优惠券什么时候到账", "活动结束后3个工作日内，优惠券自动发放到您的账户。",
     "活动送的券还没到", "优惠券会在活动结束后的三个工作日内自动发放到账户。"),
    ("登录密码怎么重置", "在登录页点“忘记密码”，用绑定手机收取验证码后重设密码。",
     "忘了登录密码", "在登录页点击“忘记密码”，用绑定手机接收验证码后重新设置密码。"),
]  # fmt: skip


def test_few_answers_of_a_shop() -> None:
    """So few texts that no word can be told to be rare."""
    pairs = [*DIFFERENT, *ALIKE]
    queries = [query for first, _, second, _ in pairs for query in (first, second)]
    positives = [[text] for _, first, _, second in pairs for text in (first, second)]
    pool = list(dict.fromkeys(text for (text,) in positives))
    near = np.tile(np.arange(len(queries)), (len(queries), 1))
    guards = Guards(queries, positives, [[] for _ in queries], GuardSettings(), common_words(pool), near)
    for number, query in enumerate(queries):
        (other,) = positives[number ^ 1]
        (reason,) = guards.reasons(number, [other])
        assert (reason is not None) == (number >= 2 * len(DIFFERENT)), (query, other, reason)


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ("支持 花呗", "不 支持 花呗", True), ("不能 退", "能 退", True), ("不 支持 花呗", "没 支持 花呗", False),
        ("不 支持 花呗", "花呗 付款", False), ("收货 前", "收货 后", True), ("收货 前 后", "收货 后", False),
        ("月 卡", "年 卡", True), ("开通", "打开", False),
    ],
)  # fmt: skip
def test_denied_and_opposite(one: str, other: str, want: bool) -> None:
    assert opposed(one.split(), other.split()) == opposed(other.split(), one.split()) == want
