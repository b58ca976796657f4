"""How many planted false negatives reach a miner's output, and how many true ones it loses: FlagEmbedding and ours.

    python benchmarks/false_negatives.py --peers-python outputs/peers/bin/python --data path/to/cmrc [--reuse] [--show]
    python benchmarks/false_negatives.py --data path/to/cmrc --guards_only

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

Each row is used once; planting.py says how the texts are made. The kinds were read by hand, 50 of each; --show prints
five of each subkind.

Both miners get the same files and settings: ranks 2 to 200, the encoder's own pooling, no instruction; once 198
negatives, which keeps all that the range holds and so counts exactly, and once 15. A planted text counts as reached if
it is a negative of its row or of a row with the same question. FlagEmbedding's miner is that of 1.2.11 with 1.4.2's
model (`peers.py`); what it gave is kept in --output and used again with --reuse while the planted files are the same.

--guards_only asks our guards of every planted text, wherever it ranks: no encoder, no peer, half a minute. Questions
that are nearly the same are looked for among BM25's first 32. Guards were chosen on the texts planted at even places;
those at odd places are counted apart.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import LENGTHS, NO_INSTRUCTION, PASSAGE_LENGTH, QUERY_LENGTH, Row, read_lines, write_lines
from planting import plant

RANGE, COUNTS = (2, 200), (198, 15)  # 198 is all of the range
SIDES = ("flagembedding", "ours")
LEFT = ("planted", "left", "planted_odd", "left_odd")  # of --guards_only

# -------------------------------------------------------------------------------------------------------- both miners


def mine_flagembedding(job: Row) -> Row:
    """hn_mine.py of 1.2.11 with 1.4.2's model, once for each number of negatives, and the rank of what was planted."""
    import numpy as np
    from FlagEmbedding import FlagModel  # type: ignore[import-not-found]

    folder, miner = Path(job["folder"]), harness.load_miner(job["miner"])
    rows, pool = read_lines(folder / "rows.jsonl"), [line["text"] for line in read_lines(folder / "pool.jsonl")]
    lengths = {"query_max_length": QUERY_LENGTH, "passage_max_length": PASSAGE_LENGTH}
    model = FlagModel(job["model"], use_fp16=False, devices="cpu", pooling_method=job["pooling"], **lengths)

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
    files = [str(folder / f"{name}.jsonl") for name in ("rows", "pool")]
    for count in COUNTS:
        random.seed(job["seed"])
        miner.find_knn_neg(model, *files, str(folder / f"flagembedding_{count}.jsonl"), list(RANGE), count, False)
    ranks = []
    for new in read_lines(folder / "planted.jsonl"):
        scores = passages @ queries[new["row"]]
        ranks.append(int(np.sum(scores > scores[place[new["text"]]])))
    (folder / "ranks.json").write_text(json.dumps(ranks), encoding="utf-8")
    return {}


