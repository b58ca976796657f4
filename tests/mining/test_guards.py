"""The guards: what may be an answer is found, what differs in a fact is kept, what all texts share is no evidence."""

import math
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core.files.text import letters
from bge_core.mining.guards import Guards, GuardSettings
from bge_core.mining.near_duplicates import MIN_PART, MIN_SHARED, Likeness, with_digits

POSITIVE = "北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。"
QUESTION = "北京大学创立于哪一年？"
OFF = {"identical": False, "near_duplicate": None, "same_question": None, "answer": False}
NAMES = ("清华", "复旦", "南开", "同济", "厦门", "四川", "吉林", "山东", "兰州", "郑州", "南昌", "西北")
SAME = [
    "据悉，北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。",  # a phrase before it
    "北京大学创立于1898年，位于北京市海淀区，是中国近代第一所国立大学。",  # another order
    "北京大学坐落于北京市海淀区，创建于1898年，是中国近代的第一所国立大学",  # other words
    "北京大学创立于一八九八年，位于北京市海淀区，是中国近代第一所国立大学。",  # the number in words
    "北京大学位于北京市海淀区，创立于1898年，是中国近代第一所国立大学。其校园很美丽，办学历史悠久。",  # and more
    "北京大学位于北京市海淀区，创立于1898年。",  # the better part of it
]
OTHER = [
    "北京大学位于北京市海淀区，创立于1899年，是中国近代第一所国立大学。",  # another year
    "北京大学位于北京市海淀区，创立于一九〇二年，是中国近代第一所国立大学。",
    "武汉大学位于武汉市武昌区，创立于1898年，是中国近代第一所国立大学。",  # another name
    "北京大学。",  # a scrap
    "上海今天下雨。",
]


def guards(positive: str = POSITIVE, *, answers: list[str] | None = None, **settings: object) -> Guards:
    """One question with one positive."""
    pool = [positive, *SAME, *OTHER, *(text for name in NAMES for text in (f"{name}大学创立。", f"{name}大学创建。"))]
    return Guards([QUESTION], [[positive]], [answers or []], GuardSettings(**settings), pool)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("１９９８年", "１９９８年"), ("一九九八年", "1998年"), ("二〇〇五", "2005"), ("12,000人和3.5米", "12000人和3.5米"),
        ("十二个", "12个"), ("三百二十一", "321"), ("一百零五", "105"), ("两万五千", "25000"), ("三亿", "300000000"),
        ("一亿两千万", "120000000"), ("1.2万人", "12000人"), ("1.71万", "17100"), ("0.5万", "5000"), ("2亿", "200000000"),
        ("1.23456万", "12345.6"), ("2.50", "2.50"), ("没有", "没有"),
        ("1,234,567", "1234567"), ("1,1", "1,1"), ("1998,1999", "1998,1999"),
    ],
)  # fmt: skip
def test_numbers_are_read_in_both_scripts(text: str, want: str) -> None:
    assert with_digits(text) == want


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
    assert with_digits(text or "零") == str(value)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("甲乙丙丁ab1 ，", min_size=1, max_size=9), min_size=1, max_size=8), st.integers(0, 7))
def test_containment_is_that_of_the_formula(texts: list[str], at: int) -> None:
    """By sets, on a set of texts and one that it does not have."""
    likeness, one = Likeness(texts), texts[at % len(texts)] + "戊"

    def terms(text: str) -> set[str]:
        return set(re.findall(r"[甲乙丙丁戊]|[ab]+|1+", text))

    def weight(of: set[str]) -> float:
        return sum(math.log((len(texts) + 1) / max(1, sum(term in terms(text) for text in texts) - 1)) for term in of)

    found, unit = likeness.containment(one, likeness.stack(texts)), math.log(len(texts) + 1)
    for other, like in zip(texts, found.tolist(), strict=True):
        shared, smaller = weight(terms(one) & terms(other)), min(weight(terms(one)), weight(terms(other)))
        enough = shared >= MIN_SHARED * unit and shared >= MIN_PART * weight(terms(one))
        assert like == pytest.approx(shared / smaller if enough else 0)


