"""What all tests share: one thread, no hub, a cache of their own, and small models and data made once a session."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_CACHE = tempfile.TemporaryDirectory(prefix="bge_core_tests_")  # removed when the tests end
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": _CACHE.name,
    "WANDB_MODE": "disabled",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import parity_flagembedding  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import two_processes  # noqa: E402
from filelock import FileLock  # noqa: E402
from tiny_model import make_tiny_bert  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT, float32, dropout 0, hidden size 32. Read only."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny_bert")


@pytest.fixture(scope="session")
def tiny_bert_float64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same before rounding, saved as float64. Read only."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny_bert_float64", dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_bert_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_bert`, with both dropouts 0.1. Read only."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny_bert_dropout", dropout=0.1)


@pytest.fixture(scope="session")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data of 24 rows: 1 or 2 positives, 0 to 4 negatives, teacher scores on every row. Read only."""
    words = ["信用卡", "贷款", "密码", "快递", "退款", "酒店", "签证", "发票", "会员", "物流", "账户", "订单"]
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(24):
            word, verb = words[i % 12], "怎么申请" if i < 12 else "如何取消"
            pos = [f"{word}在第{i}号页面办理"] + [f"请到{word}第{i}号服务点"] * (i % 3 == 0)
            neg = [f"{words[(i + 3 * k + 1) % 12]}需要{i + k}天" + "，请等待" * k for k in range(i % 5)]
            row = {
                "query": f"{word}{verb}",
                "pos": pos,
                "neg": neg,
                "pos_scores": [2.0 + i / 10 + k for k in range(len(pos))],
                "neg_scores": [1.0 - i / 20 - k for k in range(len(neg))],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


@pytest.fixture(scope="session")
def two_ranks(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of tests/two_processes.py computed, of rank 0 and rank 1: run once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "two_processes"
    with FileLock(shared / "two_processes.lock"):
        if (folder / "results.pt").exists():
            return torch.load(folder / "results.pt")
        folder.mkdir(exist_ok=True)
        golden = json.loads((ROOT / "tests" / "golden" / "flagembedding_losses.json").read_text(encoding="utf-8"))
        parity_flagembedding.write_rows(folder / "train.jsonl", golden["rows"])
        job = {"model": str(tiny_bert), "train_data": str(folder / "train.jsonl"), "options": golden["options"]}
        results = two_processes.run(folder, job)
        torch.save(results, folder / "results.pt")
        return results
