"""Stage 2, mine: training data -> training data with hard negatives.

    python mine.py --model_name_or_path M --input_file train.jsonl --output_file train_minedHN.jsonl \\
        --range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching

Rows and their other columns stay as they are, in order. `neg` is replaced, or with --keep_neg extended. `neg_scores`
is left out in both cases, since mined negatives have no score. Several processes (torchrun, accelerate launch) share
the encoding and give the same file as one.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from bge_core import UserError, mining, records
from bge_core.config import MineConfig, as_dict, run_stage
from bge_core.launch import start
from bge_core.mining import Mined
from bge_core.model import load_encoder
from bge_core.records import Row
from bge_core.search import gpu_available

logger = logging.getLogger(__name__)

ALWAYS_SHOWN = ("rows", "pool", "positives_dropped", "rows_filled_at_random", "rows_short")


def manifest_path(output_file: str | Path) -> Path:
    """Where the manifest of a mined file lies."""
    return Path(f"{output_file}.manifest.json")


def refuse_output(config: MineConfig) -> None:
    """Raise UserError unless the output can be written without harm to anything but an earlier output."""
    output = Path(config.output_file)
    for path in (output, manifest_path(output)):
        if path.exists() and not path.is_file():
            raise UserError(f"--output_file {output}: {path} is there and is not a file; choose another name")
        for name in ("input_file", "candidate_pool"):
            other = getattr(config, name)
            if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
                raise UserError(f"--output_file {output}: would replace --{name}; choose another name")
    records.refuse_unwritable(output.parent)


def read_pool(config: MineConfig, rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """The candidates, each once, and the manifest's entries of the inputs."""
    inputs = [records.describe_input(config.input_file, len(rows))]
    if config.candidate_pool is None:
        return records.distinct_texts(rows, "pos", "neg"), inputs
    _, texts = records.read_corpus(config.candidate_pool)
    inputs.append(records.describe_input(config.candidate_pool, len(texts)))
    return records.distinct_texts([{"text": texts}], "text"), inputs


def mined_rows(rows: Sequence[Row], mined: Mined) -> Iterator[Row]:
    """The rows of the output: `neg` replaced where it stood, or added at the end; no `neg_scores`."""
    for row, neg in zip(rows, mined.neg, strict=True):
        yield {name: value for name, value in {**row, "neg": neg}.items() if name != "neg_scores"}


def mine(config: MineConfig) -> None:
    """Run the stage; prints what it counted and the next command.

    Raises:
        UserError: bad lines (all are counted), an output that cannot be written, not a model, faiss missing.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    rows = records.read_rows(config.input_file, records.check_training_row)
    pool, inputs = read_pool(config, rows)
    refuse_output(config)
    gpu_available()  # without faiss, say so before encoding for hours
    accelerator = start(config.fp16, config.bf16)
    encoder = load_encoder(
        config.model_name_or_path, pooling=config.sentence_pooling_method, cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code, attention=config.attention,
    ).to(accelerator.device)  # fmt: skip
    num_scored = sum(row.get("neg_scores") is not None for row in rows)
    if num_scored:
        logger.warning("neg_scores of %d rows are left out: mined negatives have no score", num_scored)
    logger.info("%d rows, %d candidates, on %s", len(rows), len(pool), accelerator.device)

    mined = mining.mine(encoder, rows, pool, config, precision=accelerator.mixed_precision)
    if mined.counts["rows_short"]:
        logger.warning(
            "%d rows have fewer than %d mined negatives: the pool has no more; a larger one goes to --candidate_pool",
            mined.counts["rows_short"], config.negative_number,
        )  # fmt: skip
    if is_main:
        manifest = records.make_manifest(
            "mine", as_dict(config), inputs, counts=mined.counts, precision=accelerator.mixed_precision,
            search_device=mined.search_device,
            encoder={
                "model": config.model_name_or_path,
                "pooling": encoder.settings.pooling,
                "normalize": encoder.settings.normalize,
                "query_instruction": mined.query_instruction,
                "passage_instruction": mined.passage_instruction,
            },
        )  # fmt: skip
        write(config, mined_rows(rows, mined), manifest)
        report(config, mined)
    accelerator.wait_for_everyone()


def write(config: MineConfig, rows: Iterator[Row], manifest: Row) -> None:
    """Both files, whole or not at all; the manifest appears last."""
    output = Path(config.output_file)
    with ExitStack() as stack:  # left in reverse order
        temporary_manifest = stack.enter_context(records.atomic_path(manifest_path(output)))
        temporary_output = stack.enter_context(records.atomic_path(output))
        records.write_jsonl(temporary_output, rows)
        records.write_json(temporary_manifest, manifest)
        manifest_path(output).unlink(missing_ok=True)  # an earlier one must not vouch for the new rows


def report(config: MineConfig, mined: Mined) -> None:
    """Print what was counted, where it lies and the next command."""
    counts = dict(mined.counts)
    per_row = [counts.pop(f"negatives_{name}") for name in ("min", "mean", "max")]
    for name, count in counts.items():
        if count or name in ALWAYS_SHOWN:
            print(f"{name.replace('_', ' '):<32}{count:>16,}")
    print(f"{'negatives per row':<32}{f'{per_row[0]} / {per_row[1]:.1f} / {per_row[2]}':>16}  min / mean / max")
    print(f"{'query instruction':<32}{mined.query_instruction!r:>16}")
    print(f"{'passage instruction':<32}{mined.passage_instruction!r:>16}")
    print(f"written: {config.output_file}, {manifest_path(config.output_file)}")
    settings = {"model_name_or_path": config.model_name_or_path, "train_data": config.output_file}
    for name in ("query_instruction_for_retrieval", "passage_instruction_for_retrieval", "sentence_pooling_method"):
        if getattr(config, name) is not None:  # training should see the texts as mining did
            settings[name] = getattr(config, name)
    flags = " ".join(f"--{name} {shlex.quote(value)}" for name, value in settings.items())
    print(f"next: python train.py {flags} --output_dir outputs/model")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MineConfig, mine, argv)


if __name__ == "__main__":
    sys.exit(main())
