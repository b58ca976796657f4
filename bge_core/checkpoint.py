"""The run folder: checkpoints that are whole or absent, resume, retention, the final model at its root.

    output_dir/
      config.json model.safetensors ...   the final model
      checkpoint-<step>/                  a model folder, and training_state.pt to go on from
      metrics.jsonl curves.png manifest.json

A checkpoint is written beside its place and renamed, so a folder of that name is complete.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from bge_core import UserError, records
from bge_core.distributed import gather_objects, world
from bge_core.model import Encoder

STATE_FILE = "training_state.pt"
# Settings that may differ when a run is continued: they change neither the data order nor a weight.
FREE_SETTINGS = {
    "resume_from_checkpoint", "overwrite_output_dir", "show_batch", "logging_steps", "save_steps", "save_total_limit",
    "report_to", "run_name", "dataloader_num_workers", "cache_dir", "val_data", "val_corpus", "eval_steps",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience",
    "output_dir", "sub_batch_size", "loss_block_size", "gradient_checkpointing",
}  # fmt: skip


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run folder by rising step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(
        (path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name.split("-")[1])
    )


def open_run_folder(
    output_dir: str | Path, config: dict[str, Any], *, resume: str | None, overwrite: bool
) -> Path | None:
    """Claim the run folder; say which checkpoint to resume.

    A folder whose manifest has the same configuration is the run's own. Any other folder that holds something is
    refused without `overwrite`; with it, an earlier run's checkpoints, metrics and manifest are removed.

    Args:
        output_dir: the run folder.
        config: resolved settings as the manifest keeps them.
        resume: "latest", the path of a checkpoint, or None.
        overwrite: begin anew in a folder that holds another run.

    Returns:
        The checkpoint to resume from, or None to begin at step 0.

    Raises:
        UserError: a folder of something else, or not writable; no such checkpoint.
    """
    folder = Path(output_dir)
    named = Path(resume) if resume and resume != "latest" else None
    if named and not (named / STATE_FILE).is_file():
        raise UserError(
            f"--resume_from_checkpoint {resume}: is not a checkpoint (no {STATE_FILE}); name one, or 'latest'"
        )
    held = _held(folder)
    manifest = records.read_json(folder / "manifest.json") or {}
    changed = _changed(manifest.get("config") or {}, config)
    own = manifest.get("stage") == "train" and not changed
    goes_on = own and resume is not None
    if named and overwrite and not goes_on and folder.resolve() in named.resolve().parents:
        raise UserError(
            f"--resume_from_checkpoint {resume}: --overwrite_output_dir would remove it; name another folder"
        )
    records.refuse_unwritable(folder)
    if held and not goes_on:
        if not overwrite:
            raise UserError(f"--output_dir {folder}: {_why_refused(manifest, own, changed, held)}")
        old_files = [folder / name for name in ("metrics.jsonl", "manifest.json", "curves.png")]
        old_checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
        for path in [*old_checkpoints, *old_files]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _sweep(folder)
    newest = checkpoints(folder)[-1:] if resume else []
    return named or (newest[0] if newest else None)


def _held(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; name a folder")
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in now if name not in FREE_SETTINGS and before.get(name) != now[name]]


def _why_refused(manifest: dict[str, Any], own: bool, changed: list[str], held: list[str]) -> str:
    remedy = "name another folder, or add --overwrite_output_dir to begin anew there"
    if own:
        return f"holds this very run; add --resume_from_checkpoint latest to go on, {remedy}"
    if manifest.get("stage") == "train":
        return f"holds a run with other settings ({', '.join(changed[:5])}); {remedy}"
    return f"is not empty (it holds {', '.join(held[:5])}); {remedy}"


def _sweep(folder: Path) -> None:
    """Remove the temporary leftovers of a run that was killed while it wrote."""
    for path in [*folder.glob(".*.tmp-*"), *folder.glob(".*.old-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_checkpoint(output_dir: str | Path, step: int, encoder: Encoder, state: dict[str, Any]) -> Path:
    """Write checkpoint-<step>, whole or not at all. Every rank calls it: rank 0 writes, all give their random state.

    Args:
        state: what `load_checkpoint` shall give back, beside the weights and the random state of each rank.

    Returns:
        The checkpoint's folder.
    """
    random_states = gather_objects(random_state())
    target = Path(output_dir) / f"checkpoint-{step}"
    if world()[0] == 0:
        with records.atomic_path(target) as temporary:
            encoder.save(temporary)
            try:
                torch.save({**state, "step": step, "random_states": random_states}, temporary / STATE_FILE)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{target / STATE_FILE}: could not be written: {error}") from None
    return target


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The training state of a checkpoint (its weights are loaded like any model's). UserError if it is damaged."""
    try:
        return dict(torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}/{STATE_FILE}: is damaged ({what}); resume from an older one") from None


def random_state() -> dict[str, Any]:
    """The random state of this process, from which dropout comes."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def prune(output_dir: str | Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest and never the one named `keep`."""
    if limit is None:
        return
    removable = [path for path in checkpoints(output_dir)[:-1] if path.name != keep]
    excess = len(checkpoints(output_dir)) - limit
    for path in removable[: max(excess, 0)]:
        aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # a kill in the middle leaves no half checkpoint
        path.rename(aside)
        shutil.rmtree(aside)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl behind `step`, and a half-written last one: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    with records.atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def publish_model(output_dir: str | Path, source: Encoder | Path) -> None:
    """Put a model at the root of the run folder, file by file and each of them whole, weights last.

    Args:
        source: the encoder, or a checkpoint whose model files are taken.
    """
    folder = Path(output_dir)
    temporary = folder / f".model.tmp-{os.getpid()}"
    try:
        if isinstance(source, Encoder):
            source.save(temporary)
        else:
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(STATE_FILE))
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", str(path))):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        for path in temporary.rglob("*"):
            if path.is_dir():
                (folder / path.relative_to(temporary)).mkdir(exist_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
