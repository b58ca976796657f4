"""Stage 1, prepare: raw question/answer files -> train.jsonl, test.jsonl, corpus.jsonl, manifest.json.

    python prepare.py --input_dir data_path --output_dir output_path --train_num 10000

A row of the output is one distinct question with all its answers. Two texts are the same when `normalize_text` makes
them equal; the first spelling is the one written. Rows keep the order of the input (files by path, then lines). Which
of them become training rows depends on the seed and the set of pairs alone, not on any order.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import functools
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from bge_core import UserError
from bge_core.files import atomic
from bge_core.files.pairs import Pairs, choose_train
from bge_core.files.records import BadLines
from bge_core.files.tables import READERS, find_columns, read_file
from bge_core.runtime.cli import as_dict, run_stage
from bge_core.runtime.config import PrepareConfig

logger = logging.getLogger(__name__)

OUTPUTS = ("train.jsonl", "test.jsonl", "corpus.jsonl", "manifest.json")


# --- columns and cells ----------------------------------------------------------------------------------------------


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


# --- pairs ----------------------------------------------------------------------------------------------------------


# --- split ----------------------------------------------------------------------------------------------------------


# --- stage ----------------------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig) -> None:
    """Run the stage; prints what it counted and the next command.

    Raises:
        UserError: nothing to read, bad lines (all are counted), no possible split, or an output folder not ours.
    """
    output_dir = Path(config.output_dir)
    paths = find_inputs(Path(config.input_dir), output_dir)
    atomic.refuse_foreign_folder(output_dir, config.overwrite_output_dir, OUTPUTS)
    find = functools.partial(find_columns, query_field=config.query_field, answer_field=config.answer_field)
    pairs, bad, inputs = Pairs(), BadLines(), []
    for path in paths:
        num_rows = 0
        for row in tqdm(read_file(path, find, bad), desc=path.name, unit=" rows", disable=None):
            pairs.add(*row)
            num_rows += 1
        logger.info("%s: %d rows", path, num_rows)
        inputs.append(atomic.describe_input(path, num_rows))
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
        temporary = {name: stack.enter_context(atomic.atomic_path(output_dir / name)) for name in reversed(OUTPUTS)}
        atomic.write_jsonl(temporary["train.jsonl"], (pairs.training_row(question, spared) for question in train))
        atomic.write_jsonl(temporary["test.jsonl"], map(pairs.row, test))
        corpus = enumerate(pairs.answers.spellings)
        atomic.write_jsonl(temporary["corpus.jsonl"], ({"id": str(number), "text": text} for number, text in corpus))
        atomic.write_json(
            temporary["manifest.json"], atomic.make_manifest("prepare", as_dict(config), inputs, counts=counts)
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
