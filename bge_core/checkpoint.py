"""The run folder: checkpoints that are whole or absent, resume, retention, the final model at its root.

    output_dir/
      config.json model.safetensors ...   the final model
      checkpoint-<step>/                  a model folder, training_state.pt to go on from, and manifest.json
      metrics.jsonl curves.png manifest.json

A checkpoint is written beside its place and renamed, so a folder of that name is complete; its manifest has the SHA-256
of every file in it, so what a disk does to it later is noticed. It is copied in the loop and written in a thread.
"""

import copy
import fcntl
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_core import UserError, records
from bge_core.distributed import gather_objects, on_main, whole_copy, world
from bge_core.model import Encoder

logger = logging.getLogger(__name__)
STATE_FILE = "training_state.pt"
MANIFEST = "manifest.json"
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


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run folder by rising step, damaged ones included."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if _is_checkpoint(path)), key=_step)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() or (folder / MANIFEST).is_file()


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


@contextmanager
def hold(output_dir: str | Path) -> Iterator[None]:
    """Hold the run folder for this process alone. Rank 0 calls it.

    A lock of the kernel: it ends with the process, however that ends, and a forked data worker has no part in it.

    Raises:
        UserError: another run holds it; a file; not writable.
    """
    folder = Path(output_dir)
    _ = _held(folder)
    records.refuse_unwritable(folder)
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


def open_run_folder(
    output_dir: str | Path, config: dict[str, Any], data_order: dict[str, Any], *, resume: str | None, overwrite: bool
) -> Path | None:
    """Claim the run folder, which `hold` holds; say which checkpoint to resume.

    A folder whose manifest has the same configuration is the run's own. Any other folder that holds something is
    refused without `overwrite`; with it, an earlier run's checkpoints, metrics and manifest are removed. A damaged
    checkpoint is passed over for the one before it.

    Args:
        output_dir: the run folder.
        config: resolved settings as the manifest keeps them; those in its "allow_changed" may differ.
        data_order: what `changed_settings` compares beside them.
        resume: "latest", the path of a checkpoint, or None.
        overwrite: begin anew in a folder that holds another run.

    Returns:
        The checkpoint to resume from, or None to begin at step 0.

    Raises:
        UserError: a folder of something else; no such checkpoint, none that is whole, or one of other settings.
    """
    folder = Path(output_dir)
    named = Path(resume) if resume and resume != "latest" else None
    if named and not _is_checkpoint(named):
        raise UserError(
            f"--resume_from_checkpoint {resume}: is not a checkpoint (no {STATE_FILE}); name one, or 'latest'"
        )
    held = _held(folder)
    manifest = records.read_json(folder / MANIFEST) or {}
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
    if chosen:
        changed = changed_settings(records.read_json(chosen / MANIFEST), config, data_order)
        if changed:
            listed, advice = _listed(changed), _advice(changed)
            raise UserError(f"{chosen}: was trained with other settings, this start has changed {listed}; {advice}")
    if held and not goes_on:
        old_files = [folder / name for name in ("metrics.jsonl", MANIFEST, "curves.png")]
        old = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+(\.aside)?", path.name)]
        for path in [*old, *old_files]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _sweep(folder)
    if chosen:
        _set_aside(folder, records.read_json(chosen / MANIFEST)["step"])
    return chosen


def _held(folder: Path) -> list[str]:
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


