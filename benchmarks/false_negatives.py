"""How many planted false negatives reach a miner's output, and how many true ones it loses: FlagEmbedding and ours.

    python benchmarks/false_negatives.py --peers-python outputs/peers/bin/python --data path/to/cmrc [--reuse] [--show]

Real questions and sentences (CMRC 2018, or any folder with train.jsonl and corpus.jsonl), into which texts are planted
of which it is known what they are:

    reworded    a row's positive with its facts kept: words and function words exchanged, clauses in another order, a
                leading phrase, numbers written another way, with a neighbouring sentence, without its last clause
    duplicate   a row's positive with its words kept: width, case, white space, punctuation, traditional characters,
                citation marks, mark-up
    asked twice a new row with the same question, the same again or in other words, whose positive is another text with
                the answer: each row's positive is false as a negative of the other
    near miss   a row's positive with one number or name exchanged for another of its kind: the one asked for, or the
                one the question is about. No false negative: a hard negative that a miner should keep

Each row is used once. Whether a clause holds the answer, and which span a question asks for, is told by the question's
word (who, where, when, how many) and by there being a single span of its kind; all else is left alone. The kinds were
read by hand, 50 of each; --show prints five of each subkind.

Both miners get the same files and settings: ranks 2 to 200, the encoder's own pooling, no instruction; once 198
negatives, which keeps all that the range holds and so counts exactly, and once 15. A planted text counts as reached if
it is a negative of its row or of a row with the same question. FlagEmbedding's miner is that of 1.2.11 with 1.4.2's
model (`peers.py`); what it gave is kept in --output and used again with --reuse while the planted files are the same.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANGE, COUNTS = (2, 200), (198, 15)  # 198 is all of the range
QUERY_LENGTH, PASSAGE_LENGTH = 64, 128
NUM_FALSE, NUM_NEAR = 2000, 500
Row = dict[str, Any]

# Words of one meaning in running text. In a group any stands for any; `a>b` goes one way.
SYNONYMS = """
位于/坐落于 建立/创立 创建/创办 然而/不过 著名/知名 目前/现在 共有/一共有 称为/称作 被称为/被称作 包括/包含 通常>一般
大约/大概 非常/十分 使用/运用 获得/取得 担任/出任 去世/逝世/过世 病逝>因病去世 导致/造成 许多/很多 众多>许多 例如/比如
因此/所以/因而 虽然/尽管 仍然/依然 经常/时常 逐渐/渐渐/逐步 首次/第一次 当时/那时 具有>有 拥有>有 能够>可以 无法/不能
参加/参与 举行/举办 撰写/编写 帮助/协助 组成/构成 分为/分成 大部分/大多数 各种/各类 类似/相似 巨大/庞大 前往/赴
返回/回到 此外/另外 父亲/爸爸 母亲/妈妈 妻子/太太 父母/双亲 影片>电影 电脑/计算机 都市>城市 士兵/兵士 军队>部队
攻占/占领 杀害/杀死 改名/更名 改为/改成 兴建/修建 最终>最后 起初/最初 立即/立刻/马上 突然/忽然 几乎>差不多
又称/又叫/又名 亦称/也称 俗称/俗名叫 原名/本名 别名/别称 分布于/分布在 栖息于/栖息在 总部设在/总部位于 改编自/取材自
隶属于/归属于 毕业于/毕业自 喜爱/喜欢 打败/击败 结婚/成婚 启用/投入使用 首都/国都 全长/总长 体长/身长 直到/直至
如今/现今 居住>住 颜色/色彩 形状/外形 减少/减低 宣布/宣告 允许/准许 超过>多于 至少>最少 迅速/快速 最先>最早 乘客>旅客
火车>列车 歌手/歌星 老师/教师 夺得/赢得 播出/播放 上映/公映 适合/适宜 登基/即位 任命/委任 卸任/离任 继任/接任 率领/带领
批准/核准 至今>到现在 起源于/源于 容易>易
"""
FUNCTION_WORDS = """
曾/曾经 已/已经 因/因为 由于/因为 但/但是 或/或者 可/可以 应/应该 并/并且 虽/虽然 仍/仍旧 常/常常 约/大约
即/就是 及/以及 与/和 亦/也 皆/均 便>就 至>到 该/这个 此>这 之前/以前 之后/以后 如果/假如 若/如果 以及>和 仅/只
"""
# What a question says and what it may say instead.
QUESTION_WORDS = [
    ("什么时候|什么时间", ["何时"]), ("何时", ["什么时候"]), ("哪一年|哪年", ["哪一年", "哪年", "何年"]),
    ("什么地方", ["哪里", "哪儿"]), ("哪里人", ["什么地方的人"]), ("哪里", ["什么地方", "哪儿", "何处"]),
    ("哪个国家", ["哪国", "哪一个国家"]), ("哪国人", ["哪个国家的人"]), ("哪国(?!人)", ["哪个国家"]),
    ("(?<![称作封叫分以成因做定])为什么", ["为何"]), ("为何", ["为什么"]), ("怎么", ["怎样", "如何"]),
    ("怎样(?!的)", ["怎么", "如何"]), ("如何", ["怎样"]), ("叫什么名字", ["名叫什么", "叫什么"]),
    ("叫什么(?!名)", ["叫做什么", "称为什么"]), ("称为什么", ["叫什么", "叫做什么"]), ("多长时间", ["多久"]),
    ("哪两个公司", ["哪两家公司"]), ("哪个公司", ["哪家公司"]), ("哪家公司", ["哪个公司"]), ("哪位", ["哪一位"]),
    ("哪部", ["哪一部"]), ("哪个(?!国)", ["哪一个"]), ("分布在", ["分布于"]), ("分布于", ["分布在"]),
    ("位于", ["坐落于"]), ("(?<!含)有什么(?!样|？|$)", ["有哪些", "有何"]), ("包括", ["包含"]), ("包含", ["包括"]),
    ("获得", ["取得"]), ("举行", ["举办"]), ("成立", ["创立"]), ("担任", ["出任"]), ("属于", ["归属于"]),
    ("由于", ["因为"]), ("主要有", ["有"]), ("是指", ["指的是"]),
]  # fmt: skip
QUESTION_ORDERS = [
    (r"([^，,]+)是谁", r"谁是\1"), (r"谁是([^，,]+)", r"\1是谁"), (r"什么是([^，,]+)", r"\1是什么"),
    (r"([^，,]+)(?<!分别)(?<!指的)是什么", r"什么是\1"),
    (r"([^，,]+?)(?<![称作封叫分以成因做定])为什么([^，,]+)", r"为什么\1\2"),
    (r"([^，,]+?)(?<![是从])[在于]?(?<!是在)(哪一年|哪年|什么时候|何时)([^，,的是]{2,})", r"\2\1\3"),
    (r"([^，,]+?)(?<![拥具设没])有哪些([^，,的]{2,6})", r"\1的\2有哪些"),
    (r"([^，,]+)的([^，,的]{2,6})有哪些", r"\1有哪些\2"),
]  # fmt: skip
LEADS = [
    "据悉，",
    "资料显示，",
    "事实上，",
    "一般认为，",
    "据记载，",
    "据介绍，",
    "据了解，",
    "有资料指出，",
    "根据资料，",
]
SIMPLIFIED = (
    "为国学时个与会长线区东来亚赛现开尔称内经车动电间场军对队这马员龙过业号两设约将进数鱼广语类华岛机联湾战达关从鳍条头们属运无视兰总"
    "则务该门统乐处传组计结实陆单铁产书纪县较说剧应带点黄选参级连离节资画张专齿标创义风议红转举权认职师还状气奥际汉维没领阳侧决亲变纳随"
    "质观记园见层兴协构导银办环镇论济编边录营争题吴双儿医圣桥欧奖强项击调卫许样爱岁报围终规戏艺圆蓝显孙温图刘续众网给飞缘独响伦装杀问积"
    "担备萨护莱简货楼载届细顿树评诺盖写丽鳞声邻码热辑继鲁弹败软宁费织伤毕满陈负灵练宫宽词换泽习宝"
)
TRADITIONAL = (
    "為國學時個與會長線區東來亞賽現開爾稱內經車動電間場軍對隊這馬員龍過業號兩設約將進數魚廣語類華島機聯灣戰達關從鰭條頭們屬運無視蘭總"
    "則務該門統樂處傳組計結實陸單鐵產書紀縣較說劇應帶點黃選參級連離節資畫張專齒標創義風議紅轉舉權認職師還狀氣奧際漢維沒領陽側決親變納隨"
    "質觀記園見層興協構導銀辦環鎮論濟編邊錄營爭題吳雙兒醫聖橋歐獎強項擊調衛許樣愛歲報圍終規戲藝圓藍顯孫溫圖劉續眾網給飛緣獨響倫裝殺問積"
    "擔備薩護萊簡貨樓載屆細頓樹評諾蓋寫麗鱗聲鄰碼熱輯繼魯彈敗軟寧費織傷畢滿陳負靈練宮寬詞換澤習寶"
)

SURNAMES = (
    "赵钱孙李周吴郑王冯陈蒋沈韩杨朱秦许何吕施张孔曹严魏陶姜谢潘葛范彭鲁韦马苗方任袁柳唐罗薛雷贺汤郝傅康余顾孟黄穆萧尹姚邵汪祁毛戴宋庞熊"
    "纪项董梁杜阮贾郭梅林钟徐邱骆夏蔡田胡霍柯卢莫丁邓洪崔龚程裴陆翁段侯刘詹叶黎谭翟瞿廖耿聂曾苏"
)
PEOPLE = """
林俊贤 张居正 项少龙 陈慧琳 苏锦梁 谭望嵩 徐晓飞 朱元璋 梁启超 潘佩珠 郑有杰 张舒雅 黄飞鸿 吴少阳 周信芳 张永海 王僧辩
吴三桂 陈寅恪 袁彭年 许月凤 邓兆棠 朱亮祖 李惠珍 张元素 李婉华 林瑞麟 罗贯中 潘仕成 张雨生 李自成 刘完素 邵伯温 吴少诚
林嘉华 严秋华 冯梦龙 谭元春 徐展堂 吕不韦 陈水扁 杨丽音 贾秀全 郑成功 廖琼枝 孙燕姿 吴楚帆 黄家驹 顾炎武 张作霖 姚婷芝
秦始皇 夏侯玄 刘公显 胡锦涛 张学友 瞿希贤 吴志森 宋美龄 林则徐 赵匡胤 叶乔波 陈子壮 王安石 王欣逸 刘晓庆 朱厚照 卢照邻
张献忠 吴健雄 袁世凯 吴佩孚 戴相龙 彭家丽 李小龙 郑介民 刘德华 刘青云 马连良 李克勤 李卓敏 姜大卫 黄健翔 杨乃武 张仲景
孙思邈 黄庭坚 范纯仁 吕惠卿 王贞治 吴元济 郭富城 王阳明 武则天 诸葛亮 司马懿 孙权 刘备 曹爽 孙休 徐陵 韩遂 曹操 张飞
韩愈
"""
COUNTRIES = """
中国 日本 美国 印度 英国 加拿大 越南 法国 泰国 西班牙 马来西亚 新加坡 俄罗斯 菲律宾 德国 意大利 奥地利 新西兰 墨西哥
缅甸 南非 荷兰 韩国 瑞士 巴西 瑞典 斐济 克罗地亚 波兰 斯里兰卡 莱索托 尼泊尔 阿根廷 葡萄牙 比利时 丹麦 挪威 芬兰 希腊
土耳其 埃及 肯尼亚 伊朗 以色列 智利 秘鲁 古巴 匈牙利 罗马尼亚 乌克兰 蒙古 柬埔寨 老挝 澳大利亚
"""
PROVINCES = """
河北 山西 辽宁 吉林 黑龙江 江苏 浙江 安徽 福建 江西 山东 河南 湖北 湖南 广东 海南 四川 贵州 云南 陕西 甘肃 青海 广西
新疆 西藏
"""
CITIES = """
北京 上海 天津 重庆 广州 深圳 成都 杭州 南京 武汉 西安 洛阳 开封 沈阳 长春 哈尔滨 大连 青岛 济南 郑州 长沙 南昌 合肥
福州 厦门 昆明 贵阳 苏州 无锡 宁波 温州 绍兴 扬州 台北 高雄 香港 澳门 东京 大阪 京都 伦敦 巴黎 纽约 波士顿 洛杉矶
芝加哥 柏林 慕尼黑 维也纳 莫斯科 罗马 米兰 马德里 温哥华 多伦多 悉尼 墨尔本 曼谷 首尔 孟买 里昂
"""
NO_NAME = "氏军区市县国路鱼色湾龙尔斯卡伯切纳纽柱湖浦州瓜登堂宫帝雅界建等姊粹蒙郡嫩"  # not in the names meant here
NUMBER = r"(?<![\d.,A-Za-z])\d[\d,]*(?:\.\d+)?[万亿]?(?![\d.A-Za-z])"
CHINESE_NUMBER = r"[一二两三四五六七八九十百千万亿]+"
TIME = r"(?:[\d〇零一二三四五六七八九十元]+(?:年代?|月|日|号|世纪)[初末]?)+"
TITLE = r"《[^《》\n]{2,20}》"
DOTTED = r"[\u4e00-\u9fff]{1,8}(?:·[\u4e00-\u9fff]{1,8})+"
OPEN, CLOSE = "《「『“‘（(", "》」』”’）)"


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
        if ">" in group:
            old, new = group.split(">")
            table[old].append(new)
        else:
            words = group.split("/")
            for word in words:
                table[word] += [other for other in words if other != word]
    return table


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


# ------------------------------------------------------------------------------------------ what a question asks for


def is_person(word: str) -> bool:
    """A name in Chinese form that is no other word."""
    return word in PEOPLE.split() or (len(word) == 3 and word[0] in SURNAMES and not set(word) & set(NO_NAME))


def people_of(text: str) -> list[str]:
    """All that may be a person's name."""
    words = [word for word, tag in tagged(text) if tag in ("nr", "nrt", "nrfg") and len(word) > 1]
    return words + re.findall(DOTTED, text)


