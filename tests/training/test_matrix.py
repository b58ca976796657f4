"""The parity matrix (tests/matrix.py): 1, 2 and 4 processes, every combination, against the slow float64 truth."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import matrix
import pytest
import torch
from filelock import FileLock
from matrix import CELLS, CHUNKS, EXTRAS, FEW, FIXED, LOSSES, PATHS, WORLDS, Cell, Extra, Result, problem

GROUPS: dict[tuple[int, str, str], list[Cell]] = {}
for cell in CELLS:
    GROUPS.setdefault((cell.world_size, f"chunks of {cell.chunk or 'all'}, {cell.path}", cell.loss), []).append(cell)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every cell's errors: computed once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    output = shared / "matrix.pt"
    with FileLock(shared / "matrix.lock"):
        if not output.exists():
            path = os.pathsep.join([str(matrix.ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            command = [sys.executable, str(Path(matrix.__file__)), "--output", str(output)]
            child = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1200
            )
            assert output.exists(), child.stdout[-2000:] + child.stderr[-4000:]
        found, _ = torch.load(output)
    return found


def assert_right(cells: list[Cell] | list[Extra], results: dict[str, Result]) -> None:
    """None of the cells failed; otherwise each of those that did is named."""
    problems = [line for line in (problem(cell, results) for cell in cells) if line]
    if problems:
        pytest.fail("\n".join([f"{len(problems)} of {len(cells)} cells:", *problems]), pytrace=False)


@pytest.mark.parametrize("world_size, how, loss", GROUPS)
def test_every_cell_has_the_loss_and_the_gradient_of_the_reference(
    world_size: int, how: str, loss: str, results: dict[str, Result]
) -> None:
    assert_right(GROUPS[world_size, how, loss], results)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_cells_beyond_the_product(extra: Extra, results: dict[str, Result]) -> None:
    assert_right([extra], results)


def test_the_matrix_is_the_whole_product(results: dict[str, Result]) -> None:
    """No combination is missing or computed twice, and nothing failed before the first cell."""
    by_path = {path: [c for c in CELLS if c.path == path and c.loss not in FEW] for path in (*PATHS, FIXED)}
    for path in PATHS:
        cells = by_path[path]
        assert len(set(cells)) == len(cells) == (3 + 3 + 1) * len(CHUNKS) * len(LOSSES) * 3
        assert {(c.world_size, c.chunk, c.loss) for c in cells} == set(product(WORLDS, CHUNKS, LOSSES))
    cells = by_path[FIXED]
    assert len(set(cells)) == len(cells) == (2 + 2 + 1) * 2 * 3 + 2 * 2 + (1 + 2 + 1) * (len(LOSSES) - 1)
    assert {(c.world_size, c.chunk) for c in cells if c.loss == "info_nce"} == set(product(WORLDS, (None, 3)))
    assert {(c.world_size, c.loss) for c in cells} == set(product(WORLDS, LOSSES))
    cells = [c for c in CELLS if c.loss in FEW]
    assert len(set(cells)) == len(cells) == len(WORLDS) * len(FEW) * 2
    assert set(results) == set(map(str, [*CELLS, *EXTRAS]))


def test_a_failing_cell_is_named() -> None:
    """Each way to be wrong has a message with the cell, what is off and by how much."""
    cell = CELLS[0]
    name = "1 processes, whole, dense, info_nce, accumulation 1, equal, float64"
    assert str(cell) == name
    assert problem(cell, {name: (1e-10, 1e-10, "w")}) is None
    assert problem(cell, {name: (2e-9, 0.0, "w")}).startswith(f"{name}: loss off by 2.0e-09, gradient of w off by 0")
    assert problem(cell, {name: (0.0, 0.5, "w")}) == (
        f"{name}: loss off by 0.0e+00, gradient of w off by 5.0e-01 of the whole gradient's norm (bound 1e-09)"
    )
    for loss_error, gradient_error in ((float("nan"), 0.0), (0.0, float("inf"))):
        assert problem(cell, {name: (loss_error, gradient_error, "w")})
    assert problem(cell, {name: "Traceback: boom"}) == f"{name}: Traceback: boom"
    assert "was not run" in problem(cell, {})
    assert matrix.worst([(0.0, 0.5, "a"), (0.1, 0.2, "b")]) == (0.1, 0.5, "a")
    assert matrix.worst([(0.0, 0.5, "a"), "boom"]) == "boom"