def _sweep(folder: Path) -> None:
    """Remove the temporary leftovers of a run that was killed while it wrote."""
    for path in [*folder.glob(".*.tmp-*"), *folder.glob(".*.old-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`: damaged ones, or those of a course that is left, must not be the newest."""
    for path in checkpoints(folder):
        if _step(path) > step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.info("%s is set aside as %s until it is written again", path, aside.name)


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """The file of a checkpoint that is missing or not as it was written, with what is wrong; None: it is whole."""
    try:
        manifest = records.read_json(folder / MANIFEST)
        if manifest["sha256"] != _digest(manifest):
            return f"{folder / MANIFEST} is damaged"
    except (UserError, TypeError, KeyError):
        return f"{folder / MANIFEST} is missing or damaged"
    for name, facts in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{folder / name} is damaged ({size} bytes instead of {facts['bytes']})"
            if records.sha256(folder / name) != facts["sha256"]:
                return f"{folder / name} is damaged (other bytes than were written)"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
    return None


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


def write_checkpoint(
    folder: Path, encoder: Encoder, weights: dict[str, Tensor], state: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        folder: checkpoint-<step>; an earlier one of that name is replaced.
        encoder: gives all but the weights.
        weights: the backbone's state dict.
        state: what `load_checkpoint` shall give back.
        manifest: gets the size and SHA-256 of every file, and its own.

    Raises:
        OSError: names `folder`, not the temporary one.
    """
    try:
        with records.atomic_path(folder) as temporary:
            encoder.save(temporary, weights)
            try:
                torch.save(state, temporary / STATE_FILE)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{temporary / STATE_FILE}: {error}") from None
            files = {
                str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": records.sha256(file)}
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            manifest = manifest | {"files": files}
            records.write_json(temporary / MANIFEST, manifest | {"sha256": _digest(manifest)})
    except OSError as error:
        reason = re.sub(rf"\.{folder.name}\.tmp-\d+", folder.name, str(error))
        raise OSError(f"{folder}: could not be written: {reason}") from None


class Saver:
    """Copies a run's state in the loop and writes it in one background thread, one checkpoint at a time.

    Args:
        output_dir: the run folder.
        encoder: what is trained.
        manifest: of every checkpoint; see `changed_settings`.
        limit: keep this many newest checkpoints; None: all.
    """

    def __init__(self, output_dir: Path, encoder: Encoder, manifest: dict[str, Any], limit: int | None) -> None:
        self.output_dir, self.manifest, self.limit = output_dir, manifest, limit
        # A tokenizer of its own: saving changes it, while the loop goes on using the other.
        self.encoder = Encoder(encoder.backbone, copy.deepcopy(encoder.tokenizer), encoder.settings)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: dict[str, Any], keep: str | None = None) -> None:
        """Take a copy and begin to write checkpoint-<step>, once the one before is written. Every rank calls it.

        Args:
            step: optimizer steps done.
            state: what `load_checkpoint` shall give back, beside the step and the random state of each rank.
            keep: name of a checkpoint that pruning spares.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        random_states = gather_objects(random_state())
        weights = whole_copy(self.encoder.backbone.state_dict())
        state = whole_copy({**state, "step": step, "random_states": random_states})
        if world()[0] == 0:
            self._thread = threading.Thread(target=self._write, args=(step, weights, state, keep))
            self._thread.start()

    def _write(self, step: int, weights: dict[str, Tensor], state: dict[str, Any], keep: str | None) -> None:
        folder = self.output_dir / f"checkpoint-{step}"
        try:
            write_checkpoint(folder, self.encoder, weights, state, self.manifest | {"step": step})
            shutil.rmtree(folder.with_name(f"{folder.name}.aside"), ignore_errors=True)
            prune(self.output_dir, self.limit, keep)
        except Exception as error:  # `wait` raises it in the loop
            self._error = error

    def failed(self) -> bool:
        """Whether this rank's writing has failed; `wait` tells why."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until nothing is being written. Every rank calls it.

        Raises:
            UserError: a checkpoint could not be written; on every rank.
        """
        on_main(self._finish)

    def _finish(self) -> None:
        self.close()
        if isinstance(self._error, OSError):
            raise UserError(
                f"{self._error}\nThe checkpoints before it are whole: make room, then --resume_from_checkpoint latest"
            )
        if self._error:
            raise self._error

    def close(self) -> None:
        """Let a checkpoint that is being written be finished."""
        if self._thread:
            self._thread.join()


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The training state of a checkpoint (its weights are loaded like any model's). UserError if it is damaged."""
    try:
        return dict(torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}/{STATE_FILE}: is damaged ({what}); resume from an older one") from None


def seed_random_state(seed: int, step: int, rank: int) -> None:
    """A random state for a rank that the checkpoint of `step` has none for: other dropout than in any step before."""
    torch.manual_seed(int(np.random.default_rng((seed, step, rank)).integers(1 << 63)))


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


def publish_model(
    output_dir: str | Path, source: Encoder | Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Put a model at the root of the run folder, file by file and each of them whole, weights last.

    Args:
        source: the encoder, or a checkpoint whose model files are taken.
        weights: the encoder's, put together, where they lie in shards.
    """
    folder = Path(output_dir)
    temporary = folder / f".model.tmp-{os.getpid()}"
    try:
        if isinstance(source, Encoder):
            source.save(temporary, weights)
        else:
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(STATE_FILE, MANIFEST))
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