def places_of(text: str) -> list[str]:
    """All that may be a place."""
    return [word for word, tag in tagged(text) if (tag == "ns" and len(word) > 1) or place_group(word)]


def place_group(word: str) -> str:
    """What may stand for a place: the others of its group."""
    return next((group for group in (COUNTRIES, PROVINCES, CITIES) if word in group.split()), "")


def spans_of(kind: str, query: str, text: str) -> list[str]:
    """The spans of the text that may be the answer to a question for `kind`."""
    if kind == "time":
        return re.findall(TIME, text)
    if kind == "person":
        return people_of(text)
    if kind == "place":
        return places_of(text)
    if kind == "title":
        return re.findall(TITLE, text)
    text = re.sub(TIME, "，", text)
    unit = re.search(r"(?:多少|几)(公里|平方公里|公尺|公分|厘米|小时|分钟|英里|美元|港元|[^？?是的，\s])", query)
    if unit is None:
        return re.findall(NUMBER, text)
    return [n + unit[1] for n in re.findall(rf"({NUMBER}|{CHINESE_NUMBER})\s?多?(?={re.escape(unit[1])})", text)]


ASKED = {
    "time": r"哪一?年|几年|几月|何时|什么时候|什么时间|哪一?天",
    "count": r"多少|几(?!内|率|何|乎)",
    "person": r"(?<!是)谁|的.{1,8}是谁|是谁[^？?]|哪一?位",
    "place": r"哪里|哪儿|(?<!的)什么地方|哪个国家|哪国|哪个城市|哪个省|何处",
    "title": r"(?:哪一?[部本首]|什么)(?:电影|书|小说|作品|歌曲?|影片|电视剧|著作|专辑|节目|杂志)"
    r"|哪一?部|哪一?本|哪一?首",
}


