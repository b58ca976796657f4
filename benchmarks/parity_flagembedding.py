"""Train FlagEmbedding's own model and ours on the same batches; compare their losses and gradients.

FlagEmbedding runs in an environment of its own (benchmarks/requirements.txt), ours in the one that runs this script.
Both are started alone and as two processes, on the same rows in the same order, without dropout, with plain AdamW:

    P="python benchmarks/parity_flagembedding.py"
    $P                                                        # ours against the golden file
    $P --theirs-python BENCH/bin/python                       # ours against theirs, both run now
    $P --theirs-python BENCH/bin/python --output tests/golden/flagembedding_losses.json      # write that file anew
    $P --theirs-python BENCH/bin/python --model M --train_data train.jsonl --batch_size 8 --group_size 4

Batches: step t takes rows t*B .. t*B+B-1 of the file, B being the batch of all processes together, and process r the
r-th part of them; a row gives `pos[0]` and the first G-1 of `neg`. So one process and two see the same global batch.

Read the gradients knowing this: with `negatives_cross_device` FlagEmbedding computes all rows of the global batch on
every process, and its gather passes gradient to the process's own vectors only. The average over W processes is then
1/W of the gradient of the loss that it prints, which AdamW hardly notices and `max_grad_norm` does. In `kl_div` only
the InfoNCE part is scaled so: the distillation part is computed per process and keeps its full gradient.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "flagembedding_losses.json"
TINY_BERT = {"seed": 0, "hidden_size": 32, "num_layers": 2, "dropout": 0.0}
# Small parameters at the bottom, in the middle and at the top: what passes through all three passed everywhere.
NAMED_GRADIENTS = (
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.value.bias",
    "encoder.layer.1.output.LayerNorm.weight",
)

Results = dict[str, Any]  # the content of the golden file: `cases`, and what they were computed from


@dataclass(frozen=True)
class Mode:
    """What a mode sets in FlagEmbedding, by its own names."""

    negatives_cross_device: bool = False
    no_in_batch_neg_flag: bool = False
    knowledge_distillation: bool = False
    kd_loss_type: str = "kl_div"
    use_mrl: bool = False


MODES = {
    "in_batch": Mode(),
    "cross_device": Mode(negatives_cross_device=True),
    "no_in_batch": Mode(no_in_batch_neg_flag=True),
    "kl_div": Mode(knowledge_distillation=True),
    "kl_div_cross_device": Mode(knowledge_distillation=True, negatives_cross_device=True),
    "kl_div_no_in_batch": Mode(knowledge_distillation=True, no_in_batch_neg_flag=True),
    "m3_kd_loss": Mode(knowledge_distillation=True, kd_loss_type="m3_kd_loss"),
    "m3_kd_loss_cross_device": Mode(
        knowledge_distillation=True, kd_loss_type="m3_kd_loss", negatives_cross_device=True
    ),
    "mrl": Mode(use_mrl=True),
    "mrl_cross_device": Mode(use_mrl=True, negatives_cross_device=True),
}


@dataclass(frozen=True)
class Options:
    """What all cases of one run share."""

    batch_size: int = 4  # of all processes together
    group_size: int = 3
    steps: int = 10
    learning_rate: float = 1e-4
    temperature: float = 0.02
    query_max_len: int = 16
    passage_max_len: int = 32
    mrl_dims: tuple[int, ...] = (8, 16, 32)


def make_rows(num_rows: int, group_size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draw rows of random words, all texts different, lengths from 2 tokens to beyond the limits."""
    rng = random.Random(seed)
    words = [
        *"银行卡信用账户密码支付退货快递天气感冒面包旅游",
        "card ",
        "loan ",
        "visa ",
        "log in ",
        "fee ",
        "？",
        "，",
    ]
    seen: set[str] = set()

    def text(most: int) -> str:
        while True:
            value = "".join(rng.choice(words) for _ in range(rng.randint(2, most))).strip()
            if value not in seen:
                seen.add(value)
                return value

    def scores(count: int, low: float) -> list[float]:
        return [round(rng.uniform(low, low + 2.0), 3) for _ in range(count)]

    return [
        {
            "query": text(14),
            "pos": [text(30)],
            "neg": [text(30) for _ in range(group_size - 1)],
            "pos_scores": scores(1, 0.5),
            "neg_scores": scores(group_size - 1, -1.0),
        }
        for _ in range(num_rows)
    ]


