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
import heapq
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from bge_core import UserError, mining, records, sources
from bge_core.batch import tokenize
from bge_core.cache import EmbeddingCache, cache_summary, clean_cache, fingerprint
from bge_core.checks import Finding, check_rows, summary_lines
from bge_core.cli import as_dict, run_stage
from bge_core.config import MineConfig
from bge_core.encode import encode
from bge_core.launch import start
from bge_core.mining import Mined
from bge_core.mining_report import write_mining_report
from bge_core.model import Encoder, load_encoder
from bge_core.records import Row
from bge_core.reranker import load_reranker
from bge_core.search import gpu_available

logger = logging.getLogger(__name__)

ALWAYS_SHOWN = ("rows", "pool", "positives_dropped", "rows_filled_at_random", "rows_short")
REPORT_TEXTS = 500  # texts whose lengths the report shows
ROWS_AT_ONCE = 10_000  # whose pairs of texts are compared together: memory does not grow with the rows


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
    records.refuse_unwritable(output.parent)


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
        _, found_texts = sources.read_corpus([path])
        texts += found_texts
        inputs.append(sources.describe_source(path, len(found_texts)))
    return rows, records.distinct_texts([{"text": texts}], "text"), inputs


def mined_rows(rows: Sequence[Row], mined: Mined) -> Iterator[Row]:
    """The rows of the output: `neg` and a teacher's scores replaced where they stood, or added at the end."""
    for i, row in enumerate(rows):
        new = {**row, "neg": mined.neg[i]}
        if mined.pos_teacher is not None and mined.neg_teacher is not None:
            new |= {"pos_scores": mined.pos_teacher[i], "neg_scores": mined.neg_teacher[i]}
        else:
            new.pop("neg_scores", None)
        yield new


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

    cache = EmbeddingCache(config.cache_dir, config.cache_shard_size, config.cache_dtype) if config.cache_dir else None
    options = {
        "precision": accelerator.mixed_precision, "batch_size": config.batch_size, "max_tokens": config.max_tokens,
    }  # fmt: skip
    vectors_by = cache.vectors if cache else encode
    teacher = load_teacher(config, load, accelerator, partial(vectors_by, **options))
    index_key = ""
    if config.index_factory != "Flat":
        index_key = hash_of(fingerprint(encoder), config.passage_instruction_for_retrieval, config.passage_max_len,
                            accelerator.mixed_precision, *pool)  # fmt: skip
        if config.cache_dir and not config.index_path:
            config.index_path = str(
                Path(config.cache_dir) / f"{config.index_factory.replace(',', '-')}-{index_key}.faiss"
            )
    mined = mining.mine(
        encoder, rows, pool, config, partial(vectors_by, encoder, **options), index_key=index_key, teacher=teacher
    )
    if mined.counts["rows_short"]:
        logger.warning(
            "%d rows have fewer than %d mined negatives: the pool has no more; a larger one goes to --candidate_pool",
            mined.counts["rows_short"], config.negative_number,
        )  # fmt: skip
    if is_main:
        manifest = records.make_manifest(
            "mine", as_dict(config), inputs, counts=mined.counts, precision=accelerator.mixed_precision,
            search_device=mined.search["device"], search=mined.search,
            encoder={
                "model": config.model_name_or_path,
                "pooling": encoder.settings.pooling,
                "normalize": encoder.settings.normalize,
                "query_instruction": mined.query_instruction,
                "passage_instruction": mined.passage_instruction,
            },
            **({"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}),
        )  # fmt: skip
        facts = report_facts(config, encoder, rows, mined)
        report(config, mined, write(config, mined_rows(rows, mined), manifest, facts))
        inspect(rows, mined, config.inspect)
        if cache:
            show_cache(config, cache)
    accelerator.wait_for_everyone()


def load_teacher(
    config: MineConfig, load: Callable[..., Encoder], accelerator: Accelerator, vectors_by: Callable[..., Any]
) -> Callable[[Sequence[tuple[str, str]]], np.ndarray] | None:
    """Scores of (query, passage) pairs by the reranker or the second encoder that the flags name, if they name one."""
    if config.reranker_name_or_path:
        reranker = load_reranker(
            config.reranker_name_or_path, max_length=config.reranker_max_length, attention=config.attention,
            trust_remote_code=config.trust_remote_code,
        ).to(accelerator.device)  # fmt: skip
        return partial(
            reranker.score,
            precision=accelerator.mixed_precision,
            max_tokens=config.max_tokens,
            batch_size=config.batch_size,
        )
    if not config.teacher_encoder:
        return None
    encoder = load(config.teacher_encoder).to(accelerator.device)
    known: dict[tuple[str, str], np.ndarray] = {}

    def cosines(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        sides = (("query", 0, config.query_max_len, encoder.settings.query_prompt),
                 ("passage", 1, config.passage_max_len, encoder.settings.passage_prompt))  # fmt: skip
        for side, place, length, prompt in sides:
            new = [text for text in dict.fromkeys(pair[place] for pair in pairs) if (side, text) not in known]
            found = vectors_by(encoder, new, prompt=prompt or "", max_length=length, description=f"teacher: {side}")
            known.update(zip(((side, text) for text in new), np.asarray(found, dtype=np.float32), strict=True))
        return np.array([known["query", query] @ known["passage", passage] for query, passage in pairs])

    return cosines


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
        temporary_manifest = stack.enter_context(records.atomic_path(manifest_path(output)))
        temporary_output = stack.enter_context(records.atomic_path(output))
        records.write_jsonl(temporary_output, rows)
        records.write_json(temporary_manifest, manifest)
        findings = write_mining_report(report_path(config), facts)
        manifest_path(output).unlink(missing_ok=True)  # an earlier one must not vouch for the new rows
    return findings


def report_facts(config: MineConfig, encoder: Encoder, rows: Sequence[Row], mined: Mined) -> dict[str, Any]:
    """What the report shows, see `write_mining_report`."""
    step = max(1, len(rows) // REPORT_TEXTS)
    some = range(0, len(rows), step)
    texts = {
        "query": [rows[i]["query"] for i in some],
        "positive": [rows[i]["pos"][0] for i in some],
        "negative": [mined.neg[i][0] for i in some if mined.neg[i]],
    }
    lengths = {
        name: np.array([len(t) for t in tokenize(encoder.tokenizer, found, 1 << 20)]) for name, found in texts.items()
    }
    margin = [max(found, default=-2.0) - min(own) for own, found in zip(mined.pos_score, mined.neg_score, strict=True)]
    by_margin = sorted(range(len(rows)), key=margin.__getitem__, reverse=True)
    out = list(mined_rows(rows, mined))
    findings = check_rows(out)
    return {
        "title": f"Mined negatives: {Path(str(config.output_file)).name}",
        "settings": as_dict(config) | {"query_instruction": mined.query_instruction,
                                       "passage_instruction": mined.passage_instruction},
        "counts": mined.counts,
        "pos_scores": np.array([score for found in mined.pos_score for score in found]),
        "neg_scores": np.array([score for found in mined.neg_score for score in found]),
        "score_name": "cosine",
        "neg_above": mined.counts["negatives_above_positive"],
        "neg_total": sum(map(len, mined.neg)),
        "positive_ranks": mined.positive_rank,
        "depth": config.sampling_range[1],
        "removed": {
            name: {"count": mined.counts.get(f"{name}_dropped", len(examples)), "examples": examples}
            for name, examples in mined.removed.items()
        },
        "lengths": lengths,
        "length_unit": "tokens",
        "limits": dict.fromkeys(lengths, config.passage_max_len) | {"query": config.query_max_len},
        "inspect": [
            {
                "query": row["query"],
                "pos": list(zip(row["pos"], mined.pos_score[i], strict=True)),
                "neg": list(zip(mined.neg[i], mined.neg_score[i], strict=True)),
            }
            for i in by_margin[: max(20, config.inspect)]
            for row in [rows[i]]
        ],
        "closest": closest_in_words(rows, mined),
        "index": mined.search,
        "findings": findings,
    }  # fmt: skip


def closest_in_words(rows: Sequence[Row], mined: Mined, most: int = 20) -> list[Row]:
    """The negatives that share most letters with a positive of their row: hidden positives would stand among them."""
    from rapidfuzz import fuzz, process

    best: list[tuple[float, int, int, int]] = []  # likeness, row, positive, negative
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = range(first, min(first + ROWS_AT_ONCE, len(rows)))
        places = [(i, p, n) for i in some for p, _ in enumerate(rows[i]["pos"]) for n, _ in enumerate(mined.neg[i])]
        positives, negatives = [rows[i]["pos"][p] for i, p, _ in places], [mined.neg[i][n] for i, _, n in places]
        alike = (process.cpdist(positives, negatives, scorer=fuzz.ratio) / 100).tolist()
        found = ((like, *place) for like, place in zip(alike, places, strict=True))
        best = heapq.nlargest(most, [*best, *found], key=lambda one: one[0])
    return [
        {"query": rows[i]["query"], "positive": rows[i]["pos"][p], "negative": mined.neg[i][n], "alike": round(like, 2),
         "score": mined.neg_score[i][n]}
        for like, i, p, n in best
    ]  # fmt: skip


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
    folder = Path(str(config.cache_dir))
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
        rows, against=against, count_tokens=count_tokens, query_max_len=config.query_max_len,
        passage_max_len=config.passage_max_len,
    )  # fmt: skip
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