def asked_for(query: str, positive: str) -> tuple[str, str] | None:
    """Kind and text of the only span that can be the answer; None where question or text leave a doubt."""
    kinds = [kind for kind, pattern in ASKED.items() if re.search(pattern, query)]
    if len(kinds) != 1:
        return None
    spans = {span for span in spans_of(kinds[0], query, positive) if span not in query}
    return (kinds[0], spans.pop()) if len(spans) == 1 else None


# ----------------------------------------------------------------------------------------------- reworded positives


def exchange(text: str, table: dict[str, list[str]], rng: random.Random, share: float) -> tuple[str, int]:
    """Words of the table outside quotation marks exchanged with probability `share`; the text and how many."""
    ends, depth = {0}, depths(text)
    for word, _ in tagged(text):
        ends.add(max(ends) + len(word))
    out, at, count = "", 0, 0
    while at < len(text):
        lengths = [n for n in range(6, 0, -1) if {at, at + n} <= ends and text[at : at + n] in table and not depth[at]]
        length = lengths[0] if lengths else 1
        word = text[at : at + length]
        if lengths and rng.random() < share:
            word, count = rng.choice(table[word]), count + 1
        out, at = out + word, at + length
    return out, count


def synonyms(source: Source, rng: random.Random) -> str | None:
    """At least two words for others of their meaning."""
    text, count = exchange(source.positive, parse_words(SYNONYMS), rng, 0.9)
    return text if count >= 2 else None


def change_function_words(text: str, rng: random.Random) -> tuple[str, int]:
    """Function words dropped, added, or in their other form; the text and how many."""
    words, depth, out, at, count = tagged(text), depths(text), "", 0, 0
    table, none = parse_words(FUNCTION_WORDS), ("", "x")
    for i, (word, tag) in enumerate(words):
        (before, tag_before), (after, tag_after) = words[i - 1] if i else none, (words + [none])[i + 1]
        new = word
        if depth[at]:
            pass
        elif word in table:
            joins = word in "和与" and min(len(before), len(after)) < 2  # 和语, 与会: a word cut in two
            if tag_before != "m" and not joins and not (word in "并且" and after[:1] in "不未没非无"):
                new = rng.choice(table[word])
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