def train_theirs(model_folder: str, rows: list[dict[str, Any]], mode: Mode, options: Options, dtype: str) -> Results:
    """Run FlagEmbedding's model and collator for `options.steps` steps in this process group; return what it gave."""
    import torch
    import torch.distributed as dist
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModel, AutoTokenizer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = BiEncoderOnlyEmbedderModel(
        AutoModel.from_pretrained(model_folder, dtype=getattr(torch, dtype)),
        tokenizer=tokenizer,
        negatives_cross_device=mode.negatives_cross_device,
        temperature=options.temperature,
        sub_batch_size=None,
        kd_loss_type=mode.kd_loss_type,
        use_mrl=mode.use_mrl,
        mrl_dims=list(options.mrl_dims),
        sentence_pooling_method="cls",
        normalize_embeddings=True,
    ).train()
    if any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        raise ValueError(f"{model_folder}: dropout must be 0 in its config.json, or no two runs agree")
    collator = AbsEmbedderCollator(
        tokenizer, padding=True, query_max_len=options.query_max_len, passage_max_len=options.passage_max_len
    )
    # As transformers' Trainer wraps a module that is no PreTrainedModel; BERT's pooler gets no gradient.
    parallel = DistributedDataParallel(model, find_unused_parameters=True) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    per_rank = options.batch_size // world_size
    result: Results = {"losses": [], "rank_losses": []}
    for step in range(options.steps):
        start = step * options.batch_size + rank * per_rank
        features = []
        for row in rows[start : start + per_rank]:
            passages = [row["pos"][0], *row["neg"][: options.group_size - 1]]
            scores = [row["pos_scores"][0], *row["neg_scores"][: options.group_size - 1]]
            features.append((row["query"], passages, scores if mode.knowledge_distillation else None))
        batch = collator(features)
        batch["no_in_batch_neg_flag"] = mode.no_in_batch_neg_flag
        optimizer.zero_grad()
        loss = parallel(**batch).loss
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.double() for name, p in model.model.named_parameters() if p.grad is not None}
            result["grad_norm"] = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
            result["gradients"] = {name: gradients[name].tolist() for name in NAMED_GRADIENTS if name in gradients}
        optimizer.step()
        rank_losses = torch.zeros(world_size, dtype=torch.float64)
        rank_losses[rank] = loss.detach()
        dist.all_reduce(rank_losses)
        result["rank_losses"].append(rank_losses.tolist())
        result["losses"].append(float(rank_losses.mean()))
    return result


