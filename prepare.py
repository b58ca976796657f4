"""Stage 1, prepare: raw question/answer files -> train.jsonl, test.jsonl, corpus.jsonl, manifest.json.

    python prepare.py --input_dir data_path --output_dir output_path --train_num 10000

A row of the output is one distinct question with all its answers. Two texts are the same when `normalize_text` makes
them equal; the first spelling is the one written. Rows keep the order of the input (files by path, then lines). Which
of them become training rows depends on the seed and the set of pairs alone, not on any order.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import codecs
import csv
import functools
import hashlib
import json
import logging
import random
import re
import shlex
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import openpyxl
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from bge_core import UserError, records
from bge_core.cli import as_dict, run_stage
from bge_core.config import PrepareConfig
from bge_core.records import BadLines, Row, text_id

logger = logging.getLogger(__name__)

OUTPUTS = ("train.jsonl", "test.jsonl", "corpus.jsonl", "manifest.json")
# The first of these names that a file has is taken; anchor and positive are those of sentence-transformers.
QUESTION_NAMES = [
    "query", "question", "q", "anchor", "问题", "提问", "问句", "问", "标准问", "标准问题", "标准问法", "用户问题",
    "用户提问", "用户问", "用户咨询", "咨询问题", "咨询", "问题描述", "问题内容", "问法", "questions", "queries",
    "instruction", "prompt", "title", "标题", "问题标题",
]  # fmt: skip
ANSWER_NAMES = [
    "answer", "pos", "positive", "a", "答案", "回答", "回复", "答复", "答", "解答", "标准答案", "标准回答", "标准回复",
    "客服回答", "客服回复", "参考答案", "最佳答案", "答案内容", "回答内容", "回复内容", "answers", "positives",
    "response", "reply", "passage", "document", "output", "content", "text", "内容", "正文",
]  # fmt: skip
NEGATIVE_NAME = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?|负例|难负例|负样本")
NAME_NOISE = re.compile(r"\(.*?\)|\[.*?\]|【.*?】|[*:]")  # as in 问题(必填), *问题, 问题:
BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")


class Columns(NamedTuple):
    """The names of a file's columns, as it spells them."""

    question: str
    answer: str
    negatives: tuple[str, ...]


Find = Callable[[tuple[str, ...]], Columns]
Place = int | str  # a line or row from 1; sheet!row of a workbook; object n of a JSON list


# --- columns and cells ----------------------------------------------------------------------------------------------


def _plain_name(name: object) -> str:
    return NAME_NOISE.sub("", records.normalize_text(str(name))).strip().casefold()


@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[str, ...], query_field: str | None = None, answer_field: str | None = None) -> Columns:
    """The columns of question, answer and known negatives. Case, spaces and a "(...)" in a name do not matter.

    Args:
        names: all columns of the file.
        query_field: take this column as the question instead of looking for a common name.
        answer_field: likewise for the answer.

    Raises:
        UserError: one of the two is missing or there twice; says what was found and which flag to use.
    """
    plain = [_plain_name(name) for name in names]

    def find(what: str, flag: str, wanted: Sequence[str]) -> str:
        for name in wanted:
            if plain.count(name) > 1:
                raise UserError(f"has {plain.count(name)} columns named '{name}'; rename all but one of them")
            if name in plain:
                return names[plain.index(name)]
        found = ", ".join(f"'{name}'" for name in names[:20]) or "none"
        other = f" or another name of the {what}" if len(wanted) > 1 else ""
        raise UserError(f"no field '{wanted[0]}'{other}; found: {found}; add it, or say with {flag} which it is")

    question = find("question", "--query_field", [_plain_name(query_field)] if query_field else QUESTION_NAMES)
    answer = find("answer", "--answer_field", [_plain_name(answer_field)] if answer_field else ANSWER_NAMES)
    negatives = [name for name, short in zip(names, plain, strict=True) if NEGATIVE_NAME.fullmatch(short)]
    return Columns(question, answer, tuple(name for name in negatives if name not in (question, answer)))


def _text(value: Any, name: str, from_json: bool) -> str:
    """The text of a cell with single spaces, "" where it is empty. UserError says what is wrong with it."""
    if value is None or value != value:  # pandas leaves NaN in an empty cell
        return ""
    if not from_json and not isinstance(value, (str, list, dict, bytes)):
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)  # workbooks: 123.0 is 123
    if not isinstance(value, str):
        found = json.dumps(value, ensure_ascii=False, default=str)[:60]
        raise UserError(f"field '{name}' is {found}; it must be a string")
    if broken := BROKEN_TEXT.search(value):
        problem = "a NUL character; remove it" if broken[0] == "\0" else "half a surrogate pair; remove it"
        if "\udc80" <= broken[0] <= "\udcff":  # what surrogateescape makes of a byte
            problem = "bytes of another encoding; convert the file, for example with iconv -f GB18030 -t UTF-8"
        raise UserError(f"field '{name}' holds at character {broken.start() + 1} {problem}")
    return " ".join(value.split())