def function_words(source: Source, rng: random.Random) -> str | None:
    """At least two changes of function words."""
    text, count = change_function_words(source.positive, rng)
    return text if count >= 2 else None


def lead(source: Source, rng: random.Random) -> str | None:
    """A phrase before the sentence."""
    if tagged(source.positive)[0][1] in ("c", "d", "p", "r", "x", "m"):
        return None
    return rng.choice(LEADS) + source.positive


def clauses_of(text: str) -> list[str]:
    """The text cut behind its commas that stand in no brackets or quotation marks."""
    depth, clauses, begin = depths(text), [], 0
    for at, character in enumerate(text):
        if (character == "，" or text[at : at + 2] == ", ") and not depth[at]:
            clauses.append(text[begin:at])
            begin = at + 1
    return [*clauses, text[begin:]]


BOUND = (  # what ties a clause to the one before it or to its time
    "而|但|则|又|也|还|并|且|因|所以|故|就|便|才|再|后|最|终|其|该|此|这|那|他|她|它|者|同|当|时|直到|使|令|让|导致|造成"
    "|例如|如|否|若|虽|仅|甚|更|从|分别|以|第[一二三]|年|月|日|世纪|及|等|曾|已|包括|即|或|只|前|称|了|、.*的|[：:；;。]"
)


def clause_order(source: Source, rng: random.Random) -> str | None:
    """Two clauses that say something of the same subject, exchanged."""
    end = source.positive[-1]
    if end not in "。；":
        return None
    clauses = clauses_of(source.positive[:-1])

    def free(clause: str) -> bool:
        kinds = [tag for _, tag in tagged(clause)]
        return 4 <= len(clause) <= 30 and kinds[0] in ("v", "n", "vn") and not re.search(BOUND, clause)

    pairs = [i for i in range(1, len(clauses) - 1) if free(clauses[i]) and free(clauses[i + 1])]
    pairs = [
        i for i in pairs if tagged(clauses[i])[0][1] == tagged(clauses[i + 1])[0][1] and clauses[i - 1][-1:] != "称"
    ]
    if not pairs:
        return None
    at = rng.choice(pairs)
    clauses[at], clauses[at + 1] = clauses[at + 1], clauses[at]
    return "，".join(clauses) + end


def chinese(number: int) -> str:
    """12 -> 十二, for numbers below 10,000."""
    if number == 0:
        return "零"
    out, zero = "", False
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // place % 10
        if digit:
            out += ("零" if zero and out else "") + "〇一二三四五六七八九"[digit] + unit
        zero = not digit
    return out[1:] if out.startswith("一十") else out


def change_numbers(text: str, rng: random.Random) -> tuple[str, int]:
    """Numbers outside quotation marks written another way, of the same value; the text and how many."""
    zero, ones = rng.choice("〇零"), "〇一二三四五六七八九"
    counter = "个名位座条种间家次部首岁张届层辆艘所支队场枚颗项处组期集章"

    def dated(match: re.Match[str]) -> str:
        year = "".join((zero + ones[1:])[int(digit)] for digit in match[1]) + "年" if match[1] else ""
        return year + "".join(chinese(int(n)) + unit for n, unit in zip(match.groups()[1:], "月日", strict=True) if n)

    def counted(match: re.Match[str]) -> str:
        return ("两" if match[1] == "2" else chinese(int(match[1]))) + match[2]

    def arabic(match: re.Match[str]) -> str:
        tens, rest = match[1].split("十")
        return str(10 * ones.index(tens or "一") + ones.index(rest or "〇")) + match[2]

    # What stands in a range, a decimal or a code is left alone.
    before, behind = (
        r"(?<![\d.,:$＄－\-~～至到、/A-Za-z—–第][ ])(?<![\d.,:$＄－\-~～至到、/A-Za-z—–第])",
        r"(?!\s?[－\-~～/—–至到、\d.,])",
    )
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (before + r"(?>(\d{4})年(?:(\d{1,2})月(?:(\d{1,2})日)?)?)" + behind, dated),
        (before + r"(?>()(\d{1,2})月(?:(\d{1,2})日)?)" + behind, dated),
        (before + rf"(?>(\d{{1,3}})([{counter}]))" + behind, counted),
        (r"第(?>(\d{1,3}))(?![\d.,－\-~～/])", lambda m: "第" + chinese(int(m[1]))),
        (before + r"(?>(\d{1,3}(?:,\d{3})+))(?![\d,.])", lambda m: m[1].replace(",", "")),
        (
            r"(?<=[\u4e00-\u9fff])(?>([1-9]\d{4,6}))(?=[人元名户票吨米只枚座辆张位]|平方|公里|多)",
            lambda m: f"{int(m[1]):,}",
        ),
        (before + r"(?>(\d+\.\d))万(?!亿)", lambda m: str(round(float(m[1]) * 10_000))),
        (before + r"(?>(\d{1,3}))[%％]" + behind, lambda m: "百分之" + chinese(int(m[1]))),
    ]
    back = (
        r"(?<![一二三四五六七八九十百千万第])(?>([二三四五六七八九]?十[一二三四五六七八九]?))(世纪|[个名人座月日届岁])"
    )
    quoted = re.findall(r"《[^》]*》|「[^」]*」|“[^”]*”", text)
    for mark, part in enumerate(quoted):
        text = text.replace(part, chr(0xE000 + mark), 1)
    count = 0
    for pattern, write in rules:
        text, found = re.subn(pattern, write, text)
        count += found
    if not count:
        text, count = re.subn(back, arabic, text)
    for mark, part in enumerate(quoted):
        text = text.replace(chr(0xE000 + mark), part, 1)
    return text, count


def number_format(source: Source, rng: random.Random) -> str | None:
    """The numbers of the text written another way."""
    text, count = change_numbers(source.positive, rng)
    return text if count else None


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


