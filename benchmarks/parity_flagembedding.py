"""Train FlagEmbedding's own model and ours on the same batches; compare their losses and gradients.

FlagEmbedding runs in an environment of its own (benchmarks/requirements.txt), ours in the one that runs this script.
Both are started alone and as two processes, on the same rows in the same order, without dropout, with plain AdamW:

    P="python benchmarks/parity_flagembedding.py"
    $P                                                        # ours against the golden file
    $P --theirs-python BENCH/bin/python                       # ours against theirs, both run now
    $P --theirs-python BENCH/bin/python --output tests/golden/flagembedding_losses.json      # write that file anew

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
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
from harness import ROOT, Row, read_lines
from harness import write_lines as write_rows

GOLDEN = ROOT / "tests" / "golden" / "flagembedding_losses.json"
TINY_BERT = {"seed": 0, "hidden_size": 32, "num_layers": 2, "dropout": 0.0}
# Small parameters at the bottom, in the middle and at the top: what passes through all three passed everywhere.
NAMED_GRADIENTS = (
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.value.bias",
    "encoder.layer.1.output.LayerNorm.weight",
)

WORLD_SIZES, DTYPES = (1, 2), ("float32", "float64")
SOURCE = {
    "package": "FlagEmbedding",
    "class": "FlagEmbedding.finetune.embedder.encoder_only.base.modeling.BiEncoderOnlyEmbedderModel",
    "generator": "benchmarks/parity_flagembedding.py",
}


@dataclass(frozen=True)
class Mode:
    """What a mode sets in FlagEmbedding, by its own names."""

    negatives_cross_device: bool = False
    no_in_batch_neg_flag: bool = False
    knowledge_distillation: bool = False
    kd_loss_type: str = "kl_div"
    use_mrl: bool = False


def distilling(kd_loss_type: str, **more: bool) -> Mode:
    """A mode with a teacher's scores."""
    return Mode(knowledge_distillation=True, kd_loss_type=kd_loss_type, **more)