def run_flagembedding(args: argparse.Namespace, folder: Path) -> None:
    """The peer's runs, unless their result for the same files is there and --reuse is given."""
    encoder = Path(args.encoder).resolve()
    weights = (encoder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(json.dumps([RANGE, COUNTS, QUERY_LENGTH, PASSAGE_LENGTH, args.seed]).encode())
    for name in ("rows", "pool", "planted"):
        digest.update((folder / f"{name}.jsonl").read_bytes())
    digest.update(weights)
    stamp, key = folder / "flagembedding.sha256", digest.hexdigest()
    if args.reuse and stamp.exists() and stamp.read_text() == key:
        return
    modes = json.loads((encoder / "1_Pooling/config.json").read_text(encoding="utf-8"))
    pooling = "mean" if modes.get("pooling_mode_mean_tokens", modes.get("pooling_mode") == "mean") else "cls"
    job = {"miner": os.path.abspath(args.miner), "model": str(encoder), "folder": str(folder), "seed": args.seed}
    job |= {"pooling": pooling, "model_digest": hashlib.sha256(weights).hexdigest()}
    stamp.unlink(missing_ok=True)
    harness.fresh(mine_flagembedding, args.threads, args.peers_python, job=job)
    stamp.write_text(key)


def run_ours(args: argparse.Namespace, folder: Path) -> None:
    """mine.py, once for each number of negatives; its vectors are kept."""
    files = {"model_name_or_path": os.path.abspath(args.encoder), "input_file": folder / "rows.jsonl"}
    files |= {"candidate_pool": folder / "pool.jsonl", "embedding_cache_dir": folder / "cache"}
    for count in COUNTS:
        settings = {"range_for_sampling": f"{RANGE[0]}-{RANGE[1]}", "negative_number": count}
        settings["output_file"] = folder / f"ours_{count}.jsonl"
        words = harness.flags(**files, **settings, **LENGTHS, **NO_INSTRUCTION)
        harness.run([sys.executable, "mine.py", *words, *shlex.split(args.mine_args)], args.threads)


# ---------------------------------------------------------------------------------------------------- the guards alone


def ask_guards(rows: Sequence[Row], pool: Sequence[str], planted: Sequence[Row]) -> list[Row]:
    """A line for each subkind and kind: how many of the planted texts the guards leave as negatives."""
    from bge_core.mining.guards import Guards, GuardSettings
    from bge_core.search.words import bm25_search

    queries, positives, rows_of = [row["query"] for row in rows], defaultdict(list), defaultdict(list)
    for i, row in enumerate(rows):
        positives[row["query"]] += row["pos"]
        rows_of[row["query"]].append(i)
    near = bm25_search(queries, queries, 32)[1]
    guards = Guards(queries, [positives[query] for query in queries], [[]] * len(rows), GuardSettings(), pool, near)
    lines: dict[tuple[str, str], Row] = {}
    for place, new in enumerate(planted):
        is_left = any(guards.reasons(i, [new["text"]]) == [None] for i in rows_of[new["query"]])
        kind = "near miss" if new["kind"] == "near miss" else "all false negatives"
        for key in dict.fromkeys([(new["kind"], new["subkind"]), (new["kind"], "all"), (kind, "all")]):
            line = lines.setdefault(key, dict(zip(("kind", "subkind"), key, strict=True)) | dict.fromkeys(LEFT, 0))
            for name in LEFT[: 2 * (1 + place % 2)]:
                line[name] += is_left if "left" in name else 1
    return sorted(lines.values(), key=lambda line: (line["kind"], line["subkind"] == "all"))


# ------------------------------------------------------------------------------------------------------- the counting


def reached_by(mined: Sequence[Row], planted: Sequence[Row]) -> list[bool]:
    """Of each planted text: whether it is a negative of its row or of a row with the same question."""
    negatives: dict[str, set[str]] = defaultdict(set)
    for row in mined:
        negatives[row["query"]].update(row["neg"])
    return [new["text"] in negatives[new["query"]] for new in planted]


def count_all(folder: Path) -> tuple[list[Row], Row]:
    """A line for each subkind and kind, and how many of the peer's negatives that were not planted ours lacks."""
    planted, ranks = read_lines(folder / "planted.jsonl"), json.loads((folder / "ranks.json").read_text())
    mined = {f"{side}_{count}": read_lines(folder / f"{side}_{count}.jsonl") for side in SIDES for count in COUNTS}
    reached = {name: reached_by(rows, planted) for name, rows in mined.items()}
    theirs, ours = (f"{side}_{COUNTS[0]}" for side in SIDES)  # all of the range

    def line_of(kind: str, subkind: str, some: list[int]) -> Row:
        line: Row = {"kind": kind, "subkind": subkind, "planted": len(some)}
        line["above_range"] = sum(ranks[i] < RANGE[0] for i in some)
        line["in_range"] = sum(RANGE[0] <= ranks[i] < RANGE[1] for i in some)
        line |= {name: sum(flags[i] for i in some) for name, flags in reached.items()}
        return line | {"lost": sum(reached[theirs][i] and not reached[ours][i] for i in some)}

    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for kind in dict.fromkeys(new["kind"] for new in planted):
        of_kind = [i for i, new in enumerate(planted) if new["kind"] == kind]
        for i in of_kind:
            groups[kind, planted[i]["subkind"]].append(i)
        groups[kind, "all"] = of_kind
    groups["all false negatives", "all"] = [i for i, new in enumerate(planted) if new["kind"] != "near miss"]
    texts = {new["text"] for new in planted}
    pairs = zip(mined[theirs], mined[ours], strict=True)
    others = [(set(their["neg"]) - texts, set(our["neg"])) for their, our in pairs]
    totals = {"rows": len(others), "others": sum(len(a) for a, _ in others)}
    lines = [line_of(kind, subkind, some) for (kind, subkind), some in groups.items()]
    return lines, totals | {"others_lost": sum(len(a - b) for a, b in others)}


def table(lines: Sequence[Row]) -> str:
    """Markdown."""
    heads = ["kind", "subkind", "planted", "ranks 0-1", "ranks 2-199"]
    heads += [f"FlagEmbedding, {COUNTS[0]}", f"ours, {COUNTS[0]}", "theirs, not ours"]
    heads += [f"FlagEmbedding, {COUNTS[1]}", f"ours, {COUNTS[1]}"]
    sides = [[f"{side}_{count}" for side in SIDES] for count in COUNTS]
    keys, rows = ["planted", "above_range", "in_range", *sides[0], "lost", *sides[1]], []
    for line in lines:
        mark = "**" if line["subkind"] == "all" else ""
        names = [f"{mark}{line[key]}{mark}" for key in ("kind", "subkind")]
        rows.append([*names, *(f"{line[key]:,}" for key in keys)])
    return harness.table(heads, rows, left=2)


def samples(planted: Sequence[Row], number: int, seed: int) -> Iterator[str]:
    """Some of each subkind."""
    for kind, subkind in dict.fromkeys((new["kind"], new["subkind"]) for new in planted):
        some = [new for new in planted if (new["kind"], new["subkind"]) == (kind, subkind)]
        yield f"## {kind}, {subkind}"
        for new in random.Random(seed).sample(some, min(number, len(some))):
            yield f"{new['query']}\n    {new['positive']!r}\n    {new['text']!r}"


def main() -> None:
    parser = harness.parser(__doc__, "data", "peers-python", "miner", "encoder", "threads", "results")
    parser.add_argument("--mine_args", default="", help="further flags of mine.py, in one string")
    parser.add_argument("--output", type=Path, default=Path("outputs/false_negatives"))
    parser.add_argument("--reuse", action="store_true", help="the peer's result, if it is of the same files")
    parser.add_argument("--show", action="store_true", help="five samples of each subkind, and no mining")
    parser.add_argument("--guards_only", action="store_true", help="ask the guards alone; no mining")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows, pool, planted = plant(read_lines(args.data / "train.jsonl"), harness.read_texts(args.data), args.seed)
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "pool.jsonl", ({"text": text} for text in pool))
    write_lines(folder / "planted.jsonl", planted)
    if args.show:
        print("\n".join(samples(planted, 5, args.seed)))
        return
    if args.guards_only:
        asked, told = ask_guards(rows, pool, planted), harness.facts(seed=args.seed)
        heads = ["kind", "subkind", "planted", "left as negatives", "planted at odd places", "left of these"]
        text = harness.table(heads, [list(line.values()) for line in asked], left=2)
        harness.save("guards", told | {"lines": asked}, f"{text}\n\n{harness.note(told)}", args.results)
        return
    run_flagembedding(args, folder)
    run_ours(args, folder)
    lines, totals = count_all(folder)
    facts = harness.facts(seed=args.seed)
    text = (
        f"{table(lines)}\n\nOf FlagEmbedding's {totals['others']:,} negatives that were not planted (all of the "
        f"range), ours lacks {totals['others_lost']:,}. {totals['rows']:,} rows, {len(pool):,} candidates.\n\n"
        f"{harness.note(facts)}"
    )
    harness.save("false_negatives", facts | {"candidates": len(pool)} | totals | {"lines": lines}, text, args.results)


if __name__ == "__main__":
    main()
