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

import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.encoder.encode import encode
from bge_core.encoder.load import load_encoder
from bge_core.encoder.tokens import tokenize
from bge_core.files import atomic, records, sources
from bge_core.files.records import Row
from bge_core.mining.file_checks import Finding, check_rows, summary_lines
from bge_core.mining.mine import Mined, mined_rows
from bge_core.mining.mine import mine as mine_negatives
from bge_core.mining.report import report_facts, write_mining_report
from bge_core.mining.teacher import load_teacher
from bge_core.runtime.cli import as_dict, run_stage
from bge_core.runtime.config import MineConfig
from bge_core.runtime.launch import start
from bge_core.search.cache import EmbeddingCache, cache_summary, clean_cache, fingerprint
from bge_core.search.exact import gpu_available

logger = logging.getLogger(__name__)

ALWAYS_SHOWN = ("rows", "pool", "positives_dropped", "rows_filled_at_random", "rows_short")


def manifest_path(output_file: str | Path) -> Path:
    """Where the manifest of a mined file lies."""
    return Path(f"{output_file}.manifest.json")


def report_path(config: MineConfig) -> Path:
    """Where the report goes."""
    return Path(config.report or f"{config.output_file}.report.html")


def refuse_output(config: MineConfig) -> None:
    """Raise UserError unless the output can be written without harm to anything but an earlier output."""
    output = Path(str(config.output_file))
    for path in (output, manifest_path(output), report_path(config)):
        if path.exists() and not path.is_file():
            raise UserError(f"--output_file {output}: {path} is there and is not a file; choose another name")
        for name in ("input_file", "candidate_pool"):
            for other in map(Path, getattr(config, name)):
                if path.exists() and other.exists() and path.samefile(other):
                    raise UserError(f"--output_file {output}: would replace --{name}; choose another name")
    atomic.refuse_unwritable(output.parent)


def read_inputs(config: MineConfig) -> tuple[list[Row], list[str], list[Row]]:
    """The rows, the candidates, each once, and the manifest's entries of both."""
    rows: list[Row] = []
    inputs: list[Row] = []
    for path in config.input_file:
        found = sources.read_training_rows([path])
        rows += found
        inputs.append(sources.describe_source(path, len(found)))
    if not config.candidate_pool:
        return rows, records.distinct_texts(rows, "pos", "neg"), inputs
    texts: list[str] = []
    for path in config.candidate_pool:
        found_texts = sources.read_corpus(path)
        texts += found_texts
        inputs.append(sources.describe_source(path, len(found_texts)))
    return rows, records.distinct_texts([{"text": texts}], "text"), inputs


