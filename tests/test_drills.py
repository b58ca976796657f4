"""Long drills, run by `make drills`: kills at random moments, of one process and of two."""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Row
from test_checkpoint import SETTINGS, assert_nothing_half_written, assert_same_run

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
