"""Stage 1, prepare: raw question/answer files -> train.jsonl, test.jsonl, corpus.jsonl, manifest.json.

    python prepare.py --input_dir data_path --output_dir output_path --train_num 10000

A row of the output is one distinct question with all its answers. Two texts are the same when `normalize_text` makes
them equal; the first spelling is the one written. Rows keep the order of the input (files by path, then lines). Which
of them become training rows depends on the seed and the set of pairs alone, not on any order.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bge_core import UserError
from bge_core.files.atomic import describe_input, make_manifest, refuse_foreign_folder
from bge_core.files.columns import Wanted
from bge_core.files.pairs import read_pairs
from bge_core.files.split import OUTPUTS, choose_train, write_split
from bge_core.files.tables import find_inputs
from bge_core.files.understood import summarize
from bge_core.runtime.cli import as_dict, run_stage
from bge_core.runtime.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Run the stage; prints what it understood (stderr), what it counted and the next command.

    Raises:
        UserError: nothing to read, bad lines (all are counted), no possible split, or an output folder not ours.
    """
    output_dir = Path(config.output_dir)
    paths = find_inputs(Path(config.input_dir), output_dir, OUTPUTS)
    refuse_foreign_folder(output_dir, config.overwrite_output_dir, OUTPUTS)
    wanted = Wanted(config.query_field, config.answer_field, config.min_label, config.strip_html)
    pairs, files = read_pairs(paths, wanted)
    print("\n".join(summarize(files)), file=sys.stderr)
    if not pairs.positives:
        raise UserError(f"--input_dir {config.input_dir}: {pairs.num_read} pairs read, none with question and answer")
    is_train = choose_train(pairs, config.train_num, config.split_by, config.seed)
    counts = {
        "files": len(paths),
        "rows": sum(file.rows for file in files),
        "rows_lost": sum(file.lost.total() for file in files),
        **pairs.counts(),
        "train_rows": sum(is_train),
        "test_rows": len(is_train) - sum(is_train),
    }
    inputs = [describe_input(file.path, file.rows) | file.as_entry() for file in files]
    manifest = make_manifest("prepare", as_dict(config), inputs, counts=counts)
    write_split(output_dir, pairs, is_train, config.split_by, manifest)
    report(output_dir, counts)


def report(output_dir: Path, counts: Mapping[str, int]) -> None:
    """Print what was counted, where it lies and the next command."""
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<32}{count:>12,}")
    names = ("train.jsonl", "corpus.jsonl", "train_minedHN.jsonl")
    train_file, corpus_file, mined_file = (shlex.quote(str(output_dir / name)) for name in names)
    print(f"written: {', '.join(str(output_dir / name) for name in OUTPUTS)}")
    print("next: python mine.py --model_name_or_path BAAI/bge-large-zh-v1.5 --range_for_sampling 0-30 \\")
    print(
        f"    --negative_number 15 --input_file {train_file} --candidate_pool {corpus_file} --output_file {mined_file}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