def mine(config: MineConfig) -> None:
    """Run the stage; prints what it counted and the next command.

    Raises:
        UserError: bad lines (all are counted), an output that cannot be written, not a model, faiss missing.
    """
    if config.check is not None:
        return check(config, config.check)
    is_main = os.environ.get("RANK", "0") == "0"
    rows, pool, inputs = read_inputs(config)
    refuse_output(config)
    gpu_available()  # without faiss, say so before encoding for hours
    accelerator = start(config.fp16, config.bf16)
    load = partial(load_encoder, trust_remote_code=config.trust_remote_code, attention=config.attention)
    encoder = load(str(config.model_name_or_path), pooling=config.sentence_pooling_method).to(accelerator.device)
    num_scored = sum(row.get("neg_scores") is not None for row in rows)
    if num_scored:
        logger.warning("neg_scores of %d rows are left out: mined negatives have no score", num_scored)
    logger.info("%d rows, %d candidates, on %s", len(rows), len(pool), accelerator.device)

    cache = None
    if config.embedding_cache_dir:
        cache = EmbeddingCache(config.embedding_cache_dir, config.cache_shard_size, config.cache_dtype)
    options = {
        "precision": accelerator.mixed_precision,
        "batch_size": config.batch_size,
        "max_tokens": config.max_tokens,
    }
    vectors_by = cache.vectors if cache else encode
    teacher = load_teacher(config, load, accelerator, partial(vectors_by, **options))
    index_key = ""
    if config.index_factory != "Flat":
        index_key = hash_of(
            fingerprint(encoder),
            config.passage_instruction_for_retrieval,
            config.passage_max_len,
            accelerator.mixed_precision,
            *pool,
        )
        if config.embedding_cache_dir and not config.index_path:
            name = f"{config.index_factory.replace(',', '-')}-{index_key}.faiss"
            config.index_path = str(Path(config.embedding_cache_dir) / name)
    mined = mine_negatives(
        encoder, rows, pool, config, partial(vectors_by, encoder, **options), index_key=index_key, teacher=teacher
    )
    if mined.counts["rows_short"]:
        logger.warning(
            "%d rows have fewer than %d mined negatives: the pool has no more; a larger one goes to --candidate_pool",
            mined.counts["rows_short"],
            config.negative_number,
        )
    if is_main:
        manifest = atomic.make_manifest(
            "mine",
            as_dict(config),
            inputs,
            counts=mined.counts,
            precision=accelerator.mixed_precision,
            search_device=mined.search["device"],
            search=mined.search,
            encoder={
                "model": config.model_name_or_path,
                "pooling": encoder.settings.pooling,
                "normalize": encoder.settings.normalize,
                "query_instruction": mined.query_instruction,
                "passage_instruction": mined.passage_instruction,
            },
            **({"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}),
        )
        facts = report_facts(config, encoder, rows, mined)
        report(config, mined, write(config, mined_rows(rows, mined), manifest, facts))
        inspect(rows, mined, config.inspect)
        if cache:
            show_cache(config, cache)
    accelerator.wait_for_everyone()


def hash_of(*parts: object) -> str:
    """16 hexadecimal digits that stand for the parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def write(config: MineConfig, rows: Iterator[Row], manifest: Row, facts: dict[str, Any]) -> list[Finding]:
    """Output, report and manifest, whole or not at all; the manifest appears last. Returns what the report minds."""
    output = Path(str(config.output_file))
    with ExitStack() as stack:  # left in reverse order
        temporary_manifest = stack.enter_context(atomic.atomic_path(manifest_path(output)))
        temporary_output = stack.enter_context(atomic.atomic_path(output))
        atomic.write_jsonl(temporary_output, rows)
        atomic.write_json(temporary_manifest, manifest)
        findings = write_mining_report(report_path(config), facts)
        manifest_path(output).unlink(missing_ok=True)  # an earlier one must not vouch for the new rows
    return findings


def report(config: MineConfig, mined: Mined, findings: Sequence[Finding]) -> None:
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
    for name in ("query_instruction_for_retrieval", "passage_instruction_for_retrieval", "sentence_pooling_method"):
        if getattr(config, name) is not None:  # training should see the texts as mining did
            settings[name] = getattr(config, name)
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in settings.items())
    flags += " --knowledge_distillation" if mined.neg_teacher is not None else ""
    print(f"next: python train.py {flags} --output_dir outputs/model")


def inspect(rows: Sequence[Row], mined: Mined, count: int) -> None:
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


def show_cache(config: MineConfig, cache: EmbeddingCache) -> None:
    """Print what the cache holds, after cleaning it if that was asked for."""
    folder = Path(str(config.embedding_cache_dir))
    if config.clean_cache:
        num_files, num_bytes = clean_cache(folder, keep=cache.used)
        print(f"cache {folder}: removed {num_files} files, {num_bytes / 1e6:,.1f} MB")
    print(f"cache {folder}: {cache.num_reused:,} vectors read, {cache.num_encoded:,} encoded")
    for entry in cache_summary(folder):
        print(f"cache {folder}: {entry['texts']:,} vectors of {entry['model']}, {entry['bytes'] / 1e6:,.1f} MB")


def check(config: MineConfig, file: str) -> None:
    """Look at a training file, print what is wrong with it and what to do, and write a report if --report names one."""
    rows = sources.read_training_rows([file])
    against = None
    if config.check_against:
        against = [row for _, row in sources.read_source(config.check_against, records.check_evaluation_row)]
    count_tokens = None
    if config.model_name_or_path:
        tokenizer = load_encoder(config.model_name_or_path, trust_remote_code=config.trust_remote_code).tokenizer
        count_tokens = lambda texts: [len(ids) for ids in tokenize(tokenizer, list(texts), 1 << 20)]  # noqa: E731
    findings = check_rows(
        rows,
        against=against,
        count_tokens=count_tokens,
        query_max_len=config.query_max_len,
        passage_max_len=config.passage_max_len,
    )
    print(f"{file}: {len(rows):,} rows")
    print("\n".join(summary_lines(findings)))
    if config.report:
        write_mining_report(config.report, {"title": f"Check of {file}", "findings": findings})
        print(f"written: {config.report}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code: 0 done, 2 the user's input or settings."""
    return run_stage(MineConfig, mine, argv)


if __name__ == "__main__":
    sys.exit(main())
