"""Model code that comes with a checkpoint (auto_map): which files it is, and how a saved folder gets all of them."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from bge_core import UserError


def code_files(backbone: Any) -> list[Path]:
    """The files of a model's own code, of its configuration's and of what they import beside them; none of stock ones.

    They are where transformers has copied them from the folder or from whatever repository its auto_map names; each
    name once, in order.
    """
    modules = {type(part).__module__ for part in (backbone, backbone.config)}
    roots = [str(sys.modules[name].__file__) for name in modules if name.startswith("transformers_modules.")]
    files = {Path(file).name: Path(file) for root in roots for file in (root, *get_relative_import_files(root))}
    return [files[name] for name in sorted(files)]


def model_code(backbone: Any) -> str | None:
    """Hash of the files of a model's own code; None where the model is one of transformers'."""
    import xxhash

    files = {file.name: file.read_bytes() for file in code_files(backbone)}
    return xxhash.xxh3_128(repr(files).encode()).hexdigest() if files else None


def save_code(folder: Path, backbone: Any) -> None:
    """Let a written model folder have all its code, and a config.json from which that code makes the same config.

    Args:
        folder: with its config.json.
        backbone: what was saved there, with weights or without.

    Raises:
        UserError: the model's code makes another configuration of what transformers writes.
    """
    files = code_files(backbone)
    if not files:
        return
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    present = {file.stem for file in files}
    auto_map = {"AutoConfig": backbone.config, "AutoModel": backbone}
    auto_map = {name: f"{type(of).__module__.rpartition('.')[2]}.{type(of).__name__}" for name, of in auto_map.items()}
    for name, reference in stated.get("auto_map", {}).items():
        own = str(reference).rpartition("--")[2]  # owner/repository--module.Class
        auto_map.setdefault(name, own if own.partition(".")[0] in present else reference)
    stated["auto_map"] = auto_map
    if rope := stated.get("rope_parameters"):  # code of before transformers 5 reads these, and would reset the former
        stated |= {"rope_scaling": rope, "rope_theta": rope.get("rope_theta")}
    text = json.dumps(stated, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    again, config = type(backbone.config).from_pretrained(folder).to_dict(), backbone.config.to_dict()
    passing = {"_name_or_path", "auto_map", "transformers_version", "dtype", "architectures"}
    if lost := [name for name in sorted(config) if name not in passing and again.get(name) != config[name]]:
        raise UserError(f"{folder}: the model's code does not read {', '.join(lost)} of its own config.json again")
