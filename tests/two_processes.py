"""What two real processes (gloo) compute, for tests/runtime/test_distributed.py and tests/training/test_parity_flagembedding.py.

Starting them costs more than all they do, so they start once and run everything; `run` is called by the session's
fixture `two_ranks`. A case that fails is recorded with its traceback and the processes go on with the next.
"""

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import parity_flagembedding as parity
import scaling
import torch
import torch.distributed as dist
from batches import MODES, Gradients, TextRow, gradients_of, load, make_rows, rank_batch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bge_core import UserError
from bge_core.encoder import encode as encoding
from bge_core.encoder.encode import encode
from bge_core.encoder.fixed import FixedRows
from bge_core.loss import LossConfig, LossInput, LossOutput
from bge_core.runtime.distributed import (
    gather_counts,
    gather_objects,
    gather_rows,
    on_main,
    shared_array,
    sum_over_ranks,
    unwrap,
    world,
    wrap,
)
from bge_core.runtime.launch import start
from bge_core.search.exact import search_in_shares
from bge_core.training.batch import Batch
from bge_core.training.graphs import GraphedEncoder
from bge_core.training.step import StepSettings, forward_backward

TEXTS = [
    "信用卡怎么申请",
    "",
    "loan",
    "快递",
    "快递",
    "退款" * 300,
    *(f"第{i}号" + "账户密码" * (i % 7) for i in range(30)),
]
PROMPT = "问题："
ENCODE_CASES = {"many": (TEXTS, 4), "one_batch": (TEXTS[:3], 64), "one_text": (TEXTS[:1], 4), "none": ([], 4)}
Results = dict[str, Any]


@dataclass(frozen=True)
class StepCase:
    """One optimizer step of two ranks.

    Args:
        groups: for each micro-batch the group sizes of rank 0's rows and of rank 1's.
        mode: of MODES.
        cross_device, chunk_size: as in StepSettings.
    """

    groups: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    mode: str = "info_nce"
    cross_device: bool = True
    chunk_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def micro_batches(self) -> list[tuple[tuple[TextRow, ...], tuple[TextRow, ...]]]:
        """The rows of both ranks; texts are shared across them."""
        batches = []
        for seed, (first, second) in enumerate(self.groups):
            rows = make_rows(seed, (*first, *second))
            batches.append((rows[: len(first)], rows[len(first) :]))
        return batches

    def pools(self) -> list[tuple[TextRow, ...]]:
        """Rows whose passages are each other's candidates."""
        if self.cross_device:
            return [(*first, *second) for first, second in self.micro_batches()]
        return [rows for both in self.micro_batches() for rows in both]


EVEN, UNEVEN, ONE_WITHOUT = ((3, 3), (3, 3)), ((4, 1), (2, 3)), ((3, 2), (1, 1))
# What tests/matrix.py leaves: settings that it has not, metrics, ranks of one row or none, passages that stay on a rank.
STEP_CASES = {
    "keep_positives": StepCase([UNEVEN], "keep_positives"),
    "keep_positives_cached": StepCase([UNEVEN], "keep_positives", chunk_size=3),
    "no_negatives_anywhere": StepCase([((1, 1), (1, 1))], chunk_size=1),
    "accumulation_short_last": StepCase([UNEVEN, ((2,), ())]),
    "accumulation_short_last_cached": StepCase([UNEVEN, ((), (3,))], chunk_size=2),
    "one_row": StepCase([((3,), ())]),
    "one_row_kl_cached": StepCase([((), (3,))], "kl_div", chunk_size=1),
    "local": StepCase([UNEVEN], cross_device=False),
    "local_cached": StepCase([ONE_WITHOUT, EVEN], cross_device=False, chunk_size=2),
    "local_one_row": StepCase([((3,), ())], cross_device=False),
    "local_one_row_m3_cached": StepCase([((), (3,))], "m3_kd_loss", cross_device=False, chunk_size=2),
}
ALL_REDUCE_CASES = {
    "accumulation": StepCase([EVEN, UNEVEN]),
    "accumulation_cached": StepCase([UNEVEN, EVEN], chunk_size=2),
}
FIXED_CASES = {name: case for name, case in STEP_CASES.items() if "local" not in name}


