"""Long drills, run by `make drills`: whatever ends, damages or feeds a run badly, each many times.

Each ends in a line `name: tried N, survived N` on stderr. Short forms are in test_checkpoint.py and test_hang.py. A seed
of DRILL_SEED draws the moments.
"""

import functools
import itertools
import json
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
from test_checkpoint import (
    DAMAGES,
    SETTINGS,
    assert_nothing_half_written,
    assert_same_run,
    impatient,
    logged,
    no_file_beyond,
    slow_logging,
)
from test_hang import freeze_in_step_3, hang_in_step_3

from bge_core.training import checkpoint
from bge_core.training.stop import STOP_SIGNALS

pytestmark = pytest.mark.slow
# A checkpoint every second of 16 steps, some of which prune an older one, and the best published at the end.
FREQUENT: Row = SETTINGS | {
    "num_train_epochs": 4, "save_steps": 2, "eval_steps": 4, "save_total_limit": 3, "load_best_model_at_end": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 26)


def kill_and_resume(start: Callable[..., list[Any]], root: Path, num_tries: int) -> list[str]:
    """Runs that are killed once or twice at random moments, then resumed to their end, then compared.

    Args:
        start: (folder, log, flags) -> the processes of a run.

    Returns:
        What was wrong with those of `num_tries` that did not end as the unbroken run did.
    """
    rng = draw()
    unbroken, folder = root / "unbroken", root / "run"
    codes = runs.finish(start(unbroken, root / "unbroken.log"))
    duration = 5.0  # about that of a run; it follows what is seen, as machines are busy or not
    assert set(codes) == {0}, "\n".join(log.read_text(encoding="utf-8") for log in root.glob("unbroken.*"))
    problems: list[str] = []
    tried = 0
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
        if wrong:
            problems.append(f"try {tried}: " + "; ".join(wrong))
    return problems


