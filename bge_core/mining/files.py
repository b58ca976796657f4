"""What mining reads and writes: rows, candidates, and the output with its manifest and report."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bge_core import UserError
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.files import atomic, records, sources
from bge_core.files.records import Row
from bge_core.mining.facts import num_tokens, report_facts
from bge_core.mining.file_checks import Finding, check_rows
from bge_core.mining.mine import Mined, mined_rows
from bge_core.mining.report import write_check_report, write_mining_report
from bge_core.runtime.cli import as_dict
from bge_core.runtime.config import MineConfig
from bge_core.search.cache import EmbeddingCache


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


def write_mined(
    config: MineConfig,
    encoder: Encoder,
    rows: Sequence[Row],
    mined: Mined,
    inputs: list[Row],
    precision: str,
    cache: EmbeddingCache | None,
) -> list[Finding]:
    """Output, report and manifest, whole or not at all; the manifest appears last. Returns what the report minds."""
    output, report = Path(str(config.output_file)), report_facts(config, encoder, rows, mined)
    manifest = atomic.make_manifest(
        "mine",
        as_dict(config),
        inputs,
        counts=mined.counts,
        precision=precision,
        search_device=mined.search["device"],
        search=mined.search,
        encoder={
            "model": config.model_name_or_path,
            "pooling": encoder.settings.pooling,
            "normalize": encoder.settings.normalize,
            "query_instruction": mined.query_instruction,
            "passage_instruction": mined.passage_instruction,
        },
        **({"teacher_temperature": mined.teacher_temperature} if mined.teacher_temperature else {}),
        **({"cache": {"encoded": cache.num_encoded, "reused": cache.num_reused}} if cache else {}),
    )
    with ExitStack() as stack:  # left in reverse order
        temporary_manifest = stack.enter_context(atomic.atomic_path(manifest_path(output)))
        temporary_output = stack.enter_context(atomic.atomic_path(output))
        atomic.write_jsonl(temporary_output, mined_rows(rows, mined))
        atomic.write_json(temporary_manifest, manifest)
        findings = write_mining_report(report_path(config), report)
        manifest_path(output).unlink(missing_ok=True)  # an earlier one must not vouch for the new rows
    return findings


def check_file(config: MineConfig) -> tuple[int, list[Finding]]:
    """Look at the training file that --check names, and write a report if --report says where.

    Returns:
        Its number of rows, and what is wrong with them.
    """
    rows = sources.read_training_rows([str(config.check)])
    against = tokenizer = None
    if config.check_against:
        against = [row for _, row in sources.read_source(config.check_against, records.check_evaluation_row)]
    if config.model_name_or_path:
        tokenizer = load_encoder(config.model_name_or_path, trust_remote_code=config.trust_remote_code).tokenizer
    findings = check_rows(
        rows,
        against=against,
        count_tokens=(lambda texts: num_tokens(tokenizer, texts).tolist()) if tokenizer else None,
        query_max_len=config.query_max_len,
        passage_max_len=config.passage_max_len,
    )
    if config.report:
        write_check_report(config.report, f"Check of {config.check}", findings)
    return len(rows), findings