def last_clause_cut(source: Source, rng: random.Random) -> str | None:
    """Without its last clause, where the only span that can be the answer stands before it."""
    clauses, asked = clauses_of(source.positive), asked_for(source.query, source.positive)
    if len(clauses) < 3 or asked is None or source.positive[-1] != "。":
        return None
    kept, cut = "，".join(clauses[:-1]) + "。", clauses[-1]
    shared = any(source.query[i : i + 2] in cut for i in range(len(source.query) - 1))
    return kept if asked[1] in kept and asked[1] not in cut and not shared and len(cut) >= 5 else None


# ---------------------------------------------------------------------------------------------------- duplicates


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
    ways = [
        re.sub(between, " ", text), re.sub(r"([，。；：])", r"\1 ", text), "\u3000\u3000" + text, text.replace(" ", ""),
        re.sub(r"([，；：])", "\\1\u200b", text), "\ufeff" + text, re.sub(r"([，；])", "\\1\n", text),
    ]  # fmt: skip
    ways = [way for way in ways if way != text]
    return rng.choice(ways)


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
    if len(set(source.positive) & set(SIMPLIFIED)) < 3:
        return None
    return source.positive.translate(str.maketrans(SIMPLIFIED, TRADITIONAL))


def citation_marks(source: Source, rng: random.Random) -> str | None:
    """Marks of references, as copied from an encyclopedia."""
    mark, clauses = rng.randint(2, 30), clauses_of(source.positive)
    end = f"[{mark}]" if rng.random() < 0.5 else f"[{mark}][{mark + 1}]"
    if len(clauses) > 2 and rng.random() < 0.5:
        at = rng.randrange(len(clauses) - 1)
        return "，".join([*clauses[:at], clauses[at] + f"[{mark - 1}]", *clauses[at + 1 :]]) + end
    return source.positive + end


def markup(source: Source, rng: random.Random) -> str | None:
    """What is left of a page's mark-up."""
    text, clauses = source.positive, clauses_of(source.positive)
    ways = [
        f"<p>{text}</p>",
        "&nbsp;&nbsp;" + text,
        "，<br/>".join(clauses),
        f"**{clauses[0]}**" + text[len(clauses[0]) :],
    ]
    return rng.choice(ways)


# ------------------------------------------------------------------------------------------------------ asked twice


def other_answer(source: Source, rng: random.Random) -> str | None:
    """Another text with the answer: rewritten in several ways, or with its neighbour and rewritten lightly."""
    text = source.positive
    if rng.random() < 0.5:
        longer = rng.choice([neighbour_after, neighbour_before])(source, rng)
        return None if longer is None else exchange(longer, parse_words(SYNONYMS), rng, 0.9)[0]
    text = clause_order(source, rng) or text
    ways = sum([text != source.positive])
    text, count = exchange(text, parse_words(SYNONYMS), rng, 0.9)
    ways += count
    text, count = change_function_words(text, rng)
    ways += count
    text, count = change_numbers(text, rng)
    ways += bool(count)
    led = lead(Source(source.row, source.query, text, "", ""), rng)
    return (led or text) if ways >= 3 else None


def same_question(query: str, rng: random.Random) -> str | None:
    """The same question."""
    return query


def particles(query: str, rng: random.Random) -> str | None:
    """Politeness, particles, the mark at the end."""
    plain = query.rstrip("？?。 ")
    ways = ["请问" + query, plain, plain + "呢？", "请问" + plain, f"我想知道{plain}", f"想请教一下，{query}"]
    return rng.choice([way for way in ways if way != query])


def question_words(query: str, rng: random.Random) -> str | None:
    """Question words and verbs for others."""
    new = query
    for pattern, words in rng.sample(QUESTION_WORDS, len(QUESTION_WORDS)):
        if new == query:
            new = re.sub(pattern, rng.choice(words), query, count=1)
    return new if new != query else None


def question_order(query: str, rng: random.Random) -> str | None:
    """The words in another order."""
    for pattern, order in QUESTION_ORDERS:
        match = re.fullmatch(pattern, query.rstrip("？?"))
        if match:
            return match.expand(order) + "？"
    return None


# ------------------------------------------------------------------------------------------------------ near misses


@dataclass
class Names:
    """What stands elsewhere in the corpus, by kind."""

    text: str
    years: list[str]
    titles: list[str]
    people: list[str]
    organizations: dict[str, list[str]]
    subjects: dict[str, list[str]]
    counts: dict[str, list[str]]


SUBJECT = r"([\u4e00-\u9fff]{3,10}?)(?=（|\(|是[一由位]|位于|，(?:又|俗|亦|也|是|为|简称))"
ORGANIZATION = r"大学|学院|公司|银行|铁路局|电视台|委员会|中学|俱乐部|协会|医院|国家队|足球队"


def subject_of(query: str, positive: str) -> str:
    """The name that the positive begins with, if the question is about it."""
    match = re.match(SUBJECT, positive)
    bad = {"c", "d", "p", "r", "v", "m", "t", "f", "uj", "ul", "u", "zg"}
    if match is None or match[1] not in query or any(tag in bad for _, tag in tagged(match[1])):
        return ""
    return match[1]


def organizations_of(text: str) -> list[str]:
    """Institutions by the words' own tags, with the kind of institution as their end."""
    return [w for w, tag in tagged(text) if tag == "nt" and len(w) >= 4 and re.search(f"(?:{ORGANIZATION})$", w)]


def collect_names(sources: Sequence[Source], corpus: Sequence[str]) -> Names:
    """All names and numbers that may stand for another."""
    text = "\n".join(corpus)
    organizations, subjects, counts = defaultdict(set), defaultdict(set), defaultdict(set)
    for sentence in corpus:
        for word in organizations_of(sentence):
            organizations[word[-2:]].add(word)
        for number, unit in re.findall(
            rf"({NUMBER}|{CHINESE_NUMBER})(公里|[\u4e00-\u9fff])", re.sub(TIME, "，", sentence)
        ):
            counts[unit].add(number)
    for source in sources:
        if subject := subject_of(source.query, source.positive):
            subjects[subject[-2:]].add(subject)

    def ordered(words: dict[str, set[str]]) -> dict[str, list[str]]:
        return {key: sorted(some) for key, some in words.items()}

    return Names(
        text, sorted(set(re.findall(r"(?<!\d)\d{3,4}(?=年)", text))), sorted(set(re.findall(TITLE, text))),
        [name for name in PEOPLE.split() if name in text], ordered(organizations), ordered(subjects), ordered(counts),
    )  # fmt: skip