def test_form_does_not_count() -> None:
    assert letters("《Ａbc》， 一二。") == letters("abc一二") == "abc一二"
    found = guards(**OFF | {"identical": True}).reasons(0, [
        POSITIVE.replace("，", ",").replace("。", ""), f"  {POSITIVE} ", POSITIVE.replace("1898", "１８９８"),
        POSITIVE.replace("1898", "一八九八"), "北京大學位於北京市海淀區，創立於1898年，是中國近代第一所國立大學。",
        POSITIVE.replace("1898", "1899"),
    ])  # fmt: skip
    assert found == [*["identical"] * 5, None]


@pytest.mark.parametrize("candidate", SAME)
def test_the_same_in_nearly_the_same_words(candidate: str) -> None:
    assert guards().reasons(0, [candidate]) == ["near_duplicate"]
    assert guards(near_duplicate=None).reasons(0, [candidate]) == [None]


@pytest.mark.parametrize("candidate", OTHER)
def test_another_fact_is_a_negative(candidate: str) -> None:
    assert guards().reasons(0, [candidate]) == [None]


def test_an_answer_within_a_passage() -> None:
    guard = guards(answers=["1898年", "八"])
    assert guard.reasons(0, ["戊戌变法发生在 １８９８年", "第八届", "1998年"]) == ["answer", None, None]
    assert guards(answers=["1898年"], answer=False).reasons(0, ["戊戌变法发生在1898年"]) == [None]


@pytest.mark.parametrize(
    ("query", "candidate", "reason"),
    [
        ("大曲车站在哪里？", "三泽车站位于青森县上北郡的六户町犬落濑。", None),
        ("大曲车站在哪里？", "据悉，大曲车站位于青森县上北郡的六户町犬落濑。", "near_duplicate"),
        ("哪里有大曲车站？", "大曲车站坐落于青森县上北郡的六户町犬落濑。", "near_duplicate"),
        ("大曲车站在哪里？", "车站位于青森县上北郡的六户町犬落濑。", None),  # of which station, it does not say
        ("那个车站在哪里？", "车站位于青森县上北郡的六户町犬落濑。", "near_duplicate"),
    ],
)
def test_a_text_that_lacks_what_the_question_names_is_a_negative(
    query: str, candidate: str, reason: str | None
) -> None:
    positive = "大曲车站位于青森县上北郡的六户町犬落濑。"
    pool = [positive, candidate, *(f"{name}车站位于{name}市。" for name in "天地玄黄宇宙洪荒日月盈昃")]
    assert Guards([query], [[positive]], [[]], GuardSettings(), pool).reasons(0, [candidate]) == [reason]


@pytest.mark.parametrize("num_texts", [10, 2000])
def test_a_rare_word_is_a_fact_where_there_are_texts_enough_to_tell(num_texts: int) -> None:
    one, other = "本馆周末提供葵扇，可以在一楼服务台领取使用。", "本馆周末提供雨伞，可以在一楼服务台领取使用。"
    rng = random.Random(0)
    words = ["本馆", "周末", "提供", "可以", "在", "一楼", "服务台", "领取", "使用", "读者", "需要", "办理"]
    pool = [one, other, *("".join(rng.choices(words, k=8)) for _ in range(num_texts))]
    found = Guards(["周末有什么？"], [[one]], [[]], GuardSettings(near_duplicate=0.5), pool).reasons(0, [other])
    assert found == [None if num_texts > 1000 else "near_duplicate"]


# ----------------------------------------------------------------------------------------------------------- questions

# So many that the words of questions are seen to be common.
ASKED = [f"{frame}？" for name in NAMES for frame in (
    f"{name}大学创立于哪一年", f"请问{name}大学创立于何年", f"请问{name}大学有多少学生")]  # fmt: skip