def between_queries(x: LossInput, cfg: LossConfig) -> LossOutput:
    """A loss of a user's own, over the queries of all ranks: the mean over rows of log sum_(j != i) exp(<q_i, q_j>)."""
    own_B = x.row_offset + torch.arange(len(x.query_BD))
    score_BM = (x.query_BD @ x.all_query_MD.T).scatter(1, own_B[:, None], -torch.inf)
    return LossOutput(score_BM.logsumexp(dim=1).mean(), {})


QUERY_CASES = {
    "queries": StepCase([UNEVEN], settings={"loss": between_queries}),
    "queries_cached": StepCase([((3, 2), (2,))], chunk_size=2, settings={"loss": between_queries}),
}


# --- in the processes -------------------------------------------------------------------------------------------------


def rank_batches(case: StepCase, rank: int, fixed: bool = False) -> list[Batch]:
    """The micro-batches of one rank; their chunks as rows of fixed shape."""
    teacher, rows = "distillation" in MODES[case.mode], FixedRows("", 0, 0, distinct=True)
    batches = [rank_batch(both[rank], both, teacher=teacher) for both in case.micro_batches()]
    chunks = [[rows.row(part) for part in batch.tokens.split(case.chunk_size)] if fixed else None for batch in batches]
    return [replace(batch, chunks=of_batch) for batch, of_batch in zip(batches, chunks, strict=True)]


def forward_backward_of(model: torch.nn.Module, batches: list[Batch], case: StepCase) -> dict[str, torch.Tensor]:
    """forward_backward with the settings of the case."""
    settings = StepSettings(
        loss_config=LossConfig(**MODES[case.mode]),
        cross_device=case.cross_device,
        chunk_size=case.chunk_size,
        **case.settings,
    )
    return forward_backward(model, batches, settings)


def step_case(
    model: torch.nn.Module, case: StepCase, rank: int, fixed: bool = False
) -> tuple[dict[str, float], str, Gradients]:
    """The shares summed over ranks, a digest of this rank's gradients, and on rank 0 the gradients themselves."""
    if not case.cross_device:
        rehearse(unwrap(model), case, rank)
    try:
        shares = forward_backward_of(model, rank_batches(case, rank, fixed), case)
        gradients = gradients_of(model.module)
        digest = hashlib.sha256(b"".join(g.numpy().tobytes() for g in gradients.values())).hexdigest()
        sums = {name: sum_over_ranks(value).item() for name, value in shares.items()}
        return sums, digest, gradients if rank == 0 else {}
    finally:
        model.zero_grad(set_to_none=True)


def rehearse(encoder: torch.nn.Module, case: StepCase, rank: int) -> None:
    """Run a case that needs no other rank without averaging first: where one rank fails, both fail, and none waits."""
    problem = None
    try:
        for batch in rank_batches(case, rank):
            forward_backward_of(encoder, [batch], case)
    except Exception:
        problem = traceback.format_exc()
    encoder.zero_grad(set_to_none=True)
    problems = gather_objects(problem)
    if any(problems):
        raise RuntimeError("\n".join(map(str, problems)))


def gather_case(counts: list[int], rank: int, dtype: torch.dtype = torch.float64) -> Results:
    """Gather rows that say whose they are; the gradient of sum over ranks r of (r + 1) * weights * gathered."""
    local = (torch.arange(counts[rank] * 2).reshape(-1, 2) + 100 * rank).to(dtype)
    local.requires_grad_(dtype.is_floating_point)
    gathered = gather_rows(local, counts)
    if dtype.is_floating_point:
        (gathered * (rank + 1) * torch.arange(1, 1 + len(gathered), dtype=dtype)[:, None]).sum().backward()
    return {
        "value": gathered.detach(),
        "gradient": local.grad,
        "counts": gather_counts(counts[rank], 7 + rank, device=torch.device("cpu")),
    }