def other_years(old: str, names: Names) -> list[str]:
    """Times of the same form, up to 15 years away."""
    year = re.match(r"(\d{3,4})年(代?)", old)
    if year is None:
        return []
    some = [y for y in names.years if 0 < abs(int(y) - int(year[1])) <= 15 and len(y) == len(year[1])]
    return [y + old[len(year[1]) :] for y in some if not year[2] or y[-1] == "0"]


def other_counts(old: str, names: Names) -> list[str]:
    """Numbers with as many digits, of the same unit."""
    number = re.match(rf"{NUMBER}|{CHINESE_NUMBER}", old)
    assert number is not None
    unit = old[number.end() :].strip()
    known = names.counts.get(unit if unit in names.counts else unit[:1], [])
    if not unit:
        known = sorted(set().union(*names.counts.values()))
    if number[0][0].isdigit():
        shape = re.sub(r"\d", "0", number[0])
        some = [n for n in known if re.sub(r"\d", "0", n) == shape]
    else:
        some = [n for n in known if re.fullmatch(r"[两二三四五六七八九十]+", n) and len(n) == len(number[0])]
    same = {number[0], number[0].translate(str.maketrans("二两", "两二"))}
    return [n + old[number.end() :] for n in some if n not in same] if number[0] != "一" else []


def other_name(kind: str, old: str, source: Source, names: Names, rng: random.Random) -> str | None:
    """Another of the same kind that stands elsewhere in the corpus and in neither question nor positive."""
    some: list[str] = {
        "time": lambda: other_years(old, names),
        "count": lambda: other_counts(old, names),
        "person": lambda: names.people if is_person(old) else [],
        "place": lambda: [place for place in place_group(old).split() if place in names.text],
        "title": lambda: names.titles,
        "organization": lambda: names.organizations.get(old[-2:], []),
        "subject": lambda: names.subjects.get(old[-2:], []),
    }[kind]()
    both = source.query + source.positive
    some = [name for name in some if name != old and name not in both and name not in old and old not in name]
    return rng.choice(some) if some else None


def answer(kind: str, names: Names) -> Maker:
    """The span that the question asks for, exchanged."""

    def make(source: Source, rng: random.Random) -> str | None:
        query, text = source.query, source.positive
        asked = asked_for(query, text)
        if asked is None or asked[0] != kind:
            return None
        old = asked[1]
        if kind == "place":  # a place asked for is often given more closely than by the one name in the text
            country = re.search("哪个国家|哪国", query)
            if place_group(old) != COUNTRIES if country else not re.search(rf"[于在到往]{old}(?:[，。；]|$)", text):
                return None
        if kind == "person" and re.search(rf"[{SURNAMES}·]{old}|{old}[·车路站]", text):
            return None
        whole = rf"(?<![\d.,]){re.escape(old)}(?!\d)" if old[0].isdigit() else re.escape(old)
        ranged = rf"[到至~～－第/–-]\s?{whole}|{whole}\s?[到至~～－-]"
        if kind in ("count", "time") and re.search(ranged, text):
            return None
        new = other_name(kind, old, source, names, rng)
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
        new = other_name(kind, old, source, names, rng)
        return source.positive.replace(old, new) if new else None

    return make


# ----------------------------------------------------------------------------------------------------- the planting


REWORDED: dict[str, Maker] = {
    "synonyms": synonyms, "function words": function_words, "clause order": clause_order, "leading phrase": lead,
    "number format": number_format, "neighbour behind": neighbour_after, "neighbour before": neighbour_before,
    "last clause cut": last_clause_cut,
}  # fmt: skip
DUPLICATE: dict[str, Maker] = {
    "width": other_width, "case": other_case, "white space": white_space, "marks changed": punctuation_changed,
    "marks dropped": punctuation_dropped, "end mark dropped": end_dropped, "quotation marks": quotation_marks,
    "traditional": traditional, "citation marks": citation_marks, "mark-up": markup,
}  # fmt: skip
QUESTIONS: dict[str, Callable[[str, random.Random], str | None]] = {
    "same question": same_question, "particles": particles, "question words": question_words,
    "word order": question_order,
}  # fmt: skip


def makers_of(names: Names) -> dict[str, dict[str, Maker]]:
    """Kind -> subkind -> what makes it."""
    near_misses = {f"asked: {kind}": answer(kind, names) for kind in ASKED}
    near_misses |= {
        f"named: {kind}": topic(kind, names) for kind in ("time", "person", "place", "title", "organization", "subject")
    }
    twice: dict[str, Maker] = dict.fromkeys(QUESTIONS, other_answer)
    return {"reworded": REWORDED, "duplicate": DUPLICATE, "asked twice": twice, "near miss": near_misses}