def _texts(value: Any, name: str, from_json: bool) -> list[str]:
    if isinstance(value, list):
        return [_text(item, f"{name}[{i}]", from_json) for i, item in enumerate(value)]
    return [_text(value, name, from_json)]


def _parse_row(row: Row, columns: Columns, from_json: bool) -> tuple[str, list[str], list[str]]:
    question = _text(row[columns.question], columns.question, from_json)
    answers = _texts(row[columns.answer], columns.answer, from_json)
    if not answers:
        raise UserError(f"field '{columns.answer}' is an empty list; fill it or remove the line")
    return question, answers, [text for name in columns.negatives for text in _texts(row[name], name, from_json)]


# --- files ----------------------------------------------------------------------------------------------------------


def find_inputs(source: Path, output_dir: Path) -> list[Path]:
    """The files to read: `source` itself, or those of a known kind below it by path, but none below `output_dir`.

    Raises:
        UserError: there is none, or the stage would overwrite its own input.
    """
    if not source.exists():
        raise UserError(f"--input_dir {source}: no such file or folder")
    target = output_dir.resolve()
    if source.resolve() in (target, *(target / name for name in OUTPUTS)):
        raise UserError(f"--output_dir {output_dir}: would overwrite the input; name another folder")
    files = [source]
    if source.is_dir():
        below = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).parts)
        inside = source.resolve() in target.parents  # an earlier output below the input is no input
        files = [path for path in below if path.is_file() and not (inside and target in path.resolve().parents)]
    hidden = (".", "~$")  # ~$: Excel's locks
    files = [path for path in files if not any(part.startswith(hidden) for part in path.relative_to(source).parts)]
    inputs = [path for path in files if path.suffix.lower() in READERS]
    if not inputs:
        raise UserError(f"--input_dir {source}: holds no file of a known kind ({' '.join(READERS)})")
    if others := [path.name for path in files if path.suffix.lower() not in READERS]:
        logger.warning("not read, of another kind: %s%s", ", ".join(others[:5]), ", ..." * (len(others) > 5))
    return inputs


def _open_text(path: Path, newline: str) -> TextIO:
    """UTF-8 with or without BOM, UTF-16 with BOM, or GB18030 where most lines are that and not UTF-8.

    A byte that does not fit becomes a lone surrogate, which `_text` reports.
    """
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return open(path, encoding="utf-16", newline=newline)
        file.seek(0)
        balance = 0
        for line in file:
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    balance += 1
                except UnicodeDecodeError:
                    balance -= "\ufffd" not in line.decode("gb18030", "replace")
    encoding = "gb18030" if balance < 0 else "utf-8-sig"
    return open(path, encoding=encoding, errors="surrogateescape", newline=newline)


def _read_jsonl(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Any]]:
    with _open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row, problem = records.parse_object(line)
                if problem:
                    bad.add(path, number, problem)
                else:
                    yield number, row


def _read_json(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Any]]:
    """[{...}, ...], {"data": [{...}, ...]}, or JSON lines under another name."""
    with _open_text(path, newline="\n") as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            file.seek(0)
            if file.read(100).lstrip().startswith("["):
                raise UserError(f"not JSON ({error}); write [{{...}}, {{...}}], or one object a line") from None
            yield from _read_jsonl(path, find, bad)
            return
    rows = value.get("data", value) if isinstance(value, dict) else value
    rows = rows if isinstance(rows, list) else [rows]
    for i in range(len(rows)):
        yield f"object {i + 1}", rows[i]
        rows[i] = None  # frees a million of them on the way


def _with_header(
    lines: Iterable[tuple[Place, list[Any]]], path: Path, find: Find, bad: BadLines
) -> Iterator[tuple[Place, Row]]:
    """Cells -> rows; the first line that is not blank names the columns."""
    header: list[str] = []
    for place, cells in lines:
        while cells and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        if len(cells) > len(header) > 0:
            bad.add(path, place, f"has {len(cells)} cells for {len(header)} columns; quote the text with the separator")
        elif header and cells:
            yield place, dict(zip_longest(header, cells))
        elif cells:
            header = [str(name) for name in cells]
            find(tuple(header))  # two columns of one name would be one in the row


