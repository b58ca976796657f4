"""The run folder: one run at a time, begun anew or gone on with where a checkpoint left off."""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_core import UserError
from bge_core.files import atomic
from bge_core.runtime.distributed import world
from bge_core.training.checkpoint import (
    MANIFEST,
    STATE_FILE,
    checkpoint_step,
    checkpoints,
    find_damage,
    is_checkpoint,
)

logger = logging.getLogger(__name__)


# Settings that may differ when a run is continued: they change neither the data order nor the gradient.
FREE_SETTINGS = {
    "resume_from_checkpoint", "overwrite_output_dir", "show_batch", "logging_steps", "save_steps", "save_total_limit",
    "report_to", "run_name", "dataloader_num_workers", "cache_dir", "val_data", "val_corpus", "eval_steps", "plan",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience",
    "output_dir", "allow_changed", "sub_batch_size", "loss_block_size", "gradient_checkpointing", "fsdp", "ddp_timeout",
}  # fmt: skip

# What the settings of a batch amount to, whatever the number of processes -> the setting to which it is put down.
ORDER_SETTINGS = {
    "rows": ("per_device_train_batch_size", "rows of a micro-batch over all processes"),
    "accumulation": ("gradient_accumulation_steps", "micro-batches of a step"),
    "candidates": ("negatives_cross_device", "rows whose passages are candidates together"),
}


@contextmanager
def lock_run_folder(output_dir: str | Path) -> Iterator[None]:
    """Lock the run folder for this process alone. Rank 0 calls it.

    A lock of the kernel: it ends with the process, however that ends, and a forked data worker has no part in it.

    Raises:
        UserError: another run holds it; a file; not writable.
    """
    folder = Path(output_dir)
    _visible(folder)
    atomic.refuse_unwritable(folder)
    path = folder / ".lock"
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise UserError(
                f"--output_dir {folder}: another run is writing there; wait for its end, or name another folder"
            ) from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); see to it that no other run writes there", folder, error)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # the run that held it removed it meanwhile
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@dataclass(frozen=True)
class Start:
    """How a run begins in its folder, see `plan_start`.

    Args:
        folder: the run folder.
        resume: the checkpoint to go on from, or None to begin at step 0.
        step: of that checkpoint; 0 without one.
        removes_run: an earlier run in the folder has to go.
    """

    folder: Path
    resume: Path | None
    step: int
    removes_run: bool


def plan_start(
    output_dir: str | Path, config: dict[str, Any], data_order: dict[str, Any], *, resume: str | None, overwrite: bool
) -> Start:
    """Whether and how this run may begin in the run folder. Nothing is touched.

    A folder whose manifest has the same configuration is the run's own. Any other folder that holds something is
    refused without `overwrite`. A damaged checkpoint is passed over for the one before it.

    Args:
        output_dir: the run folder.
        config: resolved settings as the manifest keeps them; those in its "allow_changed" may differ.
        data_order: what `changed_settings` compares beside them.
        resume: "latest", the path of a checkpoint, or None.
        overwrite: begin anew in a folder that holds another run.

    Raises:
        UserError: a folder of something else; no such checkpoint, none that is whole, or one of other settings.
    """
    folder = Path(output_dir)
    named = Path(resume) if resume and resume != "latest" else None
    if named and not is_checkpoint(named):
        raise UserError(
            f"--resume_from_checkpoint {resume}: is not a checkpoint (no {STATE_FILE}); name one, or 'latest'"
        )
    held = _visible(folder)
    manifest = atomic.read_json(folder / MANIFEST) or {}
    changed = changed_settings(manifest, config, data_order)
    own = manifest.get("stage") == "train" and not changed
    goes_on = own and resume is not None
    if named and overwrite and not goes_on and folder.resolve() in named.resolve().parents:
        raise UserError(
            f"--resume_from_checkpoint {resume}: --overwrite_output_dir would remove it; name another folder"
        )
    if held and not goes_on and not overwrite:
        raise UserError(f"--output_dir {folder}: {_why_refused(manifest, own, changed, held)}")
    chosen = _refuse_damaged(named) if named else _newest_whole(checkpoints(folder)) if goes_on else None
    step = 0
    if chosen:
        manifest = atomic.read_json(chosen / MANIFEST)
        step, changed = manifest["step"], changed_settings(manifest, config, data_order)
        if changed:
            listed, advice = _listed(changed), _advice(changed)
            raise UserError(f"{chosen}: was trained with other settings, this start has changed {listed}; {advice}")
    return Start(folder, chosen, step, removes_run=bool(held) and not goes_on)