def rows_of(*questions: str) -> Guards:
    """Questions with unlike positives, each the others' neighbour."""
    near = np.array([[*range(len(questions)), -1]] * len(questions))
    positives = [[f"甲{'天地玄黄宇宙洪荒'[i % 8]}文{i}"] for i in range(len(questions))]
    return Guards(questions, positives, [[]] * len(questions), GuardSettings(), [], near)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("北京大学创立于哪一年", True),  # punctuation
        ("请问北京大学创立于哪一年？", True),
        ("北京大学有多少学生？", False),  # asks for something else
        ("武汉大学创立于哪一年？", False),  # of another
        ("北京大学MBA创立于哪一年？", False),
        ("今天天气怎么样？", False),
    ],
)
def test_positives_of_the_same_question(other: str, same: bool) -> None:
    found = rows_of(QUESTION, other, *ASKED)
    want = "same_question" if same else None
    assert found.reasons(0, ["甲地文1"]) == [want] and found.reasons(1, ["甲天文0"]) == [want]
    off = Guards([QUESTION, other], [["甲天文"], ["甲地文"]], [[], []], GuardSettings(**OFF), [])  # type: ignore[arg-type]
    assert off.reasons(0, ["甲地文"]) == [None]


def test_without_neighbours_only_equal_questions_are_found() -> None:
    questions = [QUESTION, "北京大学 创立于哪一年", "请问北京大学创立于哪一年？"]
    guard = Guards(questions, [["甲天"], ["甲地"], ["甲玄"]], [[]] * 3, GuardSettings(), [])
    assert guard.reasons(0, ["甲地", "甲玄"]) == ["same_question", None]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_taken(positive: str, candidate: str) -> None:
    pool = [positive, candidate]
    found = Guards([candidate], [[positive]], [[candidate]], GuardSettings(), pool).reasons(0, pool[::-1])
    assert found[1] is not None or not letters(positive)
    assert set(found) <= {None, "identical", "answer", "near_duplicate", "same_question"}


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


def framed(text: str) -> str:
    return f"您好：{text.rstrip('。')}。谢谢！（某某中心 8800123）"


@pytest.mark.parametrize("frame", [str, framed])
def test_few_answers_of_a_shop(frame: Callable[[str], str]) -> None:
    """So few texts that no word can be told to be rare; with the same words around each, they are what they were."""
    pairs = [*DIFFERENT, *ALIKE]
    queries = [query for first, _, second, _ in pairs for query in (first, second)]
    positives = [[frame(text)] for _, first, _, second in pairs for text in (first, second)]
    pool = list(dict.fromkeys(text for (text,) in positives))
    near = np.tile(np.arange(len(queries)), (len(queries), 1))
    guards = Guards(queries, positives, [[] for _ in queries], GuardSettings(), pool, near)
    for number, query in enumerate(queries):
        (other,) = positives[number ^ 1]
        (reason,) = guards.reasons(number, [other])
        assert (reason is not None) == (number >= 2 * len(DIFFERENT)), (query, other, reason)


ANSWERS = [
    "可以代办", "周末晚上九点闭馆", "请把饮料放进门口的储物柜", "请到一楼按原价赔偿，或者买一本同版本的新书", "黑白每张三角，彩色每张两元",
    "每本书可以续借两次，每次一个月", "少儿区在二楼东侧", "读者停车两小时内免费",
]  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])  # all answers have the frame, or every second one
def test_a_frame_around_answers_is_no_evidence(every: int) -> None:
    pool = [text if i % every else framed(text) for i, text in enumerate(ANSWERS)]
    asked = [f"第{number}问" for number in range(len(pool))]  # names nothing that is answered
    guards = Guards(asked, [[text] for text in pool], [[]] * len(pool), GuardSettings(), pool)
    for number, positive in enumerate(pool):
        reasons = dict(zip(pool, guards.reasons(number, pool), strict=True))
        assert reasons.pop(positive) == "identical" and set(reasons.values()) == {None}


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ("不支持花呗", "支持花呗", True), ("不能退", "能退货", True), ("不支持花呗", "没支持花呗", False),
        ("不支持花呗", "用花呗付款", False), ("不支持花呗，支持微信", "支持花呗", False), ("无需预约", "需预约", True),
    ],
)  # fmt: skip
def test_what_one_denies_and_the_other_says(one: str, other: str, want: bool) -> None:
    likeness = Likeness([one, other])
    assert likeness.facts_differ(one, other) == likeness.facts_differ(other, one) == want