def _read_csv(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    def lines() -> Iterator[tuple[int, list[str]]]:
        while True:
            place = reader.line_num + 1
            try:
                yield place, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(path, place, f"its quotes do not match ({error}); write a quote inside a quoted text twice")

    with _open_text(path, newline="") as file:
        first = file.readline()
        delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",\t;", key=first.count)
        reader = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
        yield from _with_header(lines(), path, find, bad)


def _read_xlsx(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    """All sheets; one whose columns are not recognised is skipped if another's are."""
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"not a workbook ({error}); save it again as .xlsx, without a password") from None
    problem, recognised = None, False
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # some programs write wrong ones
        cells = enumerate(map(list, sheet.iter_rows(values_only=True)), start=1)
        rows = _with_header(((f"{sheet.title}!{number}", row) for number, row in cells), path, find, bad)
        try:
            first = next(rows, None)
        except UserError as error:
            problem = error
            logger.warning("%s: sheet '%s' is skipped: %s", path, sheet.title, error)
            continue
        if first:
            recognised = True
            yield from chain([first], rows)
    book.close()
    if problem and not recognised:
        raise problem


def _read_parquet(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[Place, Row]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = find(tuple(file.schema_arrow.names))
        batches = file.iter_batches(10_000, columns=[columns.question, columns.answer, *columns.negatives])
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}  # fmt: skip