def begin(start: Start) -> None:
    """Do what `plan_start` found: from here on the folder, which `lock_run_folder` holds, is this run's.

    An earlier run's checkpoints, metrics and manifest are removed, and what a killed run left half-written. Checkpoints
    after the one to resume from are renamed: damaged ones, or those of a course that is left, must not be the newest.
    """
    folder = start.folder
    gone = [*folder.glob(".*.tmp-*"), *folder.glob(".*.old-*")]
    if start.removes_run:
        gone += [folder / name for name in ("metrics.jsonl", MANIFEST, "curves.png")]
        gone += [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+(\.aside)?", path.name)]
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in checkpoints(folder) if start.resume else []:
        if checkpoint_step(path) > start.step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.info("%s is set aside as %s until it is written again", path, aside.name)


def _visible(folder: Path) -> list[str]:
    """Names of what a folder holds, hidden files apart. UserError: it is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; name a folder")
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []


def changed_settings(manifest: dict[str, Any], config: dict[str, Any], data_order: dict[str, Any]) -> dict[str, str]:
    """Settings that make this start another run than the manifest's, and are not in config["allow_changed"].

    Args:
        manifest: of a run or a checkpoint; its "config" and "data_order" are compared.
        config: resolved settings of this start.
        data_order: "train_data" and "loss", each [path, sha256] of its files in order; "rows" of a micro-batch of all
            processes; "accumulation"; "candidates": the rows whose passages are candidates together, or "all".

    Returns:
        Name -> what it was and what it is now.
    """
    before, order = manifest.get("config") or {}, manifest.get("data_order") or data_order
    compared = config.keys() - FREE_SETTINGS - {"train_data"} - {setting for setting, _ in ORDER_SETTINGS.values()}
    changed = {
        name: f"{before.get(name)!r}, now {value!r}"
        for name, value in config.items()
        if name in compared and before.get(name) != value
    }
    for name in ("train_data", "loss"):
        old, new = dict(order[name]), dict(data_order[name])
        if list(old.values()) != list(new.values()):  # the same files elsewhere are the same data
            other = [path for path in new if old.get(path, new[path]) != new[path]]
            changed.setdefault(name, f"other content in {', '.join(other)}" if other else f"{[*old]}, now {[*new]}")
    remedy = f" (use {_flags_to_fit(order)})"
    for name, (setting, phrase) in ORDER_SETTINGS.items():
        if order[name] != data_order[name]:
            changed[setting] = f"{phrase} {order[name]}, now {data_order[name]}{remedy}"
            remedy = ""
    return {name: what for name, what in changed.items() if name not in config["allow_changed"]}


def _flags_to_fit(order: dict[str, Any]) -> str:
    """The flags with which this number of processes makes the same batches, or the numbers that can."""
    rows, candidates, num_processes = order["rows"], order["candidates"], world()[1]
    if isinstance(candidates, int):  # of each process alone
        num_processes = rows // candidates
    if rows % num_processes:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        return f"{fitting} processes: {num_processes} do not divide a batch of {rows}"
    cross_device = " --negatives_cross_device True" if candidates == "all" and num_processes > 1 else ""
    flags = f"--per_device_train_batch_size {rows // num_processes}{cross_device}"
    flags += f" --gradient_accumulation_steps {order['accumulation']}"
    return f"{num_processes} processes and " * (num_processes != world()[1]) + flags


def _advice(changed: dict[str, str]) -> str:
    return f"give the old ones, or permit it with --allow_changed {' '.join(changed)}"


def _listed(changed: dict[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in changed.items())


def _why_refused(manifest: dict[str, Any], own: bool, changed: dict[str, str], held: list[str]) -> str:
    remedy = "name another folder, or add --overwrite_output_dir to begin anew there"
    if own:
        return f"holds this very run; add --resume_from_checkpoint latest to go on, {remedy}"
    if manifest.get("stage") == "train":
        listed, advice = _listed(changed), _advice(changed)
        return f"holds a run with other settings ({listed}); to go on with it, {advice}; else {remedy}"
    return f"is not empty (it holds {', '.join(held[:5])}); {remedy}"


def _newest_whole(found: list[Path]) -> Path | None:
    """The newest checkpoint that is whole; None of none. UserError: all are damaged."""
    problems: list[str] = []
    for path in reversed(found):
        problem = find_damage(path)
        if problem is None:
            if problems:
                logger.warning("%s; going on from the checkpoint before, %s", "; ".join(problems), path)
            return path
        problems.append(problem)
    if problems:
        raise UserError(f"no checkpoint is whole: {'; '.join(problems)}; --overwrite_output_dir begins anew")
    return None


def _refuse_damaged(named: Path) -> Path:
    problem = find_damage(named)
    if problem is None:
        return named
    others = [path for path in checkpoints(named.parent) if path.resolve() != named.resolve()]
    whole = next((path for path in reversed(others) if find_damage(path) is None), None)
    remedy = f"--resume_from_checkpoint {whole} is whole" if whole else "no other beside it is whole"
    raise UserError(f"--resume_from_checkpoint {named}: {problem}; {remedy}")


def cut_metrics(path: Path, step: int, evaluated: int) -> None:
    """Drop from metrics.jsonl what a run that goes on after `step` writes again, and a half-written last line.

    The evaluation after `step` itself is written again unless `evaluated`, the step of the last one, is the same.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        if values["step"] < step or (values["step"] == step and ("loss" in values or evaluated == step)):
            kept.append(line + "\n")
    with atomic.atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
