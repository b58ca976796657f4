"""The shape of the code, read from its source: who imports whom, docstrings, nothing done at import."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Imports go one way: a room knows those before it, and within a room there is no circle.
ROOMS = ["runtime", "files", "reports", "encoder", "training", "search", "evaluation", "mining", "merging"]
TALKS_TO_THE_GROUP = {
    "runtime.launch", "runtime.distributed", "runtime.watchdog", "encoder.encode", "encoder.reranker", "training.step",
    "training.graphs", "training.checkpoint", "training.run_folder", "search.cache", "search.exact", "mining.retrieve", "evaluation.score",
}  # fmt: skip
SCRIPTS = [ROOT / f"{stage}.py" for stage in ("prepare", "mine", "train", "merge", "evaluate", "recipe")]
MODULES = sorted((ROOT / "bge_core").rglob("*.py"))


def name_of(file: Path) -> str:
    """bge_core/files/records.py -> files.records; a room's __init__.py -> files; that of bge_core -> ''."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("bge_core", "__init__"))


NAMED = pytest.mark.parametrize("module", [m for m in MODULES if m.stem != "__init__"], ids=name_of)


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
    """Modules of bge_core that a file imports, as `name_of` names them."""
    known, found = {name_of(module) for module in MODULES} - {""}, set()
    for name in imports_of(file):
        own = name.removeprefix("bge_core.")
        if own != name:
            found.add(next((part for part in (own, own.rpartition(".")[0]) if part in known), ""))
    return found - {""}


def test_every_module_has_its_room() -> None:
    assert {name_of(module).partition(".")[0] for module in MODULES} == {*ROOMS, "loss", ""}


@NAMED
def test_imports_go_one_way_between_rooms(module: Path) -> None:
    room = name_of(module).partition(".")[0]
    known = set() if room == "loss" else {*ROOMS[: ROOMS.index(room) + 1], "loss"}
    for imported in own_imports(module):
        assert imported.partition(".")[0] in known, f"{name_of(module)} imports {imported}"
    scripts = {script.stem for script in SCRIPTS}
    assert not {name.split(".")[0] for name in imports_of(module)} & scripts


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {name_of(module): own_imports(module) for module in MODULES if name_of(module)}
    assert list(TopologicalSorter(imports).static_order())  # a circle raises CycleError


def test_what_is_below_all_imports_nothing_of_ours() -> None:
    assert imports_of(ROOT / "bge_core" / "__init__.py") == set()


def test_the_loss_needs_torch_alone() -> None:
    outside = {name.split(".")[0] for name in imports_of(ROOT / "bge_core" / "loss.py")} - set(sys.stdlib_module_names)
    assert outside == {"torch"}
    assert not any("distributed" in name for name in imports_of(ROOT / "bge_core" / "loss.py"))


@NAMED
def test_few_talk_to_the_process_group(module: Path) -> None:
    talks = "runtime.distributed" in own_imports(module) or any(
        "torch.distributed" in name for name in imports_of(module)
    )
    assert not talks or name_of(module) in TALKS_TO_THE_GROUP


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=lambda f: name_of(f) or "bge_core")
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
    allowed = 1 if name_of(file) == "runtime.cli" else 0
    assert len(prints) <= allowed
    for call in prints:
        assert any(keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in call.keywords)


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=lambda f: name_of(f) or "bge_core")
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
    names = [f"bge_core.{name_of(module)}".rstrip(".") for module in MODULES]
    names += [script.stem for script in SCRIPTS if script.exists()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