MODES = {
    "in_batch": Mode(),
    "cross_device": Mode(negatives_cross_device=True),
    "no_in_batch": Mode(no_in_batch_neg_flag=True),
    "kl_div": distilling("kl_div"),
    "kl_div_cross_device": distilling("kl_div", negatives_cross_device=True),
    "kl_div_no_in_batch": distilling("kl_div", no_in_batch_neg_flag=True),
    "m3_kd_loss": distilling("m3_kd_loss"),
    "m3_kd_loss_cross_device": distilling("m3_kd_loss", negatives_cross_device=True),
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

    def row() -> Row:
        texts = {"query": text(14), "pos": [text(30)], "neg": [text(30) for _ in range(group_size - 1)]}
        return texts | {"pos_scores": scores(1, 0.5), "neg_scores": scores(group_size - 1, -1.0)}

    return [row() for _ in range(num_rows)]


def texts_and_scores(row: Row, mode: Mode, group_size: int) -> tuple[list[str], list[float] | None]:
    """A row's positive and first negatives, with the teacher's scores if the mode has them."""
    passages = [row["pos"][0], *row["neg"][: group_size - 1]]
    return passages, [
        row["pos_scores"][0],
        *row["neg_scores"][: group_size - 1],
    ] if mode.knowledge_distillation else None


def first_gradients(module: Any) -> Row:
    """Norm of all gradients, and the named ones."""
    gradients = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    return {"grad_norm": norm, "gradients": {n: gradients[n].tolist() for n in NAMED_GRADIENTS if n in gradients}}


def train_theirs(model_folder: str, rows: list[Row], mode: Mode, options: Options, dtype: str) -> Row:
    """Run FlagEmbedding's model and collator for `options.steps` steps in this process group; return what it gave."""
    import torch
    import torch.distributed as dist
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModel, AutoTokenizer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    settings = {"negatives_cross_device": mode.negatives_cross_device, "temperature": options.temperature}
    settings |= {"kd_loss_type": mode.kd_loss_type, "use_mrl": mode.use_mrl, "mrl_dims": list(options.mrl_dims)}
    settings |= {"sub_batch_size": None, "sentence_pooling_method": "cls", "normalize_embeddings": True}
    backbone = AutoModel.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    model = BiEncoderOnlyEmbedderModel(backbone, tokenizer=tokenizer, **settings).train()
    if any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        raise ValueError(f"{model_folder}: dropout must be 0 in its config.json, or no two runs agree")
    collator = AbsEmbedderCollator(
        tokenizer, padding=True, query_max_len=options.query_max_len, passage_max_len=options.passage_max_len
    )
    # As transformers' Trainer wraps a module that is no PreTrainedModel; BERT's pooler gets no gradient.
    parallel = DistributedDataParallel(model, find_unused_parameters=True) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    per_rank = options.batch_size // world_size
    result: Row = {"losses": [], "rank_losses": []}
    for step in range(options.steps):
        start = step * options.batch_size + rank * per_rank
        some = rows[start : start + per_rank]
        batch = collator([(row["query"], *texts_and_scores(row, mode, options.group_size)) for row in some])
        batch["no_in_batch_neg_flag"] = mode.no_in_batch_neg_flag
        optimizer.zero_grad()
        loss = parallel(**batch).loss
        loss.backward()
        if step == 0:
            result |= first_gradients(model.model)
        optimizer.step()
        rank_losses = torch.zeros(world_size, dtype=torch.float64)
        rank_losses[rank] = loss.detach()
        dist.all_reduce(rank_losses)
        result["rank_losses"].append(rank_losses.tolist())
        result["losses"].append(float(rank_losses.mean()))
    return result


def train_ours(
    model_folder: str, train_data: str, mode: Mode, options: Options, dtype: str, steps: int | None = None
) -> Row:
    """Run ours for `steps` (default: all) in this process group, if there is one; the same result as `train_theirs`."""
    import torch

    from bge_core.encoder import load_encoder
    from bge_core.files.text import text_id
    from bge_core.runtime.config import TrainConfig
    from bge_core.runtime.distributed import sum_over_ranks, world, wrap
    from bge_core.training.build import loss_config
    from bge_core.training.data import Example, TrainingData
    from bge_core.training.optim import build_optimizer
    from bge_core.training.step import StepSettings, forward_backward

    rank, world_size = world()
    per_rank, group = options.batch_size // world_size, options.group_size
    names = {"model_name_or_path": model_folder, "output_dir": "", "train_data": [train_data]}
    sizes = {"train_group_size": group, "per_device_train_batch_size": per_rank, "temperature": options.temperature}
    sizes |= {"query_max_len": options.query_max_len, "passage_max_len": options.passage_max_len}
    modes = {"negatives_cross_device": mode.negatives_cross_device, "use_inbatch_neg": not mode.no_in_batch_neg_flag}
    modes |= {"knowledge_distillation": mode.knowledge_distillation, "kd_loss_type": mode.kd_loss_type}
    modes |= {"use_mrl": mode.use_mrl, "mrl_dims": list(options.mrl_dims) if mode.use_mrl else []}
    modes["exclude_positives"] = False  # FlagEmbedding knows no such thing
    config = TrainConfig(**names, **sizes, **modes, learning_rate=options.learning_rate)
    encoder = load_encoder(model_folder, pooling="cls", normalize=True, dtype=getattr(torch, dtype)).train()
    encoder.freeze()
    data = TrainingData(config, encoder.tokenizer, encoder.max_length, rank, world_size, accumulation=1)
    model = wrap(encoder)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = build_optimizer(encoder, config.learning_rate, 0.0, betas, config.adam_epsilon)
    settings = StepSettings(loss_config=loss_config(config), cross_device=config.negatives_cross_device)

    def example(number: int) -> Example:  # the rows as they lie: no shuffling, no choice, no dealing
        row = data.rows[number]
        passages, scores = texts_and_scores(row, mode, group)
        known_ids = [text_id(text) for text in (*row["pos"], row["query"])]
        return Example(number, row["query"], passages, [*map(text_id, passages)], known_ids, scores)

    result: Row = {"losses": []}
    for step in range(options.steps if steps is None else steps):
        first = step * options.batch_size
        ranks = [range(first + r * per_rank, first + (r + 1) * per_rank) for r in range(world_size)]
        counts = [(per_rank, sum(1 + len(data.rows[n]["neg"][: group - 1]) for n in numbers)) for numbers in ranks]
        optimizer.zero_grad()
        shares = forward_backward(model, [data.collate([*map(example, ranks[rank])], counts)], settings)
        if step == 0:
            result |= first_gradients(encoder.backbone)
        optimizer.step()
        result["losses"].append(float(sum_over_ranks(shares["loss"].double())))
    return result


def options_of(values: Row) -> Options:
    """From a file, where tuples are lists."""
    return Options(**{**values, "mrl_dims": tuple(values["mrl_dims"])})


def worker(job_file: Path) -> None:
    """Run all cases of one side and world size; started in that side's environment by `run_side`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    options, theirs = options_of(job["options"]), job["side"] == "theirs"
    train, rows = (train_theirs, read_lines(job["train_data"])) if theirs else (train_ours, job["train_data"])
    dist.init_process_group("gloo")
    cases, world_size = [], dist.get_world_size()
    for name, mode in MODES.items():
        case: Row = {"name": f"{name}/W{world_size}", "mode": name, "world_size": world_size}
        for dtype in DTYPES:
            case[dtype] = train(job["model"], rows, mode, options, dtype)  # type: ignore[operator]
        cases.append(case)
    if dist.get_rank() == 0:
        packages = (*(["FlagEmbedding"] if theirs else []), "torch", "transformers")
        result = {"versions": {name: version(name) for name in packages}, "cases": cases}
        Path(job["output"]).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    dist.destroy_process_group()


def run_side(side: str, python: str, model: str, rows: list[Row], options: Options) -> Row:
    """Start `worker` for "theirs" or "ours" under torchrun with `python`, once per world size; collect the cases."""
    cases: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        job = {"side": side, "model": model, "options": asdict(options), "output": f"{folder}/result.json"}
        job["train_data"] = write_rows(f"{folder}/train.jsonl", rows)
        (Path(folder) / "job.json").write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
        for world_size in WORLD_SIZES:
            words = harness.torchrun(
                world_size, Path(__file__).resolve(), "--worker", f"{folder}/job.json", python=python
            )
            harness.run(words, threads=1)
            result = json.loads(Path(job["output"]).read_text(encoding="utf-8"))
            cases += result["cases"]
    return {"versions": result["versions"], "cases": cases}


@dataclass(frozen=True)
class Difference:
    """How two results of one case and type of number differ."""

    case: str
    dtype: str
    first_loss: float  # relative difference of the first loss
    worst_loss: float  # largest relative difference of a loss
    grad_norm_ratio: float  # ours / theirs; with cross-device negatives W is expected
    gradient_cosine: float  # smallest cosine between the recorded gradients


def compare(theirs: Row, ours: Row) -> list[Difference]:
    """Compare two results of the same shape, case by case."""
    differences = []
    our_cases = {case["name"]: case for case in ours["cases"]}
    for their_case in theirs["cases"]:
        our_case = our_cases[their_case["name"]]
        for dtype in DTYPES:
            a, b = their_case[dtype], our_case[dtype]
            losses = [abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True)]
            cosines = [1.0]
            for name in a["gradients"].keys() & b["gradients"].keys():
                u, v = a["gradients"][name], b["gradients"][name]
                cosines.append(sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v)))
            ratio = b["grad_norm"] / a["grad_norm"]
            differences.append(Difference(their_case["name"], dtype, losses[0], max(losses), ratio, min(cosines)))
    return differences


def dump(results: Row) -> str:
    """JSON with one row, and one series of a case, a line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key not in ("rows", "cases")
    ]
    for key in ("rows", "cases"):
        values = ",\n".join(json.dumps(value, ensure_ascii=False) for value in results[key])
        lines.append(f"{json.dumps(key)}: [\n{values}\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--theirs-python", help="python of the environment of benchmarks/requirements.txt")
    parser.add_argument("--output", type=Path, help="write their result here; with --theirs-python")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    if args.output and not args.theirs_python:
        parser.error("--output needs --theirs-python: the golden file is what they gave")
    with tempfile.TemporaryDirectory() as folder:
        model = harness.tiny_bert(folder, **TINY_BERT)
        if args.theirs_python:
            options = Options()
            rows = make_rows(options.steps * options.batch_size, options.group_size)
            found = run_side("theirs", args.theirs_python, model, rows, options)
            theirs = {"source": SOURCE | {"versions": found["versions"]}, "options": asdict(options)}
            theirs |= {"modes": {name: asdict(mode) for name, mode in MODES.items()}, "tiny_bert": TINY_BERT}
            theirs |= {"rows": rows, "cases": found["cases"]}
        else:
            theirs = json.loads(GOLDEN.read_text(encoding="utf-8"))
        ours = run_side("ours", sys.executable, model, theirs["rows"], options_of(theirs["options"]))
    if args.output:
        args.output.write_text(dump(theirs), encoding="utf-8")
    print(f"{'case':32} {'dtype':8} {'first loss':>10} {'worst loss':>10} {'grad ratio':>10} {'cosine':>9}")
    for d in compare(theirs, ours):
        numbers = f"{d.first_loss:10.2e} {d.worst_loss:10.2e} {d.grad_norm_ratio:10.6f} {d.gradient_cosine:9.6f}"
        print(f"{d.case:32} {d.dtype:8} {numbers}")


if __name__ == "__main__":
    main()
