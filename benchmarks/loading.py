"""What loading a step's batch costs one rank, by the number of ranks: 32 rows of group 8, with 15 negatives each.

    python benchmarks/loading.py [--encoder outputs/encoder] [--checkout path/to/an/earlier/checkout] [--ranks 1 8]

Processor time of one thread, the smallest of --steps, in a fresh process for each checkout, which take turns;
`all_rows_ms` is the part before the rank's own texts are tokenized. Writes benchmarks/results/loading.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from harness import Row

BATCH_SIZE, GROUP_SIZE, NUM_NEGATIVES = 32, 8, 15
TEXT = "请携带本人有效证件，到就近网点柜台办理；" * 5  # 100 characters


def write_data(file: Path, num_rows: int) -> None:
    """Rows of which no two share a text."""
    harness.write_lines(
        file,
        (
            {
                "query": f"第{i}个问题怎么办理",
                "pos": [f"{i}号" + TEXT],
                "neg": [f"{i}号{j}" + TEXT for j in range(NUM_NEGATIVES)],
            }
            for i in range(num_rows)
        ),
    )


def measure(file: str, encoder: str, num_ranks: int, steps: int) -> Row:
    """Milliseconds of one rank's step."""
    import datasets
    from transformers import AutoTokenizer

    from bge_core.runtime.config import TrainConfig
    from bge_core.training.data import TrainingData

    datasets.disable_progress_bars()
    sizes = {"per_device_train_batch_size": BATCH_SIZE, "train_group_size": GROUP_SIZE, "passage_max_len": 512}
    names = {"model_name_or_path": "", "output_dir": "", "train_data": [file]}
    config = TrainConfig(**names, **sizes, query_instruction_for_retrieval="", num_train_epochs=100.0)
    data = TrainingData(config, AutoTokenizer.from_pretrained(encoder), 512, num_ranks // 2, num_ranks, 1)

    def least(load: object) -> float:
        seconds = []
        for step in range(steps):
            begin = time.process_time()
            load(step)  # type: ignore[operator]
            seconds.append(time.process_time() - begin)
        return round(1000 * min(seconds), 1)

    return {"ms": least(data.__getitem__), "all_rows_ms": least(lambda step: list(data.examples(step)))}


def main() -> None:
    parser = harness.parser(__doc__, "encoder", "results")
    parser.add_argument("--checkout", type=os.path.abspath, help="of an earlier version, to compare with")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one", help="of the processes that measure: the training data; --checkout is measured")
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, args.checkout)
        print(json.dumps(measure(args.one, args.encoder, args.ranks[0], args.steps)))
        return
    checkouts = {"now": str(harness.ROOT)} | ({"before": args.checkout} if args.checkout else {})
    found: Row = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_data(file, 2 * BATCH_SIZE * max(args.ranks))
        for num_ranks in args.ranks:
            for name, root in checkouts.items():
                words = ["--one", str(file), "--encoder", os.path.abspath(args.encoder), "--ranks", str(num_ranks)]
                command = [sys.executable, __file__, *words, "--steps", str(args.steps), "--checkout", root]
                environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[name][str(num_ranks)] = json.loads(done.stdout)
                print(num_ranks, name, found[name][str(num_ranks)], file=sys.stderr)
    harness.save("loading", found | harness.facts(steps=args.steps), folder=args.results)


if __name__ == "__main__":
    main()
