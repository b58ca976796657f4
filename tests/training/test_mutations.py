"""Plausible wrong lines: does the parity matrix see each of them? A slow test (`make drills`).

Each mutation changes one place in a copy of bge_core, and the matrix with 2 and 1 processes in float64 runs on the copy,
in a mixed order, up to the first cell that fails.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matrix
import pytest


@dataclass(frozen=True)
class Mutation:
    """`old` must stand in bge_core/`file` exactly once; `new` takes its place."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation("factor W missing", "training/step.py", "output.loss * (share * world()[1])", "output.loss * share"),
    Mutation(
        "mean of means", "training/step.py",
        "share = batch.num_queries / num_total_rows", "share = 1 / (len(micro_batches) * world()[1])",
    ),
    Mutation(
        "gather without gradient", "training/step.py",
        "candidate_ND = gather_rows(passage_RD, passage_counts)",
        "candidate_ND = gather_rows(passage_RD.detach(), passage_counts)",
    ),
    Mutation(
        "own columns not shifted", "training/step.py",
        "own_BG + sum(passage_counts[:rank])", "own_BG",
    ),
    Mutation("own query's row not shifted", "training/step.py", "row_offset = sum(query_counts[:rank])", "row_offset = 0"),
    Mutation(
        "own rows instead of reduce_scatter", "runtime/distributed.py",
        "dist.reduce_scatter(summed, parts)", "summed = parts[ctx.rank]",
    ),
    Mutation(
        "random state not replayed", "training/step.py",
        "            _restore_random_state(state)\n", "",
    ),
    Mutation(
        "zero_grad inside accumulation", "training/step.py",
        "        is_last = k == len(micro_batches) - 1\n",
        "        is_last = k == len(micro_batches) - 1\n        model.zero_grad()\n",
    ),
    Mutation(
        "ranks never averaged with GradCache", "training/step.py",
        "sync_only_if(is_last and i == len(chunks) - 1, model)", "sync_only_if(False, model)",
    ),
    Mutation(
        "ranks averaged on the first chunk", "training/step.py",
        "sync_only_if(is_last and i == len(chunks) - 1, model)", "sync_only_if(is_last and i == 0, model)",
    ),
    Mutation(
        "known positives are negatives", "loss.py",
        "mask_BN &= known_positives(x).logical_not_()", "pass",
    ),
    Mutation(
        "temperature forgotten in blocks", "loss.py",
        "[block] @ v_ND.detach().T).requires_grad_()", "[block] @ v_ND.detach().T * cfg.temperature).requires_grad_()",
    ),
    Mutation(
        "last partial block dropped", "loss.py",
        "range(0, num_rows, block_size):", "range(0, num_rows - block_size + 1, block_size):",
    ),
    Mutation(
        "factor W and share lost in blocks", "loss.py", "gradient.mul_(scales[0])", "gradient",
    ),
]  # fmt: skip


def run_matrix(folder: Path, inputs: Path, mutation: Mutation | None = None) -> tuple[int, str]:
    """Exit code and output of the matrix on a copy of bge_core with the mutation.

    Raises:
        AssertionError: the line to change is not there, or not once: the code has moved and the table must follow.
    """
    shutil.copytree(matrix.ROOT / "bge_core", folder / "bge_core", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation:
        file = folder / "bge_core" / mutation.file
        text = file.read_text(encoding="utf-8")
        count = text.count(mutation.old)
        assert count == 1, (
            f"{mutation.name}: {mutation.old!r} stands in bge_core/{mutation.file} {count} times, not once"
        )
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, matrix.__file__, "--worlds", "2", "1", "--dtypes", "float64", "--stop_at_first"]
    command += ["--inputs", str(inputs)]
    path = os.pathsep.join(map(str, (folder, matrix.ROOT)))
    child = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    assert f"bge_core: {folder / 'bge_core'}" in child.stdout, child.stdout + child.stderr[-4000:]
    return child.returncode, child.stdout


@pytest.mark.slow
def test_the_matrix_sees_every_wrong_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "inputs"  # models and truth, of the unchanged code
    code, output = run_matrix(tmp_path / "unchanged", inputs)
    assert code == 0, output
    lines, caught = [], 0
    for i, mutation in enumerate(MUTATIONS):
        code, output = run_matrix(tmp_path / str(i), inputs, mutation)
        problems = [line for line in output.splitlines() if "processes, " in line]
        seen = code == 1 and bool(problems)  # a cell failed, and not the start
        caught += seen
        lines.append(f"{mutation.name:40} {'caught by ' + problems[0] if seen else 'NOT CAUGHT'}")
    with capsys.disabled():
        print("\n", *lines, f"mutations: tried {len(MUTATIONS)}, caught {caught}", sep="\n", file=sys.stderr)
    assert caught == len(MUTATIONS), "\n".join(lines)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_line_to_change_is_there(mutation: Mutation) -> None:
    assert (matrix.ROOT / "bge_core" / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1


def test_a_line_that_moved_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="gone.*stands in bge_core/training/step.py 0 times"):
        run_matrix(tmp_path / "a", tmp_path, Mutation("gone", "training/step.py", "no such line", ""))
    with pytest.raises(AssertionError, match="often.*stands in bge_core/training/step.py"):
        run_matrix(tmp_path / "b", tmp_path, Mutation("often", "training/step.py", "batch", ""))