def conclude(name: str, tried: int, problems: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The drill's line, and its verdict."""
    with capsys.disabled():
        print(f"\n{name}: tried {tried}, survived {tried - len(problems)}", file=sys.stderr)
    assert not problems, "\n".join(problems)


def draw() -> random.Random:
    return random.Random(int(os.environ.get("DRILL_SEED", "0")))


def test_kill_minus_9_at_twenty_random_moments(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(folder: Path, log: Path, **changes: Any) -> list[Any]:
        return [runs.start(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **FREQUENT | changes), log)]

    conclude("kill -9", 20, kill_and_resume(start, tmp_path, 20), capsys)


def test_kill_minus_9_of_two_processes(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(folder: Path, log: Path, **changes: Any) -> list[Any]:
        settings = FREQUENT | {"per_device_train_batch_size": 2, "negatives_cross_device": True} | changes
        return runs.start_two(runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings), log)

    conclude("kill -9 of two processes", 6, kill_and_resume(start, tmp_path, 6), capsys)


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
    rng, num_tries = draw(), int(os.environ.get("DRILL_TRIES", "20"))
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
    conclude("kill -9 of one rank under torchrun", tried, problems, capsys)


def test_signals_to_one_rank_or_all(
    tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ranks stop at the same step, save and end with 75 within 30 seconds; then the run goes on to its end."""
    rng, num_tries = draw(), 9
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
    conclude("SIGTERM or SIGUSR1 to one rank or all", num_tries, problems, capsys)


# train.py in which there is time for a signal, and which says when it evaluates.
SLOW_TRAIN = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}, {training!r}]
import test_checkpoint, train
evaluate_encoder = train.evaluate_encoder
def evaluate_slowly(*args, **kwargs):
    open({evaluating!r}, "w").close()
    time.sleep(1)
    return evaluate_encoder(*args, **kwargs)
train.evaluate_encoder = evaluate_slowly
test_checkpoint.slow_logging()
test_checkpoint.slow_saving()
sys.exit(train.main())
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]
# The words before the script, the number of processes, and how the launcher ends when the run ends with 75.
LAUNCHERS = {
    "python": ([sys.executable], 1, {75}),
    "torchrun": (TORCHRUN, 2, {1}),
    "accelerate": ([*ACCELERATE, "--config_file", str(runs.ROOT / "configs/accelerate/cpu_2proc.yaml")], 2, {1}),
    "accelerate, one process": (
        [*ACCELERATE, "--cpu", "--num_processes", "1"],
        1,
        {-number for number in STOP_SIGNALS} | {1},
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_signal_to_the_group(
    launcher: str, tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 0, 1 and 2 workers, while training, saving and evaluating: saved, and resumed to the bits of the unbroken run."""
    begin, num_processes, codes = LAUNCHERS[launcher]
    settings = SETTINGS | {
        "per_device_train_batch_size": 4 // num_processes,
        "negatives_cross_device": num_processes > 1,
    }
    evaluating, script, unbroken = tmp_path / "evaluating", tmp_path / "slow_train.py", tmp_path / "unbroken"
    places = {
        "root": runs.ROOT,
        "tests": runs.ROOT / "tests",
        "training": Path(__file__).parent,
        "evaluating": evaluating,
    }
    script.write_text(SLOW_TRAIN.format(**{name: str(path) for name, path in places.items()}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(folder: Path, **more: Any) -> list[Any]:
        words = runs.flags(tiny_bert_dropout, data, folder, val_data=data, **settings | more)
        return (
            runs.start_many(num_processes, words, tmp_path / "log")
            if num_processes > 1
            else [runs.start(words, tmp_path / "log")]
        )

    moments = {
        "training": lambda folder: logged(folder, 2),
        "saving": lambda folder: any(folder.glob(".checkpoint-3.tmp-*")),
        "evaluating": lambda folder: evaluating.exists(),
    }
    numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM))
    assert set(runs.finish(start(unbroken))) == {0}
    problems, cells = [], list(itertools.product(range(3), moments))
    for (num_workers, moment), number in zip(cells, numbers, strict=False):
        folder, log = tmp_path / "run", tmp_path / "said"
        evaluating.unlink(missing_ok=True)
        words = runs.flags(
            tiny_bert_dropout, data, folder, val_data=data, **settings | {"dataloader_num_workers": num_workers}
        )
        with open(log, "wb") as file:
            job = subprocess.Popen(
                [*begin, str(script), *words], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            while job.poll() is None and not moments[moment](folder):
                time.sleep(0.01)
            os.killpg(job.pid, number)
            code = job.wait(timeout=60)
            end = time.monotonic() + 30  # a launcher of one process does not wait for it
            while (folder / ".lock").exists() and time.monotonic() < end:
                time.sleep(0.05)
            said = log.read_text(encoding="utf-8")
            assert code in codes, f"{code}\n{said[-3000:]}"
            (*_, last) = checkpoint.checkpoints(folder)
            assert f"stopped by a signal after step {last.name.split('-')[1]};" in said, said[-3000:]
            assert_nothing_half_written(folder)
            assert set(runs.finish(start(folder, resume_from_checkpoint="latest"))) == {0}
            assert runs.equal_weights(folder, unbroken) and runs.read_steps(folder) == runs.read_steps(unbroken)
        except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
            problems.append(f"{number.name} while {moment}, {num_workers} workers: {error}")
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            shutil.rmtree(folder, ignore_errors=True)
    conclude(f"signals to the group, {launcher}", len(cells), problems, capsys)


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
    conclude("a rank that hangs is named", len(cases), problems, capsys)


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
    conclude("a damaged newest checkpoint", tried, problems, capsys)


# --- what the machine and the data may do -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tiny_bert_dropout: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert runs.run(tiny_bert_dropout, data, folder, val_data=data, **SETTINGS | {"save_steps": 1}) == 0
    return folder


@pytest.fixture
def begin(tiny_bert_dropout: Path, data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Start a run as `unbroken`, or go on with it: (patch, flags) -> its process; it writes into log."""

    def begin(patch: Callable[[], None] | None = None, **changes: Any) -> Any:
        settings = SETTINGS | {"save_steps": 1, "val_data": data} | changes
        return runs.start(
            runs.flags(tiny_bert_dropout, data, tmp_path / "run", **settings), tmp_path / "log", patch=patch
        )

    return begin


def fill_disk(name: str, num_bytes: int) -> None:
    """In a child: no file of the checkpoint of this name, nor of the final model, may become longer."""
    for function in ("write_checkpoint", "publish_model"):
        write = getattr(checkpoint, function)

        def write_on_full_disk(folder: Path, *args: Any, write: Any = write) -> None:
            with no_file_beyond(num_bytes if folder.name == name else 10**9):
                write(folder, *args)

        setattr(checkpoint, function, write_on_full_disk)


def test_a_full_disk(
    unbroken: Path, begin: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any byte of any checkpoint, or of the final model: the one before is whole, and the run goes on once there is room."""
    rng, folder, log, num_tries, problems = draw(), tmp_path / "run", tmp_path / "log", 12, []
    for number in range(num_tries):
        step = 1 + number % 9  # the ninth is the final model
        name, num_bytes = (f"checkpoint-{step}" if step < 9 else folder.name), rng.randrange(5_000, 250_000)
        codes = runs.finish([begin(functools.partial(fill_disk, name, num_bytes))])
        try:
            said = log.read_text(encoding="utf-8")
            assert codes == [2] and said.count("error: ") == 1 and "Traceback" not in said, said[-2000:]
            assert_nothing_half_written(folder)
            names = [path.name for path in checkpoint.checkpoints(folder)]
            assert names == [f"checkpoint-{before}" for before in range(1, step)], names
            assert runs.finish([begin(resume_from_checkpoint="latest")]) == [0]
            assert_same_run(folder, unbroken)
        except AssertionError as error:
            problems.append(f"try {number}, {name} cut at {num_bytes}: {error}")
        shutil.rmtree(folder)
        log.unlink()
    conclude("a full disk", num_tries, problems, capsys)


def test_two_runs_on_one_folder(
    unbroken: Path, begin: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is refused, the other is killed in every second try, which leaves the folder free for a third."""
    rng, folder, log, num_tries, problems = draw(), tmp_path / "run", tmp_path / "log", 10, []
    for number in range(num_tries):
        both = [begin(slow_logging, resume_from_checkpoint="latest")]
        time.sleep(rng.uniform(0, 1))
        both.append(begin(slow_logging, resume_from_checkpoint="latest"))
        while all(child.is_alive() for child in both):
            time.sleep(0.001)
        try:
            refused = both[0] if both[1].is_alive() else both[1]
            (holder,) = [child for child in both if child is not refused]
            assert refused.exitcode == 2 and holder.is_alive()
            assert f"{folder}: another run is writing there" in log.read_text(encoding="utf-8")
            if number % 2:
                time.sleep(rng.uniform(0, 3))
                holder.kill()
                runs.finish([holder])
                holder = begin(resume_from_checkpoint="latest")
            assert runs.finish([holder]) == [0], log.read_text(encoding="utf-8")[-2000:]
            assert_same_run(folder, unbroken)
        except AssertionError as error:
            problems.append(f"try {number}: {error}")
        finally:
            for child in both:
                child.kill()
                child.join()
        shutil.rmtree(folder)
        log.unlink()
    conclude("a second run on the folder is refused", num_tries, problems, capsys)


def test_data_workers_that_are_killed(
    unbroken: Path, begin: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a random moment: the step is saved, one message, exit code 2, and the run goes on to the same end."""
    rng, folder, log, num_tries, problems = draw(), tmp_path / "run", tmp_path / "log", 6, []
    for number in range(num_tries):
        child = begin(impatient)
        while child.is_alive() and not logged(folder, 2):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.8))
        os.kill(rng.choice(children_of(child.pid)), signal.SIGKILL)
        try:
            codes, said = runs.finish([child]), log.read_text(encoding="utf-8")
            assert codes == [2] and said.count("error: ") == 1 and "Traceback" not in said, said[-2000:]
            assert "DataLoader worker" in said
            (*_, last) = checkpoint.checkpoints(folder)
            assert f"saved after step {last.name.split('-')[1]};" in said
            assert_nothing_half_written(folder)
            assert runs.finish([begin(resume_from_checkpoint="latest")]) == [0]
            assert_same_run(folder, unbroken)
        except AssertionError as error:
            problems.append(f"try {number}: {error}")
        shutil.rmtree(folder)
        log.unlink()
    conclude("a killed data worker", num_tries, problems, capsys)


POISONS = {
    "10 MB": "信用卡怎么申请" * 500_000,
    "control characters": "\x00\x01\x07\x1b\x7f",
    "a lone surrogate": "信\ud83d用",
}


def test_poisoned_rows(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In any field of any row: trained on, its tokens cut, or named with file, line and field before anything is written."""
    rng, tried, problems = draw(), 0, []
    rows = runs.read_lines(data)
    for kind, text in POISONS.items():
        for field in ("query", "pos", "neg"):
            line = rng.randrange(len(rows))
            row = rows[line] | {field: text if field == "query" else [text, *rows[line][field][1:]]}
            if field == "neg":
                row["neg_scores"] = [0.0] * len(row["neg"])
            file, folder = tmp_path / f"{tried}.jsonl", tmp_path / str(tried)
            lines = [json.dumps(row if i == line else other) for i, other in enumerate(rows)]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            tried += 1
            code, err = runs.run(tiny_bert, file, folder, val_data=data, **SETTINGS), capsys.readouterr().err
            try:
                if kind == "a lone surrogate":
                    where = f"{file}:{line + 1}: field '{field}" + ("'" if field == "query" else "[0]'")
                    assert code == 2 and where in err and "remove it" in err and not folder.exists(), err
                else:
                    assert code == 0 and all(0 < loss < 20 for loss in runs.losses(folder)), (code, err[-2000:])
            except AssertionError as error:
                problems.append(f"{kind} in {field} of line {line + 1}: {error}")
    conclude("a poisoned row", tried, problems, capsys)


def test_folders_that_cannot_be_written_and_data_that_change(
    unbroken: Path, tiny_bert_dropout: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message, exit code 2, and what was there stays; data that change while the run reads them change nothing."""
    problems, words = [], {"val_data": data} | SETTINGS | {"save_steps": 1}
    read_only = Path("/proc/self/output")  # also root may not write there
    blocked = tmp_path / "file" / "run"
    blocked.parent.write_text("no folder")
    for folder in (read_only, blocked):
        code, err = runs.run(tiny_bert_dropout, data, folder, **words), capsys.readouterr().err
        if not (code == 2 and f"error: {folder}" in err and "Traceback" not in err):
            problems.append(f"{folder}: {code}, {err}")
    own, folder = Path(shutil.copy(data, tmp_path / "own.jsonl")), tmp_path / "run"
    for number, content in enumerate((b"", b"{", data.read_bytes()[:-100])):
        own.write_bytes(data.read_bytes())
        child = runs.start(runs.flags(tiny_bert_dropout, own, folder, **words), tmp_path / "log", patch=slow_logging)
        while child.is_alive() and not logged(folder, 2):
            time.sleep(0.001)
        own.write_bytes(content)
        try:
            assert runs.finish([child]) == [0] and runs.equal_weights(folder, unbroken)
            before = runs.tree(folder)
            assert runs.run(tiny_bert_dropout, own, folder, resume_from_checkpoint="latest", **words) == 2
            assert str(own) in capsys.readouterr().err and runs.tree(folder) == before
        except AssertionError as error:
            problems.append(f"data file {number}: {error}")
        shutil.rmtree(folder)
    conclude("a folder that cannot be written, a data file that changes", 5, problems, capsys)
