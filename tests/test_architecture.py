"""The shape of the code, read from its source: who imports whom, sizes, docstrings, nothing done at import."""

import ast
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

LEVELS = {
    "refused": -1, "config": 0, "cli": 1, "records": 0, "metrics": 0, "runlog": 0, "watchdog": 0, "batch": 0, "dropout": 0,
    "loss": 1, "merge_methods": 1, "kernels": 1, "packing": 2, "launch": 1, "distributed": 1, "search": 1, "optim": 1,
    "guards": 1, "lexical": 1, "sources": 1, "checks": 1, "page": 1, "significance": 1, "sweep": 2, "tasks": 2,
    "encode": 2, "data": 2, "ann": 2, "mining_report": 2,
    "model": 3, "step": 3, "cache": 3, "reranker": 4,
    "checkpoint": 4,
    "mining": 5, "merging": 5, "evaluation": 5, "report": 5, "plan": 5, "costs": 5, "evaluation_report": 6,
}  # fmt: skip
TALKS_TO_THE_GROUP = {
    "launch", "distributed", "watchdog", "encode", "step", "checkpoint", "cache", "reranker", "mining",
}  # fmt: skip
CORE = [
    "train.py", "bge_core/step.py", "bge_core/loss.py", "bge_core/distributed.py", "bge_core/packing.py",
    "bge_core/data.py",
]  # fmt: skip
SCRIPTS = [ROOT / f"{stage}.py" for stage in ("prepare", "mine", "train", "merge", "evaluate", "recipe")]
MODULES = sorted((ROOT / "bge_core").glob("*.py"))
NAMED = pytest.mark.parametrize("module", [m for m in MODULES if m.stem != "__init__"], ids=lambda m: m.stem)


NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER, tokenize.INDENT,
    tokenize.DEDENT,
}  # fmt: skip


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> set[str]:
    """Full dotted names of everything imported, at the top or within functions."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(file: Path) -> set[str]:
    """Modules of bge_core that a file imports."""
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("bge_core.")} & set(LEVELS)


def num_code_lines(file: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    with open(file, "rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type not in NO_CODE:
                code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


@NAMED
def test_imports_go_to_a_lower_level(module: Path) -> None:
    assert module.stem in LEVELS, "a new module needs its place in DESIGN's layout and in LEVELS"
    for imported in own_imports(module):
        assert LEVELS[imported] < LEVELS[module.stem], f"{module.stem} imports {imported}"
    scripts = {script.stem for script in SCRIPTS}
    assert not {name.split(".")[0] for name in imports_of(module)} & scripts


def test_what_is_below_all_imports_nothing_of_ours() -> None:
    assert imports_of(ROOT / "bge_core" / "__init__.py") == set()


def test_the_loss_needs_torch_alone() -> None:
    outside = {name.split(".")[0] for name in imports_of(ROOT / "bge_core" / "loss.py")} - set(sys.stdlib_module_names)
    assert outside == {"torch"}
    assert not any("distributed" in name for name in imports_of(ROOT / "bge_core" / "loss.py"))


@NAMED
def test_few_talk_to_the_process_group(module: Path) -> None:
    talks = "distributed" in own_imports(module) or any("torch.distributed" in name for name in imports_of(module))
    assert not talks or module.stem in TALKS_TO_THE_GROUP


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=lambda f: f.stem)
def test_nothing_is_left_to_do_and_the_library_does_not_print(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "TODO" not in text and "FIXME" not in text and "XXX" not in text
    if file in SCRIPTS:
        return
    prints = [
        node
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    # run_stage alone: the one message on stderr when a stage ends with 2
    allowed = 1 if file.stem == "cli" else 0
    assert len(prints) <= allowed
    for call in prints:
        assert any(keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in call.keywords)


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=lambda f: f.stem)
def test_what_is_public_has_a_docstring(file: Path) -> None:
    tree = parsed(file)
    assert ast.get_docstring(tree), f"{file.name} says not what it is for"
    missing = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            members = node.body if isinstance(node, ast.ClassDef) and file in MODULES else []
            for item in [node, *members]:
                public = isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.startswith("_")
                if public and not ast.get_docstring(item):
                    missing.append(f"{file.name}:{item.lineno} {item.name}")
    assert not missing


def test_modules_stay_small() -> None:
    lines = {file.name: num_code_lines(file) for file in MODULES}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert sum(num_code_lines(ROOT / file) for file in CORE) <= 1200
    assert sum(lines.values()) + sum(num_code_lines(script) for script in SCRIPTS if script.exists()) <= 8_700


IMPORT_ALL = """
import importlib, logging, os, sys
before = set(os.listdir("."))
root_handlers = list(logging.getLogger().handlers)
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch.distributed as dist
assert not dist.is_initialized(), "a process group"
assert set(os.listdir(".")) == before, "files"
assert logging.getLogger().handlers == root_handlers, "logging was set up"
import torch
assert not torch.cuda.is_initialized(), "a CUDA context"
from accelerate.state import PartialState
assert PartialState._shared_state == {}, "an Accelerator"
"""


def test_importing_does_nothing(tmp_path: Path) -> None:
    names = [f"bge_core.{module.stem}" for module in MODULES if module.stem != "__init__"]
    names += [script.stem for script in SCRIPTS if script.exists()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
