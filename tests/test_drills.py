"""Long drills, run by `make drills`: kills, signals, hangs and damage, each many times.

Each ends in a line `name: tried N, survived N` on stderr. Short forms are in test_checkpoint.py and test_hang.py.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Row
from test_checkpoint import DAMAGES, SETTINGS, assert_nothing_half_written, assert_same_run, slow_logging
from test_hang import freeze_in_step_3, hang_in_step_3

from bge_core import checkpoint

pytestmark = pytest.mark.slow
# A checkpoint every second of 16 steps, some of which prune an older one, and the best published at the end.
FREQUENT: Row = SETTINGS | {
    "num_train_epochs": 4, "save_steps": 2, "eval_steps": 4, "save_total_limit": 3, "load_best_model_at_end": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


def drill(start: Callable[..., list[Any]], root: Path, num_tries: int, seed: int) -> tuple[int, list[str]]:
    """Runs that are killed once or twice at random moments, then resumed to their end, then compared.

    Args:
        start: (folder, log, flags) -> the processes of a run.

    Returns:
        How many of `num_tries` ended as the unbroken run did, and what was wrong with the others.
    """
    rng = random.Random(seed)
    unbroken, folder = root / "unbroken", root / "run"
    codes = runs.finish(start(unbroken, root / "unbroken.log"))
    duration = 5.0  # about that of a run; it follows what is seen, as machines are busy or not
    assert set(codes) == {0}, "\n".join(log.read_text(encoding="utf-8") for log in root.glob("unbroken.*"))
    survived, problems, tried = 0, [], 0
    while tried < num_tries:
        shutil.rmtree(folder, ignore_errors=True)
        wrong, num_kills = [], 0
        for kill in range(rng.choice((1, 1, 2))):
            latest = {"resume_from_checkpoint": "latest"} if kill else {}
            children = start(folder, root / f"kill{tried}", **latest)
            begin, moment = time.monotonic(), rng.uniform(0, duration)
            while time.monotonic() < begin + moment and all(child.is_alive() for child in children):
                time.sleep(0.001)
            hit = all(child.is_alive() for child in children)
            num_kills += hit
            duration = duration * 1.1 if hit else time.monotonic() - begin
            for child in rng.sample(children, len(children)):
                child.kill()
            runs.finish(children)
            try:
                assert_nothing_half_written(folder)
            except Exception as error:  # whatever a half-written file makes of whoever reads it
                wrong.append(repr(error))
        if num_kills == 0:  # it had ended before: this is no try
            continue
        tried += 1
        codes = runs.finish(start(folder, root / f"resume{tried}", resume_from_checkpoint="latest"))
        try:
            assert set(codes) == {0}, codes
            assert_same_run(folder, unbroken)
        except AssertionError as error:
            wrong.append(str(error))
        survived += not wrong
        problems += [f"try {tried}: {problem}" for problem in wrong]
    return survived, problems


def report(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{line}", file=sys.stderr)


def test_kill_minus_9_at_twenty_random_moments(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(folder: Path, log: Path, **changes: Any) -> list[Any]:
        return [runs.start(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **FREQUENT | changes), log)]

    survived, problems = drill(start, tmp_path, 20, seed=int(os.environ.get("DRILL_SEED", "0")))
    report(f"kill -9: tried 20, survived {survived}", capsys)
    assert survived == 20, "\n".join(problems)


def test_kill_minus_9_of_two_processes(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(folder: Path, log: Path, **changes: Any) -> list[Any]:
        settings = FREQUENT | {"per_device_train_batch_size": 2, "negatives_cross_device": True} | changes
        return runs.start_two(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings), log)

    survived, problems = drill(start, tmp_path, 6, seed=int(os.environ.get("DRILL_SEED", "0")))
    report(f"kill -9 of two processes: tried 6, survived {survived}", capsys)
    assert survived == 6, "\n".join(problems)


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started; none once it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_kill_minus_9_of_one_rank_under_torchrun(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher restarts both ranks, they resume, and end in bitwise the weights of the unbroken run."""
    rng, num_tries = random.Random(int(os.environ.get("DRILL_SEED", "0"))), int(os.environ.get("DRILL_TRIES", "20"))
    settings = FREQUENT | {"per_device_train_batch_size": 2, "negatives_cross_device": True}

    def words(folder: Path) -> list[str]:
        return runs.flags(tiny_bert_dropout, data, folder, val_data=data, resume_from_checkpoint="latest", **settings)

    unbroken = tmp_path / "unbroken"
    assert set(runs.finish(runs.start_two(words(unbroken), tmp_path / "log"))) == {0}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tried, problems = 0, []
    while tried < num_tries:
        folder, log = tmp_path / f"run{tried}", tmp_path / f"said{tried}"
        with open(log, "wb") as file:
            command = [*launcher, "--max-restarts", "3", str(runs.ROOT / "train.py"), *words(folder)]
            job = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while job.poll() is None and not (folder / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 4))
            ranks = children_of(job.pid)
            if job.poll() is None and len(ranks) == 2:
                os.kill(rng.choice(ranks), signal.SIGKILL)
                tried += 1
                code = job.wait(timeout=180)
                try:
                    assert code == 0, log.read_text(encoding="utf-8")[-3000:]
                    assert_same_run(folder, unbroken)
                except AssertionError as error:
                    problems.append(f"try {tried}: {error}")
        finally:
            job.kill()
            job.wait()
        shutil.rmtree(folder, ignore_errors=True)
    report(f"kill -9 of one rank under torchrun: tried {tried}, survived {tried - len(problems)}", capsys)
    assert not problems, "\n".join(problems)