def train_ours(
    model_folder: str, train_data: str, mode: Mode, options: Options, dtype: str, steps: int | None = None
) -> Results:
    """Run ours for `steps` (default: all) in this process group, if there is one; the same result as `train_theirs`."""
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    import torch

    from bge_core.encoder.load import load_encoder
    from bge_core.files.text import text_id
    from bge_core.runtime.config import TrainConfig
    from bge_core.runtime.distributed import sum_over_ranks, world, wrap
    from bge_core.training.data import Example, TrainingData
    from bge_core.training.optim import build_optimizer
    from bge_core.training.step import StepSettings, forward_backward
    from train import loss_config

    rank, world_size = world()
    per_rank = options.batch_size // world_size
    config = TrainConfig(
        model_name_or_path=model_folder,
        output_dir="",
        train_data=[train_data],
        train_group_size=options.group_size,
        query_max_len=options.query_max_len,
        passage_max_len=options.passage_max_len,
        temperature=options.temperature,
        negatives_cross_device=mode.negatives_cross_device,
        use_inbatch_neg=not mode.no_in_batch_neg_flag,
        exclude_positives=False,  # FlagEmbedding knows no such thing
        knowledge_distillation=mode.knowledge_distillation,
        kd_loss_type=mode.kd_loss_type,  # type: ignore[arg-type]
        use_mrl=mode.use_mrl,
        mrl_dims=list(options.mrl_dims) if mode.use_mrl else [],
        learning_rate=options.learning_rate,
        per_device_train_batch_size=per_rank,
    )
    encoder = load_encoder(model_folder, pooling="cls", normalize=True, dtype=getattr(torch, dtype)).train()
    encoder.freeze()
    data = TrainingData(config, encoder.tokenizer, encoder.max_positions, rank, world_size, accumulation=1)
    model = wrap(encoder)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = build_optimizer(encoder, config.learning_rate, 0.0, betas, config.adam_epsilon)
    settings = StepSettings(loss_config=loss_config(config), cross_device=config.negatives_cross_device)
    result: Results = {"losses": []}
    for step in range(options.steps if steps is None else steps):
        start = step * options.batch_size + rank * per_rank
        examples = []
        for number in range(start, start + per_rank):  # the rows as they lie: no shuffling, no choice, no dealing
            row = data.rows[number]
            passages = [row["pos"][0], *row["neg"][: options.group_size - 1]]
            known_ids = [text_id(text) for text in (*row["pos"], row["query"])]
            scores = (
                [row["pos_scores"][0], *row["neg_scores"][: options.group_size - 1]]
                if mode.knowledge_distillation
                else None
            )
            examples.append(Example(number, row["query"], passages, [*map(text_id, passages)], known_ids, scores))
        first = step * options.batch_size
        counts = [
            (per_rank, sum(1 + len(data.rows[n]["neg"][: options.group_size - 1]) for n in range(i, i + per_rank)))
            for i in range(first, first + options.batch_size, per_rank)
        ]
        optimizer.zero_grad()
        shares = forward_backward(model, [data.collate(examples, counts)], settings)
        if step == 0:
            gradients = {name: p.grad.double() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
            result["grad_norm"] = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
            result["gradients"] = {name: gradients[name].tolist() for name in NAMED_GRADIENTS if name in gradients}
        optimizer.step()
        result["losses"].append(float(sum_over_ranks(shares["loss"].double())))
    return result


def worker(job_file: Path) -> None:
    """Run all cases of one side and world size; started in that side's environment by `run_side`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    options = Options(**{**job["options"], "mrl_dims": tuple(job["options"]["mrl_dims"])})
    rows = read_rows(Path(job["train_data"]))
    dist.init_process_group("gloo")
    cases = []
    for name in job["modes"]:
        case = {"name": f"{name}/W{dist.get_world_size()}", "mode": name, "world_size": dist.get_world_size()}
        for dtype in job["dtypes"]:
            if job["side"] == "theirs":
                case[dtype] = train_theirs(job["model"], rows, MODES[name], options, dtype)
            else:
                case[dtype] = train_ours(job["model"], job["train_data"], MODES[name], options, dtype)
        cases.append(case)
    if dist.get_rank() == 0:
        packages = ("FlagEmbedding", "torch", "transformers") if job["side"] == "theirs" else ("torch", "transformers")
        versions = {name: version(name) for name in packages}
        result = {"versions": versions, "cases": cases}
        Path(job["output"]).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    dist.destroy_process_group()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """One object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run_side(
    side: str,
    python: str,
    model: str,
    rows: list[dict[str, Any]],
    options: Options,
    modes: list[str],
    world_sizes: list[int],
    dtypes: list[str],
) -> Results:
    """Start `worker` for "theirs" or "ours" under torchrun with `python`, once per world size; collect the cases."""
    needed = options.steps * options.batch_size
    if len(rows) < needed:
        raise ValueError(
            f"{options.steps} steps of {options.batch_size} rows need {needed} rows, there are {len(rows)}"
        )
    cases: list[Results] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "train.jsonl", rows)
        for world_size in world_sizes:
            if options.batch_size % world_size:
                raise ValueError(f"batch_size {options.batch_size} is not a multiple of {world_size} processes")
            job_file, output = Path(folder) / f"job{world_size}.json", Path(folder) / f"result{world_size}.json"
            job = {"side": side, "model": model, "train_data": str(Path(folder) / "train.jsonl"), "output": str(output)}
            job |= {"options": asdict(options), "modes": modes, "dtypes": dtypes}
            job_file.write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
            launch = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
            command = [*launch, str(Path(__file__).resolve()), "--worker", str(job_file)]
            subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
            result = json.loads(output.read_text(encoding="utf-8"))
            versions = result["versions"]
            cases += result["cases"]
    source = {
        "theirs": (
            "FlagEmbedding",
            "FlagEmbedding.finetune.embedder.encoder_only.base.modeling.BiEncoderOnlyEmbedderModel",
        ),
        "ours": ("bge_core", "bge_core.training.step.forward_backward"),
    }[side]
    return {
        "source": {
            "package": source[0],
            "class": source[1],
            "generator": "benchmarks/parity_flagembedding.py",
            "versions": versions,
        },
        "options": asdict(options),
        "modes": {name: asdict(MODES[name]) for name in modes},
        "rows": rows,
        "cases": cases,
    }