def read_file(path: Path, find: Find, bad: BadLines) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (question, answers, known negatives) of every good row of a file; what is wrong with the others: `bad`.

    Raises:
        UserError: the file is not what its name says, or has no recognisable columns.
    """
    kind = path.suffix.lower()
    recognised = False
    try:
        for place, row in READERS[kind](path, find, bad):
            try:
                if not isinstance(row, dict):
                    raise UserError(f"is a JSON {type(row).__name__}; write objects")
                columns = find(tuple(row))
                recognised = True
                parsed = _parse_row(row, columns, from_json=kind in (".jsonl", ".json"))
            except UserError as error:
                if isinstance(row, dict) and not recognised:
                    raise
                bad.add(path, place, error)
            else:
                yield parsed
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error}); save it again, text as UTF-8") from None


# --- pairs ----------------------------------------------------------------------------------------------------------


class Texts:
    """Distinct texts, numbered in the order of their first appearance; the first spelling stays."""

    def __init__(self) -> None:
        self.spellings: list[str] = []
        self.numbers: dict[int, int] = {}  # text_id -> number

    def add(self, text: str) -> int:
        number = self.numbers.setdefault(text_id(text), len(self.spellings))
        if number == len(self.spellings):
            self.spellings.append(text)
        return number


class Pairs:
    """Distinct questions, each with the numbers of its answers and of its known negatives."""

    def __init__(self) -> None:
        self.questions, self.answers = Texts(), Texts()
        self.positives: list[list[int]] = []
        self.negatives: defaultdict[int, list[int]] = defaultdict(list)
        self.num_read = self.num_empty = self.num_repeated = 0
        self._seen: set[int] = set()

    def add(self, question: str, answers: Sequence[str], negatives: Sequence[str]) -> None:
        """Take one row; pairs with an empty side and repeated pairs are counted and left out."""
        kept = [answer for answer in answers if question and answer]
        self.num_read += len(answers)
        self.num_empty += len(answers) - len(kept)
        if not kept:
            return
        number = self.questions.add(question)
        if number == len(self.positives):
            self.positives.append([])
        for answer in map(self.answers.add, kept):
            pair = number << 32 | answer
            if pair in self._seen:
                self.num_repeated += 1
            else:
                self._seen.add(pair)
                self.positives[number].append(answer)
        if any(negatives):
            self.negatives[number] += [self.answers.add(text) for text in negatives if text]

    def row(self, question: int) -> Row:
        """{query, pos} of one question."""
        positives = [self.answers.spellings[answer] for answer in self.positives[question]]
        return {"query": self.questions.spellings[question], "pos": positives}

    def training_row(self, question: int, spared: Container[int] = ()) -> Row:
        """{query, pos, neg}: `neg` are the known negatives that are neither in `pos` nor `spared`; absent if none."""
        known, positives = self.negatives.get(question, ()), set(self.positives[question])
        negatives = [n for n in dict.fromkeys(known) if n not in positives and n not in spared]
        return self.row(question) | ({"neg": [self.answers.spellings[n] for n in negatives]} if negatives else {})


def to_triplets(rows: Iterable[Row]) -> Iterator[Row]:
    """Training rows -> sentence-transformers' columns: a triplet for each positive and negative of a row.

    For example `Dataset.from_list(list(to_triplets(read_rows("train_minedHN.jsonl", check_training_row))))`.

    Args:
        rows: objects with query, pos [str] and neg [str].

    Returns:
        {"anchor", "positive", "negative"}; a row without negatives gives {"anchor", "positive"} for each positive.
    """
    for row in rows:
        for positive in row["pos"]:
            pair = {"anchor": row["query"], "positive": positive}
            yield from [{**pair, "negative": negative} for negative in row.get("neg") or []] or [pair]


def from_triplets(triplets: Iterable[Row]) -> Iterator[Row]:
    """Sentence-transformers' columns -> training rows, one for each distinct anchor, in order of appearance.

    prepare.py does the same with files that have these columns.

    Args:
        triplets: objects with anchor, positive and any of negative, negative_1, negative_2, ...

    Returns:
        {"query", "pos", "neg"}, each text once. A text that is a positive of the anchor anywhere is no negative of it;
        `neg` is absent where there is none. Triplets with an empty anchor or positive are left out.

    Raises:
        UserError: a triplet (counted from 1) lacks a column, or holds something else than texts.
    """
    pairs = Pairs()
    for number, triplet in enumerate(triplets, start=1):
        try:
            pairs.add(*_parse_row(triplet, find_columns(tuple(triplet)), from_json=True))
        except UserError as error:
            raise UserError(f"triplet {number}: {error}") from None
    yield from map(pairs.training_row, range(len(pairs.positives)))


# --- split ----------------------------------------------------------------------------------------------------------


def _connect(pairs: Pairs) -> list[int]:
    """For each question the number of one that stands for all that shared answers connect with it (union-find)."""
    parent = list(range(len(pairs.positives)))

    def root(question: int) -> int:
        while parent[question] != question:
            parent[question] = question = parent[parent[question]]
        return question

    first_with: dict[int, int] = {}
    for question, answers in enumerate(pairs.positives):
        for answer in answers:
            parent[root(question)] = root(first_with.setdefault(answer, question))
    return [root(question) for question in range(len(parent))]


def _fill(num_groups: Counter[int], room: int, seed: int) -> dict[int, int]:
    """How many groups of each size to take so that their rows fill `room` as closely as any choice can.

    Among such choices each size gives about the same share of its groups, rounded by chance.

    Args:
        num_groups: size -> how many groups have it.
        room: the largest sum allowed, in rows.
        seed: of the rounding.
    """
    sizes = sorted(num_groups)
    reachable = [1]  # bit r of reachable[i]: the i smallest sizes can give r rows
    for size in sizes:
        sums, count, step = reachable[-1], num_groups[size], 1
        while count:
            step = min(step, count)
            sums |= (sums << size * step) & ((2 << room) - 1)
            count, step = count - step, 2 * step
        reachable.append(sums)
    left, unseen = reachable.pop().bit_length() - 1, sum(size * count for size, count in num_groups.items())
    chance, taken = random.Random(seed), {}
    for size, sums in zip(reversed(sizes), reversed(reachable), strict=True):
        wish = num_groups[size] * left / unseen + chance.random() - 0.5
        distance = [abs(count - wish) for count in range(min(num_groups[size], left // size) + 1)]
        nearest_first = sorted(range(len(distance)), key=distance.__getitem__)
        taken[size] = next(count for count in nearest_first if sums >> (left - count * size) & 1)
        left, unseen = left - taken[size] * size, unseen - num_groups[size] * size
    return taken


def choose_train(pairs: Pairs, train_num: int | None, split_by: str, seed: int) -> list[bool]:
    """Which questions are training rows; depends on the texts and the seed, not on their order.

    Args:
        pairs: what was read.
        train_num: at most this many rows; None, or where that is all: nine tenths.
        split_by: "group": questions that share an answer, also through others, stay together; "question": each alone.
        seed: another seed, another split.

    Raises:
        UserError: one of the two sides would be empty.
    """
    total = len(pairs.positives)
    if total < 2:
        raise UserError("the input holds one question; a split into training and test rows needs two")
    room = total * 9 // 10 if train_num is None else train_num
    if room >= total:
        logger.warning(
            "--train_num %d: there are %d questions; nine tenths of them train, the others test", room, total
        )
        room = total * 9 // 10
    groups = _connect(pairs) if split_by == "group" else list(range(total))
    sizes = Counter(groups)
    for group, size in sizes.most_common():
        if size <= max(1, total / 10):
            break
        members = [question for question in range(total) if groups[question] == group]
        answer, times = Counter(chain.from_iterable(pairs.positives[q] for q in members)).most_common(1)[0]
        logger.warning(
            "%d of the %d questions form one group, since they share answers, and stay together: as '%s'; the most "
            "frequent of the answers (%d times) is '%s'. --split_by question would divide the group",
            size, total, pairs.questions.spellings[members[0]], times, pairs.answers.spellings[answer],
        )  # fmt: skip
    if min(sizes.values()) > room:
        raise UserError(
            f"no group of questions that share answers fits into {room} training rows, the smallest has "
            f"{min(sizes.values())} of all {total}; use --split_by question"
        )
    rank: dict[int, bytes] = {}
    for group, text in zip(groups, pairs.questions.numbers, strict=True):
        key = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
        rank[group] = min(rank.get(group, key), key)
    taken, chosen = _fill(Counter(sizes.values()), room, seed), set()
    for group in sorted(rank, key=rank.__getitem__):
        if taken[sizes[group]]:
            taken[sizes[group]] -= 1
            chosen.add(group)
    return [group in chosen for group in groups]


# --- stage ----------------------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig) -> None:
    """Run the stage; prints what it counted and the next command.

    Raises:
        UserError: nothing to read, bad lines (all are counted), no possible split, or an output folder not ours.
    """
    output_dir = Path(config.output_dir)
    paths = find_inputs(Path(config.input_dir), output_dir)
    records.refuse_foreign_folder(output_dir, config.overwrite_output_dir, OUTPUTS)
    find = functools.partial(find_columns, query_field=config.query_field, answer_field=config.answer_field)
    pairs, bad, inputs = Pairs(), BadLines(), []
    for path in paths:
        num_rows = 0
        for row in tqdm(read_file(path, find, bad), desc=path.name, unit=" rows", disable=None):
            pairs.add(*row)
            num_rows += 1
        logger.info("%s: %d rows", path, num_rows)
        inputs.append(records.describe_input(path, num_rows))
    bad.refuse()
    if not pairs.positives:
        raise UserError(f"--input_dir {config.input_dir}: {pairs.num_read} pairs read, none with question and answer")

    is_train = choose_train(pairs, config.train_num, config.split_by, config.seed)
    train = [question for question, chosen in enumerate(is_train) if chosen]
    test = [question for question, chosen in enumerate(is_train) if not chosen]
    spared = {answer for question in test for answer in pairs.positives[question]} if config.split_by == "group" else ()
    counts = {
        "files": len(paths),
        "rows": sum(entry["rows"] for entry in inputs),
        "pairs": pairs.num_read,
        "pairs_empty": pairs.num_empty,
        "pairs_repeated": pairs.num_repeated,
        "questions": len(pairs.positives),
        "questions_with_several_answers": sum(len(answers) > 1 for answers in pairs.positives),
        "questions_with_known_negatives": len(pairs.negatives),
        "answers": len({answer for answers in pairs.positives for answer in answers}),
        "corpus_texts": len(pairs.answers.spellings),
        "train_rows": len(train),
        "test_rows": len(test),
    }
    with ExitStack() as stack:  # left in reverse order: the manifest appears last
        temporary = {name: stack.enter_context(records.atomic_path(output_dir / name)) for name in reversed(OUTPUTS)}
        records.write_jsonl(temporary["train.jsonl"], (pairs.training_row(question, spared) for question in train))
        records.write_jsonl(temporary["test.jsonl"], map(pairs.row, test))
        corpus = enumerate(pairs.answers.spellings)
        records.write_jsonl(temporary["corpus.jsonl"], ({"id": str(number), "text": text} for number, text in corpus))
        records.write_json(
            temporary["manifest.json"], records.make_manifest("prepare", as_dict(config), inputs, counts=counts)
        )
        (output_dir / "manifest.json").unlink(missing_ok=True)  # an earlier one must not vouch for a mixture

    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<32}{count:>12,}")
    train_file, mined_file = (shlex.quote(str(output_dir / name)) for name in ("train.jsonl", "train_minedHN.jsonl"))
    print(f"written: {', '.join(str(output_dir / name) for name in OUTPUTS)}")
    print("next: python mine.py --model_name_or_path BAAI/bge-large-zh-v1.5 --range_for_sampling 2-200 \\")
    print(f"    --negative_number 15 --input_file {train_file} --output_file {mined_file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