def choose(made: dict[tuple[str, str], dict[int, Row]], counts: dict[str, int], positives: list[str]) -> list[Row]:
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
    place = {text: i for i, text in enumerate(corpus)}
    positives = [row["pos"][0] for row in rows]
    around = ["", *corpus, ""]
    sources = [
        Source(i, row["query"], text, around[place[text]], around[place[text] + 2])
        for i, (row, text) in enumerate(zip(rows, positives, strict=True))
        if len(row["pos"]) == 1 and text in place
    ]
    random.Random(seed).shuffle(sources)
    questions, texts = {row["query"] for row in rows}, set(corpus)
    made: dict[tuple[str, str], dict[int, Row]] = {}
    for kind, makers in makers_of(collect_names(sources, corpus)).items():
        for subkind, make in makers.items():
            some = made[kind, subkind] = {}
            for source in sources:
                rng = random.Random(f"{seed} {kind} {subkind} {source.row}")
                text = make(source, rng)
                if text is None or text == source.positive or text in texts:
                    continue
                new: Row = {"kind": kind, "subkind": subkind, "row": source.row, "query": source.query, "text": text}
                some[source.row] = new | {"positive": source.positive}
                if kind == "asked twice":
                    question = QUESTIONS[subkind](source.query, rng)
                    if question is None or (question in questions and question != source.query):
                        del some[source.row]
                    else:
                        some[source.row]["question"] = question
    third = NUM_FALSE // 3
    counts = {"reworded": third + 1, "duplicate": third + 1, "asked twice": third // 2, "near miss": NUM_NEAR}
    rows, planted = list(rows), []
    for new in choose(made, counts, positives):
        question = new.pop("question", None)
        planted.append(new)
        if question is not None:  # each positive is false for the other's row
            other = {"row": len(rows), "query": question, "text": new["positive"], "positive": new["text"]}
            planted.append(new | other)
            rows.append({"query": question, "pos": [new["text"]]})
    pool = list(dict.fromkeys([*corpus, *(new["text"] for new in planted)]))
    random.Random(seed).shuffle(pool)
    return rows, pool, planted


# --------------------------------------------------------------------------------------------------- both miners


def write_lines(path: Path, lines: Sequence[Row]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[Row]:
    """JSON lines."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def mine_flagembedding(job: Row) -> None:
    """hn_mine.py of 1.2.11 with 1.4.2's model, once for each number of negatives, and the rank of what was planted."""
    import importlib.util

    import numpy as np
    from FlagEmbedding import FlagModel  # type: ignore[import-not-found]

    file = Path(job["miner"]) / "FlagEmbedding/baai_general_embedding/finetune/hn_mine.py"
    spec = importlib.util.spec_from_file_location("their_hn_mine", file)
    assert spec is not None and spec.loader is not None
    miner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(miner)
    folder = Path(job["folder"])
    rows, pool = read_lines(folder / "rows.jsonl"), [line["text"] for line in read_lines(folder / "pool.jsonl")]
    model = FlagModel(
        job["model"], use_fp16=False, devices="cpu", pooling_method=job["pooling"], query_max_length=QUERY_LENGTH,
        passage_max_length=PASSAGE_LENGTH,
    )  # fmt: skip

    def encode(call: Callable[..., Any], texts: list[str], length: int) -> Any:
        """2,048 texts at a time, each part kept, so that a run that was stopped goes on."""
        parts = []
        for begin in range(0, len(texts), 2048):
            part = texts[begin : begin + 2048]
            key = hashlib.sha256(json.dumps([job["model_digest"], job["pooling"], length, part]).encode()).hexdigest()
            file = folder / f"vectors_{key[:24]}.npy"
            if not file.exists():
                np.save(folder / "unfinished.npy", call(part, batch_size=32, max_length=length))
                os.replace(folder / "unfinished.npy", file)
            parts.append(np.load(file))
        return np.concatenate(parts)

    passages = encode(model.encode, pool, PASSAGE_LENGTH)
    queries = encode(model.encode_queries, [row["query"] for row in rows], QUERY_LENGTH)
    place = {text: i for i, text in enumerate(pool)}
    model.encode = lambda texts, **more: passages[[place[text] for text in texts]]  # encoded once for all runs
    model.encode_queries = lambda texts, **more: queries
    for count in COUNTS:
        random.seed(job["seed"])
        output = str(folder / f"flagembedding_{count}.jsonl")
        miner.find_knn_neg(
            model, str(folder / "rows.jsonl"), str(folder / "pool.jsonl"), output, list(RANGE), count, False
        )
    ranks = []
    for new in read_lines(folder / "planted.jsonl"):
        scores = passages @ queries[new["row"]]
        ranks.append(int(np.sum(scores > scores[place[new["text"]]])))
    (folder / "ranks.json").write_text(json.dumps(ranks), encoding="utf-8")


def run(words: list[str], threads: int) -> None:
    """A process of its own; ends the program if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-4000:]}")


def run_flagembedding(args: argparse.Namespace, folder: Path) -> None:
    """The peer's runs, unless their result for the same files is there and --reuse is given."""
    encoder = Path(args.encoder)
    digest = hashlib.sha256(json.dumps([RANGE, COUNTS, QUERY_LENGTH, PASSAGE_LENGTH, args.seed]).encode())
    for path in [folder / f"{name}.jsonl" for name in ("rows", "pool", "planted")] + [encoder / "model.safetensors"]:
        digest.update(path.read_bytes())
    stamp, key = folder / "flagembedding.sha256", digest.hexdigest()
    if args.reuse and stamp.exists() and stamp.read_text() == key:
        return
    modes = json.loads((encoder / "1_Pooling/config.json").read_text(encoding="utf-8"))
    pooling = "mean" if modes.get("pooling_mode_mean_tokens", modes.get("pooling_mode") == "mean") else "cls"
    job = {
        "miner": args.miner, "model": args.encoder, "folder": str(folder), "seed": args.seed, "pooling": pooling,
        "model_digest": hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    stamp.unlink(missing_ok=True)
    run([args.peers_python, str(Path(__file__).resolve()), "--child", json.dumps(job)], args.threads)
    stamp.write_text(key)


def run_ours(args: argparse.Namespace, folder: Path) -> None:
    """mine.py, once for each number of negatives; its vectors are kept."""
    for count in COUNTS:
        words = [
            sys.executable, "mine.py", "--model_name_or_path", args.encoder, "--input_file", f"{folder}/rows.jsonl",
            "--candidate_pool", f"{folder}/pool.jsonl", "--output_file", f"{folder}/ours_{count}.jsonl",
            "--range_for_sampling", f"{RANGE[0]}-{RANGE[1]}", "--negative_number", str(count), "--query_max_len",
            str(QUERY_LENGTH), "--passage_max_len", str(PASSAGE_LENGTH), "--query_instruction_for_retrieval", "",
            "--passage_instruction_for_retrieval", "", "--cache_dir", f"{folder}/cache", *shlex.split(args.mine_args),
        ]  # fmt: skip
        run(words, args.threads)


# ------------------------------------------------------------------------------------------------------ the counting


def reached_by(mined: Sequence[Row], planted: Sequence[Row]) -> list[bool]:
    """Of each planted text: whether it is a negative of its row or of a row with the same question."""
    negatives: dict[str, set[str]] = defaultdict(set)
    for row in mined:
        negatives[row["query"]].update(row["neg"])
    return [new["text"] in negatives[new["query"]] for new in planted]


def count_all(folder: Path) -> tuple[list[Row], Row]:
    """A line for each subkind and kind, and how many of the peer's negatives that were not planted ours lacks."""
    planted, ranks = read_lines(folder / "planted.jsonl"), json.loads((folder / "ranks.json").read_text())
    mined = {
        f"{side}_{count}": read_lines(folder / f"{side}_{count}.jsonl")
        for side in ("flagembedding", "ours")
        for count in COUNTS
    }
    reached = {name: reached_by(rows, planted) for name, rows in mined.items()}
    kinds = list(dict.fromkeys(new["kind"] for new in planted))
    keys = [(kind, subkind) for kind in kinds for subkind in [*dict.fromkeys(
        new["subkind"] for new in planted if new["kind"] == kind
    ), ""]]  # fmt: skip
    lines = []
    for kind, subkind in [*keys, ("all false negatives", "")]:
        some = [
            i for i, new in enumerate(planted)
            if (new["kind"] == kind and subkind in ("", new["subkind"]))
            or (kind == "all false negatives" and new["kind"] != "near miss")
        ]  # fmt: skip
        line: Row = {"kind": kind, "subkind": subkind or "all", "planted": len(some)}
        line["above_range"] = sum(ranks[i] < RANGE[0] for i in some)
        line["in_range"] = sum(RANGE[0] <= ranks[i] < RANGE[1] for i in some)
        line |= {name: sum(flags[i] for i in some) for name, flags in reached.items()}
        all_kept = f"_{COUNTS[0]}"
        line["lost"] = sum(reached["flagembedding" + all_kept][i] and not reached["ours" + all_kept][i] for i in some)
        lines.append(line)
    texts = {new["text"] for new in planted}
    theirs, ours = mined[f"flagembedding_{COUNTS[0]}"], mined[f"ours_{COUNTS[0]}"]
    pairs = [(set(a["neg"]) - texts, set(b["neg"])) for a, b in zip(theirs, ours, strict=True)]
    totals = {
        "rows": len(ours), "others": sum(len(a) for a, _ in pairs), "others_lost": sum(len(a - b) for a, b in pairs)
    }  # fmt: skip
    return lines, totals


def table(lines: Sequence[Row]) -> str:
    """Markdown."""
    heads = [
        "kind", "subkind", "planted", "ranks 0-1", "ranks 2-199", f"FlagEmbedding, {COUNTS[0]}", f"ours, {COUNTS[0]}",
        "theirs, not ours", f"FlagEmbedding, {COUNTS[1]}", f"ours, {COUNTS[1]}",
    ]  # fmt: skip
    sides = [[f"{side}_{count}" for side in ("flagembedding", "ours")] for count in COUNTS]
    keys = ["planted", "above_range", "in_range", *sides[0], "lost", *sides[1]]
    text = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * len(keys)]
    for line in lines:
        names = [line["kind"], line["subkind"]]
        if line["subkind"] == "all":
            names = [f"**{name}**" for name in names]
        text.append("| " + " | ".join([*names, *(f"{line[key]:,}" for key in keys)]) + " |")
    return "\n".join(text)


def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def show(planted: Sequence[Row], number: int, seed: int) -> Iterator[str]:
    """Samples of each subkind."""
    for kind, subkind in dict.fromkeys((new["kind"], new["subkind"]) for new in planted):
        some = [new for new in planted if (new["kind"], new["subkind"]) == (kind, subkind)]
        yield f"## {kind}, {subkind}"
        for new in random.Random(seed).sample(some, min(number, len(some))):
            yield f"{new['query']}\n    {new['positive']!r}\n    {new['text']!r}"


def main() -> None:
    """Plant, mine with both, count; or with --child the peer's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and corpus.jsonl")
    parser.add_argument("--peers-python", help="python of the environment of benchmarks/requirements.txt")
    parser.add_argument("--miner", default="outputs/FlagEmbedding-1.2.11", help="unpacked source distribution")
    parser.add_argument("--encoder", default="outputs/encoder")
    parser.add_argument("--mine_args", default="", help="further flags of mine.py, in one string")
    parser.add_argument("--output", type=Path, default=Path("outputs/false_negatives"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--reuse", action="store_true", help="the peer's result, if it is of the same files")
    parser.add_argument("--show", action="store_true", help="five samples of each subkind, and no mining")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mine_flagembedding(json.loads(args.child))
        return
    if args.data is None or (args.peers_python is None and not args.show):
        parser.error("--data and --peers-python are needed")
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [line["text"] for line in read_lines(args.data / "corpus.jsonl")]
    rows, pool, planted = plant(read_lines(args.data / "train.jsonl"), corpus, args.seed)
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "pool.jsonl", [{"text": text} for text in pool])
    write_lines(folder / "planted.jsonl", planted)
    if args.show:
        print("\n".join(show(planted, 5, args.seed)))
        return
    run_flagembedding(args, folder)
    run_ours(args, folder)
    lines, totals = count_all(folder)
    command = "python benchmarks/false_negatives.py --peers-python outputs/peers/bin/python --data path/to/cmrc"
    command += f" --mine_args {shlex.quote(args.mine_args)}" if args.mine_args else ""
    facts = {
        "command": command, "seed": args.seed, "date": str(date.today()), "candidates": len(pool),
        "machine": f"{os.cpu_count()} x {processor()}",
    }  # fmt: skip
    record = facts | totals | {"lines": lines}
    note = (
        f"Of FlagEmbedding's {totals['others']:,} negatives that were not planted (all of the range), ours lacks "
        f"{totals['others_lost']:,}. {totals['rows']:,} rows, {len(pool):,} candidates.\n\n"
        f"`{command}`; seed {args.seed}; {facts['machine']}; {facts['date']}"
    )
    (args.results / "false_negatives.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (args.results / "false_negatives.md").write_text(f"{table(lines)}\n\n{note}\n", encoding="utf-8")
    print(f"{table(lines)}\n\n{note}")


if __name__ == "__main__":
    main()