@dataclass(frozen=True)
class Difference:
    """How two results of one case and type of number differ."""

    case: str
    dtype: str
    first_loss: float  # relative difference of the first loss
    worst_loss: float  # largest relative difference of a loss
    grad_norm_ratio: float  # ours / theirs; with cross-device negatives W is expected
    gradient_cosine: float  # smallest cosine between the recorded gradients


def compare(theirs: Results, ours: Results) -> list[Difference]:
    """Compare two results of the same shape, case by case; cases that only one of them has are left out."""
    differences = []
    our_cases = {case["name"]: case for case in ours["cases"]}
    for their_case in theirs["cases"]:
        our_case = our_cases.get(their_case["name"], {})
        for dtype in ("float32", "float64"):
            if dtype not in their_case or dtype not in our_case:
                continue
            a, b = their_case[dtype], our_case[dtype]
            losses = [abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True)]
            cosines = [1.0]
            for name in a["gradients"].keys() & b["gradients"].keys():
                u, v = a["gradients"][name], b["gradients"][name]
                cosines.append(sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v)))
            ratio = b["grad_norm"] / a["grad_norm"]
            differences.append(Difference(their_case["name"], dtype, losses[0], max(losses), ratio, min(cosines)))
    return differences


def dump(results: Results) -> str:
    """JSON with one row, and one series of a case, a line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key not in ("rows", "cases")
    ]
    for key in ("rows", "cases"):
        values = ",\n".join(json.dumps(value, ensure_ascii=False) for value in results[key])
        lines.append(f"{json.dumps(key)}: [\n{values}\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Run ours and, where asked, theirs; write theirs, and print how they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--theirs-python", help="python of the environment of benchmarks/requirements.txt")
    parser.add_argument("--model", help="model folder with dropout 0 (default: the tests' tiny BERT)")
    parser.add_argument("--train_data", type=Path, help="JSON lines of training rows (default: drawn at random)")
    parser.add_argument("--batch_size", type=int, default=Options.batch_size, help="of all processes together")
    parser.add_argument("--group_size", type=int, default=Options.group_size)
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--query_max_len", type=int, default=Options.query_max_len)
    parser.add_argument("--passage_max_len", type=int, default=Options.passage_max_len)
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--world_sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--output", type=Path, help="write their result here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if not arguments.theirs_python and (arguments.model or arguments.train_data or arguments.output):
        parser.error("--theirs-python is needed: the golden file holds theirs for the default model and rows only")

    options = Options(
        batch_size=arguments.batch_size,
        group_size=arguments.group_size,
        steps=arguments.steps,
        query_max_len=arguments.query_max_len,
        passage_max_len=arguments.passage_max_len,
    )
    theirs: Results = {}
    if arguments.theirs_python:
        rows = make_rows(options.steps * options.batch_size, options.group_size)
        rows = read_rows(arguments.train_data) if arguments.train_data else rows
    else:
        theirs = json.loads(GOLDEN.read_text(encoding="utf-8"))
        rows, options = (
            theirs["rows"],
            Options(**{**theirs["options"], "mrl_dims": tuple(theirs["options"]["mrl_dims"])}),
        )
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_model import make_tiny_bert

            model = str(make_tiny_bert(folder, **TINY_BERT))
        cases = (arguments.modes, arguments.world_sizes, arguments.dtypes)
        if arguments.theirs_python:
            theirs = run_side("theirs", arguments.theirs_python, model, rows, options, *cases)
        ours = run_side("ours", sys.executable, model, rows, options, *cases)
    if arguments.output:
        if arguments.model is None:
            theirs["tiny_bert"] = TINY_BERT
        arguments.output.write_text(dump(theirs), encoding="utf-8")
    print(f"{'case':32} {'dtype':8} {'first loss':>10} {'worst loss':>10} {'grad ratio':>10} {'cosine':>9}")
    for d in compare(theirs, ours):
        numbers = f"{d.first_loss:10.2e} {d.worst_loss:10.2e} {d.grad_norm_ratio:10.6f} {d.gradient_cosine:9.6f}"
        print(f"{d.case:32} {d.dtype:8} {numbers}")


if __name__ == "__main__":
    main()
