"""Stage 2, mine: training data -> training data with hard negatives.

    python mine.py --model_name_or_path M --input_file train.jsonl --output_file train_minedHN.jsonl \\
        --range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching

Rows and their other columns stay as they are, in order. `neg` is replaced, or with --keep_neg extended. A teacher
(--reranker_name_or_path, --teacher_encoder) adds `pos_scores` and `neg_scores`; without one `neg_scores` is left out,
since mined negatives have no score. Several processes (torchrun, accelerate launch) share the encoding and give the
same file as one. `mine.py --check FILE` looks at a training file and mines nothing.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until all below is imported (`run_stage`): a third of the start would be spent on collecting nothing

import logging
import os
import shlex
import sys
from collections.abc import Sequence

from bge_core.encoder.graphs import hold_passes
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.files.records import Row
from bge_core.mining.facts import why_short
from bge_core.mining.file_checks import Finding, summary_lines
from bge_core.mining.files import check_file, manifest_path, read_inputs, refuse_output, report_path, write_mined
from bge_core.mining.mine import Mined, mine_hard_negatives
from bge_core.mining.teacher import Teacher
from bge_core.runtime.cli import run_stage
from bge_core.runtime.config import MineConfig
from bge_core.runtime.distributed import on_main
from bge_core.runtime.launch import start
from bge_core.search.cache import EmbeddingCache, cache_summary, clean_cache
from bge_core.search.exact import gpu_available

logger = logging.getLogger(__name__)

ALWAYS_SHOWN = ("rows", "pool", "positives_dropped", "rows_filled_at_random", "rows_short")


def mine(config: MineConfig) -> None:
    """Run the stage; prints what it counted and the next command.

    Raises:
        UserError: bad lines (all are counted), an output that cannot be written, not a model, faiss missing.
    """
    if config.check is not None:
        num_rows, findings = check_file(config)
        return print_check(config, num_rows, findings)
    rows, pool, inputs = read_inputs(config)
    refuse_output(config)
    gpu_available()  # without faiss, say so before encoding for hours
    accelerator = start(config.fp16, config.bf16)
    precision = accelerator.mixed_precision
    encoder = load_encoder(
        str(config.model_name_or_path),
        pooling=config.sentence_pooling_method,
        trust_remote_code=config.trust_remote_code,
        attention=config.attention,
    ).to(accelerator.device)
    if config.cuda_graphs:
        hold_passes(encoder, precision)
    if num_scored := sum(row.get("neg_scores") is not None for row in rows):
        logger.warning("neg_scores of %d rows are left out: mined negatives have no score", num_scored)
    logger.info("%d rows, %d candidates, on %s", len(rows), len(pool), accelerator.device)
    cache = teacher = None
    if config.embedding_cache_dir:
        cache = EmbeddingCache(config.embedding_cache_dir, config.cache_shard_size, config.cache_dtype)
    if config.reranker_name_or_path or config.teacher_encoder:
        teacher = Teacher(config, accelerator.device, precision, cache)
    mined = mine_hard_negatives(encoder, rows, pool, config, precision=precision, cache=cache, teacher=teacher)
    if mined.counts["rows_short"]:
        logger.warning("%s", why_short(mined.counts, config.negative_number))
    on_main(lambda: write_and_tell(config, encoder, rows, mined, inputs, precision, cache))


def write_and_tell(
    config: MineConfig,
    encoder: Encoder,
    rows: Sequence[Row],
    mined: Mined,
    inputs: list[Row],
    precision: str,
    cache: EmbeddingCache | None,
) -> None:
    """Write the output, its manifest and report, and print what they say."""
    findings = write_mined(config, encoder, rows, mined, inputs, precision, cache)
    print_summary(config, mined, findings)
    print_rows(rows, mined, config.inspect)
    if cache:
        print_cache(config, cache)


def print_summary(config: MineConfig, mined: Mined, findings: Sequence[Finding]) -> None:
    """Print what was counted, what to mind, where it lies and the next command."""
    counts = dict(mined.counts)
    per_row = [counts.pop(f"negatives_{name}") for name in ("min", "mean", "max")]
    for name, count in counts.items():
        if count or name in ALWAYS_SHOWN:
            print(f"{name.replace('_', ' '):<32}{count:>16,}")
    print(f"{'negatives per row':<32}{f'{per_row[0]} / {per_row[1]:.1f} / {per_row[2]}':>16}  min / mean / max")
    print(f"{'query instruction':<32}{mined.query_instruction!r:>16}")
    print(f"{'passage instruction':<32}{mined.passage_instruction!r:>16}")
    if "recall" in mined.search:
        print(f"{'recall of the index':<32}{mined.search['recall']:>16.3f}  against exact search")
    for finding in (one for one in findings if one.severity != "note"):
        print(f"{'PROBLEM' if finding.severity == 'bad' else 'mind'}: {finding.message} {finding.remedy}")
    print(f"written: {config.output_file}, {manifest_path(str(config.output_file))}, {report_path(config)}")
    settings = {"model_name_or_path": config.model_name_or_path, "train_data": config.output_file}
    sides = [f"{side}_{what}" for side in ("query", "passage") for what in ("instruction_for_retrieval", "prompt_name")]
    for name in (*sides, "sentence_pooling_method"):
        if getattr(config, name) is not None:  # training should see the texts as mining did
            settings[name] = getattr(config, name)
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in settings.items())
    flags += " --knowledge_distillation" if mined.neg_teacher is not None else ""
    print(f"next: python train.py {flags} --output_dir outputs/model")


def print_rows(rows: Sequence[Row], mined: Mined, count: int) -> None:
    """Print some rows, evenly spread over the file: the question, its positives and negatives with their scores."""
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def line(kind: str, score: float | None, text: str, colour: int) -> str:
        text = f"{kind:>5} {'' if score is None else f'{score:.3f}':>6}  {' '.join(text.split())[:100]}"
        return f"\033[{colour}m{text}\033[0m" if in_colour else text

    for i in range(0, len(rows), max(1, len(rows) // count))[:count] if count else ():
        print("\n" + line("query", None, rows[i]["query"], 1))
        lowest = min(mined.pos_score[i])
        for text, score in zip(rows[i]["pos"], mined.pos_score[i], strict=True):
            print(line("pos", score, text, 32))
        for score, text in sorted(zip(mined.neg_score[i], mined.neg[i], strict=True), reverse=True):
            print(line("neg", score, text, 31 if score > lowest else 0))


def print_cache(config: MineConfig, cache: EmbeddingCache) -> None:
    """Print what the cache holds, after cleaning it if that was asked for."""
    folder = cache.folder
    if config.clean_cache:
        print(f"cache {folder}: removed {clean_cache(folder, keep=cache.used) / 1e6:,.1f} MB")
    print(f"cache {folder}: {cache.num_reused:,} vectors read, {cache.num_encoded:,} encoded")
    for entry in cache_summary(folder):
        print(f"cache {folder}: {entry['texts']:,} vectors of {entry['model']}, {entry['bytes'] / 1e6:,.1f} MB")


def print_check(config: MineConfig, num_rows: int, findings: Sequence[Finding]) -> None:
    """Print what is wrong with a training file, and what to do."""
    print(f"{config.check}: {num_rows:,} rows")
    print("\n".join(summary_lines(findings)))
    if config.report:
        print(f"written: {config.report}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MineConfig, mine, argv)


if __name__ == "__main__":
    sys.exit(main())