def collective_cases(rank: int) -> Results:
    """on_main and the small collectives."""
    calls: list[int] = []

    def fails(error: Exception) -> str:
        caught = error_of(lambda: on_main(lambda: (_ for _ in ()).throw(error)))
        return f"{type(caught).__name__}: {caught}"

    def slow() -> str:
        time.sleep(2)
        return "done"

    timeout = partial(dist.distributed_c10d._set_pg_timeout, group=dist.group.WORLD)
    timeout(timedelta(seconds=1))
    slow_value = on_main(slow)
    timeout(timedelta(minutes=30))

    return {
        "world": world(),
        "value": on_main(lambda: calls.append(rank) or {"from": rank}),
        "calls": calls,
        "user_error": fails(UserError("the folder is not empty")),
        "os_error": fails(OSError(28, "No space left on device")),
        "fault": fails(ZeroDivisionError("by zero")),
        "slow": slow_value,
        "after": on_main(lambda: "still in step"),
        "objects": gather_objects({"rank": rank}),
        "sum": sum_over_ranks(torch.tensor([rank + 1.0])).item(),
    }


def shared_cases(encoder: torch.nn.Module, rank: int, folder: Path) -> Results:
    """Arrays that both processes see, and what is found in them; `folder` is there for them alone."""
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder)
    array = shared_array((3, 2))
    array[rank] = rank + 1
    gather_objects(None)  # the other has written, too
    left = gather_objects(os.listdir(folder))
    fallocate = os.posix_fallocate

    def no_room(*_: int) -> None:
        raise OSError(28, "No space left on device")

    os.posix_fallocate = no_room
    try:
        refused = str(error_of(lambda: shared_array((3, 2))))
    finally:
        os.posix_fallocate = fallocate
    block, encoding.BLOCK = encoding.BLOCK, 8
    try:
        vectors = encode(encoder, TEXTS, prompt=PROMPT, batch_size=4)
    finally:
        encoding.BLOCK = block
    return {
        "array": array.copy(),
        "left": left,
        "refused": refused,
        "encoded": (type(vectors).__name__, np.array(vectors)),
    }


def search_cases() -> Results:
    """Searches in shares: more queries than ranks, fewer, none; ties; a bad row of each kind."""
    query_QD, corpus_ND = search_vectors()
    found: Results = {str(n): search_in_shares(query_QD[:n], corpus_ND, 7, memory_mb=0.01) for n in (31, 1, 0)}
    for name, vectors in (("queries", query_QD), ("corpus", corpus_ND)):
        broken = vectors.copy()
        broken[30] = np.nan
        pair = (broken, corpus_ND) if name == "queries" else (query_QD, broken)
        found[f"bad {name}"] = str(error_of(lambda p=pair: search_in_shares(*p, 7)))
    found["bad corpus, one query"] = str(error_of(lambda: search_in_shares(query_QD[:1], broken, 7)))
    return found


