"""Plausible wrong lines: is each of them seen, by the parity matrix or by a test that is named? A slow test (`make drills`).

Each mutation changes one expression or statement, wherever in bge_core or train.py it stands, in a copy of both. There
the matrix runs with 2 and 1 processes in float64, in a mixed order, up to the first cell that fails.
"""

import ast
import functools
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
    """`old`, an expression or a statement, must stand in the code exactly once; `new` takes its place.

    `test` sees it (as pytest -k, in tests/training/test_train.py), or the matrix does.
    """

    name: str
    old: str
    new: str
    test: str = ""


parse = functools.cache(ast.parse)  # the code is searched for every mutation

MUTATIONS = [
    Mutation("factor W missing", "output.loss * (share * world()[1])", "output.loss * share"),
    Mutation("mean of means", "share = batch.num_queries / num_total_rows", "share = 1 / (len(micro_batches) * world()[1])"),
    Mutation("gather without gradient", "gather_rows(passage_RD, passage_counts)", "gather_rows(passage_RD.detach(), passage_counts)"),
    Mutation("own columns not shifted", "own_BG + sum(passage_counts[:rank])", "own_BG"),
    Mutation("own query's row not shifted", "row_offset = sum(query_counts[:rank])", "row_offset = 0"),
    Mutation("own rows instead of reduce_scatter", "dist.reduce_scatter(summed, parts)", "summed = parts[ctx.rank]"),
    Mutation("random state not replayed", "restore_random_state(state)", "pass"),
    Mutation("zero_grad inside accumulation", "share = batch.num_queries / num_total_rows", "share = batch.num_queries / num_total_rows; model.zero_grad()"),
    Mutation("ranks never averaged with GradCache", "is_last and i == len(chunks) - 1", "False"),
    Mutation("ranks averaged on the first chunk", "is_last and i == len(chunks) - 1", "is_last and i == 0"),
    Mutation("known positives are negatives", "mask_BN &= known_positives(x).logical_not_()", "pass"),
    Mutation("temperature forgotten in blocks", "u_BD.detach()[block] @ v_ND.detach().T", "u_BD.detach()[block] @ v_ND.detach().T * cfg.temperature"),
    Mutation("last partial block dropped", "range(0, num_rows, block_size)", "range(0, num_rows - block_size + 1, block_size)"),
    Mutation("factor W and share lost in blocks", "gradient.mul_(scales[0])", "gradient"),
    Mutation(
        "earlier run removed before all is asked", "datasets.disable_progress_bars()",
        "datasets.disable_progress_bars(); run_folder.begin(run_folder.Start(Path(config.output_dir), None, 0, config.overwrite_output_dir))",
        test="refused_start",
    ),
    Mutation(
        "clock reset by an evaluation", "self._began += time.perf_counter() - paused", "self._began = time.perf_counter()",
        test="rates_count_the_time",
    ),
    Mutation(
        "no evaluations taken for those of saves", "steps_between(config.eval_steps, num_steps)",
        "steps_between(config.eval_steps or config.save_steps, num_steps)", test="evaluation_at_the_end_alone",
    ),
]  # fmt: skip


def replaced(text: str, old: str, new: str) -> list[str]:
    """`text` with `new` in the place of the code `old`, however that is laid out: one for each place where it stands."""
    (wanted,) = ast.parse(old).body
    node = wanted.value if isinstance(wanted, ast.Expr) else wanted
    content = text.encode()  # positions are in bytes
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for other in ast.walk(parse(text)):
        if type(other) is type(node) and ast.dump(other) == ast.dump(node):
            assert isinstance(other, ast.expr | ast.stmt) and other.end_lineno and other.end_col_offset
            begin = starts[other.lineno - 1] + other.col_offset
            end = starts[other.end_lineno - 1] + other.end_col_offset
            found.append((content[:begin] + new.encode() + content[end:]).decode())
    return found


def mutate(mutation: Mutation, root: Path) -> tuple[Path, str]:
    """The file of `root` that changes, and what it then holds.

    Raises:
        AssertionError: what to change is not there, or not once: the code has moved on and the table must follow.
    """
    files = [root / "train.py", *sorted((root / "bge_core").rglob("*.py"))]
    found = [(file, text) for file in files for text in replaced(file.read_text("utf-8"), mutation.old, mutation.new)]
    assert len(found) == 1, f"{mutation.name}: {mutation.old!r} stands in the code {len(found)} times, not once"
    return found[0]


def run_on_copy(folder: Path, inputs: Path, mutation: Mutation | None = None) -> str:
    """What the matrix or the mutation's test says of a copy of the code with the mutation; "" if it finds no fault."""
    for name in ("bge_core", "tests", "examples", "benchmarks"):
        shutil.copytree(matrix.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(matrix.ROOT / name, folder)
    if mutation:
        file, text = mutate(mutation, folder)
        file.write_text(text, encoding="utf-8")
    command = [sys.executable, "tests/matrix.py", "--worlds", "2", "1", "--dtypes", "float64", "--stop_at_first"]
    command += ["--inputs", str(inputs)]
    if mutation and mutation.test:
        command = [sys.executable, "-m", "pytest", "-q", "tests/training/test_train.py", "-k", mutation.test]
    child = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=900
    )
    seen = [line for line in child.stdout.splitlines() if line.startswith("FAILED ") or "processes, " in line]
    own = f"bge_core: {folder / 'bge_core'}" in child.stdout or (mutation and mutation.test)
    assert own and child.returncode == bool(seen), child.stdout[-4000:] + child.stderr[-4000:]
    return seen[0] if seen else ""


@pytest.mark.slow
def test_every_wrong_line_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "inputs"  # models and truth, of the unchanged code
    assert run_on_copy(tmp_path / "unchanged", inputs) == ""
    lines, caught = [], 0
    for i, mutation in enumerate(MUTATIONS):
        problem = run_on_copy(tmp_path / str(i), inputs, mutation)
        caught += bool(problem)
        lines.append(f"{mutation.name:40} {'caught by ' + problem if problem else 'NOT CAUGHT'}")
    with capsys.disabled():
        print("\n", *lines, f"mutations: tried {len(MUTATIONS)}, caught {caught}", sep="\n", file=sys.stderr)
    assert caught == len(MUTATIONS), "\n".join(lines)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_line_to_change_is_there(mutation: Mutation) -> None:
    file, text = mutate(mutation, matrix.ROOT)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(file.read_text(encoding="utf-8")))


def test_a_line_that_is_gone_is_an_error() -> None:
    for old, times in (("no_such(line)", 0), ("world()", r"[1-9]\d*")):
        with pytest.raises(AssertionError, match=f"moved: .* stands in the code {times} times, not once"):
            mutate(Mutation("moved", old, "None"), matrix.ROOT)


def test_layout_and_place_do_not_matter() -> None:
    text = "def 名():\n    return '名', f(\n        a  +  1,  # why\n        b,\n    )\n"
    assert replaced(text, "f(a + 1, b)", "名") == ["def 名():\n    return '名', 名\n"]
    text = "if y:\n    x = f(\n        a\n    )\nz = x\n"
    assert replaced(text, "x = f(a)", "pass") == ["if y:\n    pass\nz = x\n"]
    assert replaced("f(a)\nf(a, b)\ng(f(a))\n", "f(a)", "1") == ["1\nf(a, b)\ng(f(a))\n", "f(a)\nf(a, b)\ng(1)\n"]