def test_signals_to_one_rank_or_all(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ranks stop at the same step, save and end with 75 within 30 seconds; then the run goes on to its end."""
    rng, num_tries = random.Random(int(os.environ.get("DRILL_SEED", "0"))), 9
    settings = FREQUENT | {"per_device_train_batch_size": 2, "negatives_cross_device": True}
    words = lambda folder, **more: runs.flags(  # noqa: E731
        tiny_bert_dropout, data, folder, val_data=data, **settings, **more
    )
    unbroken = tmp_path / "unbroken"
    assert set(runs.finish(runs.start_two(words(unbroken), tmp_path / "log"))) == {0}
    problems = []
    for number in range(num_tries):
        folder, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        children = runs.start_two(words(folder), log, slow_logging)
        while children[0].is_alive() and not (folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 3))
        for child in (children[:1], children[1:], children)[number % 3]:
            os.kill(child.pid, (signal.SIGTERM, signal.SIGUSR1)[number // 3 % 2])
        try:
            assert runs.finish(children, 30) == [75, 75]
            said = [log.with_suffix(f".{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
            assert "Traceback" not in said[0] + said[1]
            (*_, last) = checkpoint.checkpoints(folder)
            assert f"stopped by a signal after step {last.name.split('-')[1]}" in said[0]
            assert runs.finish(runs.start_two(words(folder, resume_from_checkpoint="latest"), log)) == [0, 0]
            assert runs.equal_weights(folder, unbroken)
        except AssertionError as error:
            problems.append(f"try {number}: {error}")
    report(f"SIGTERM or SIGUSR1 to one rank or all: tried {num_tries}, survived {num_tries - len(problems)}", capsys)
    assert not problems, "\n".join(problems)


def test_ranks_that_hang(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other rank ends within the timeout and names it; the folder is whole and the run goes on to its end."""
    problems, cases = [], [hang_in_step_3, freeze_in_step_3] * 3
    settings = FREQUENT | {"save_steps": 1, "per_device_train_batch_size": 2, "negatives_cross_device": True}
    for number, patch in enumerate(cases):
        folder, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        words = runs.flags(tiny_bert_dropout, data, folder, val_data=data, ddp_timeout=3, **settings)
        children = runs.start_two(words, log, patch)
        try:
            assert runs.finish(children[:1], 60) == [1]
            assert "waiting for rank 1\n" in log.with_suffix(".0").read_text(encoding="utf-8")
            assert_nothing_half_written(folder)
        except AssertionError as error:
            problems.append(f"try {number}: {error}")
        finally:
            children[1].kill()
            children[1].join()
    report(f"a rank that hangs is named: tried {len(cases)}, survived {len(cases) - len(problems)}", capsys)
    assert not problems, "\n".join(problems)


def test_damage_to_any_file_of_the_newest_checkpoint(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A flipped bit, half a file, no file: found, said, and the run ends as the unbroken one did."""
    unbroken, tried, problems = tmp_path / "unbroken", 0, []
    words = {"val_data": data} | SETTINGS
    assert runs.run(tiny_bert_dropout, data, unbroken, **words) == 0
    (*_, newest) = checkpoint.checkpoints(unbroken)
    for file in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
        for kind, damage in DAMAGES.items():
            folder = runs.copy_run(unbroken, tmp_path / "run")
            damage(folder / newest.name / file)
            tried += 1
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                code = runs.run(tiny_bert_dropout, data, folder, resume_from_checkpoint="latest", **words)
            try:
                assert code == 0 and str(folder / newest.name / file) in caplog.text
                assert_same_run(folder, unbroken)
            except AssertionError as error:
                problems.append(f"{kind} of {file}: {error}")
            shutil.rmtree(folder)
    report(f"a damaged newest checkpoint: tried {tried}, survived {tried - len(problems)}", capsys)
    assert not problems, "\n".join(problems)