def search_vectors() -> tuple[np.ndarray, np.ndarray]:
    """(31, 8) queries and a corpus (60, 8) in which every vector stands twice."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((30, 8)).astype(np.float32)
    return rng.standard_normal((31, 8)).astype(np.float32), np.concatenate([half, half])


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What the call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


def count_all_reduces(folder: str, case: StepCase, rank: int) -> int:
    """How often DDP averages its (one) bucket of gradients in a step."""
    model = wrap(load(folder, torch.float64))
    calls = []
    model.register_comm_hook(
        None, lambda state, bucket: (calls.append(bucket.index()), allreduce_hook(state, bucket))[1]
    )
    step_case(model, case, rank)
    assert set(calls) == {0}, "the model is meant to fit in one bucket"
    return len(calls)


def work(job: Results, rank: int) -> Results:
    """Everything one rank computes: case -> result, or a string, its traceback."""
    start()
    results: Results = {}

    def record(name: str, compute: Callable[[], Any]) -> None:
        try:
            results[name] = compute()
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)  # for the log, should the other rank now wait in vain

    for name, counts in {"equal": [2, 2], "uneven": [3, 1], "first_empty": [0, 2], "last_empty": [2, 0]}.items():
        record(f"gather/{name}", lambda c=counts: gather_case(c, rank))
        record(f"gather_integers/{name}", lambda c=counts: gather_case(c, rank, torch.int64))
    record("gather/all_empty", lambda: gather_case([0, 0], rank))
    record("collectives", lambda: collective_cases(rank))
    record("work", lambda: scaling.count(6))
    model = wrap(load(job["model"], torch.float64))
    for name, case in {**STEP_CASES, **QUERY_CASES}.items():
        record(f"step/{name}", lambda c=case: step_case(model, c, rank))
    graphed = GraphedEncoder(load(job["model"], torch.float64), None)
    for name, case in FIXED_CASES.items():
        record(f"fixed/{name}", lambda c=case: step_case(model, c, rank, fixed=True))
        record(f"graphed/{name}", lambda c=case: step_case(graphed, c, rank, fixed=True))
    for name, case in ALL_REDUCE_CASES.items():
        record(f"all_reduces/{name}", lambda c=case: count_all_reduces(job["model"], c, rank))
    encoder = load(job["model"], torch.float32)
    for name, (texts, batch_size) in ENCODE_CASES.items():
        record(f"encode/{name}", lambda t=texts, b=batch_size: encode(encoder, t, prompt=PROMPT, batch_size=b))
    record("shared", lambda: shared_cases(encoder, rank, Path(job["train_data"]).with_name("shared")))
    record("search", search_cases)
    options = parity.Options(**{**job["options"], "mrl_dims": tuple(job["options"]["mrl_dims"])})
    for name, mode in parity.MODES.items():
        arguments = (job["model"], job["train_data"], mode, options, "float32")
        record(f"parity/{name}", lambda a=arguments: parity.train_ours(*a))
    return as_tensors(results)


def as_tensors(tree: Any) -> Any:
    """Arrays as tensors, which torch.load takes."""
    if isinstance(tree, dict):
        return {key: as_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(as_tensors, tree))
    return torch.from_numpy(np.array(tree)) if isinstance(tree, np.ndarray) else tree


def main() -> None:
    """One rank: two_processes.py JOB."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = work(torch.load(sys.argv[1]), rank)
    torch.save(results, f"{sys.argv[1]}.rank{rank}")
    dist.destroy_process_group()


# --- from the session -------------------------------------------------------------------------------------------------


def run(folder: Path, job: Results) -> list[Results]:
    """Start both processes, wait, and return the results of rank 0 and rank 1."""
    job_file = folder / "job.pt"
    torch.save(job, job_file)
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(str(root / name) for name in ("", "tests", "benchmarks"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "PYTHONPATH": path, **shared}
    processes, logs = [], []
    for rank in range(2):
        logs.append(open(folder / f"log{rank}.txt", "w+", encoding="utf-8"))  # noqa: SIM115
        command = [sys.executable, str(Path(__file__).resolve()), str(job_file)]
        variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=variables, stdout=logs[-1], stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.seek(0)
    output = "\n".join(log.read()[-4000:] for log in logs)
    for log in logs:
        log.close()
    assert codes == [0, 0], output  # the first that fails ends both
    results = [torch.load(f"{job_file}.rank{rank}") for rank in range(2)]
    for rank in range(2):
        Path(f"{job_file}.rank{rank}").unlink()
    return results


if __name__ == "__main__":
    main()
