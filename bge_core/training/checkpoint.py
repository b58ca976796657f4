"""The files of a run: checkpoints that are whole or absent, the newest kept, and the final model.

    output_dir/
      config.json model.safetensors ...   the final model
      checkpoint-<step>/                  a model folder, training_state.pt to go on from, and manifest.json
      metrics.jsonl curves.png manifest.json

A checkpoint is written beside its place and renamed, so a folder of that name is complete; its manifest has the SHA-256
of every file in it, so what a disk does to it later is noticed. It is copied in the loop and written in a thread.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bge_core import UserError
from bge_core.encoder.model import Encoder
from bge_core.encoder.settings import copy_tokenizer
from bge_core.files import atomic
from bge_core.runtime.distributed import gather_objects, on_main, whole_copy, world
from bge_core.training.random_state import random_state

logger = logging.getLogger(__name__)
STATE_FILE = "training_state.pt"
MANIFEST = "manifest.json"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run folder by rising step, damaged ones included."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if is_checkpoint(path)), key=checkpoint_step)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, be it damaged."""
    return (folder / STATE_FILE).is_file() or (folder / MANIFEST).is_file()


def checkpoint_step(folder: Path) -> int:
    """The step in the name of checkpoint-<step>."""
    return int(folder.name.split("-")[1])


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """The file of a checkpoint that is missing or not as it was written, with what is wrong; None: it is whole."""
    try:
        manifest = atomic.read_json(folder / MANIFEST)
        if manifest["sha256"] != _digest(manifest):
            return f"{folder / MANIFEST} is damaged"
    except (UserError, TypeError, KeyError):
        return f"{folder / MANIFEST} is missing or damaged"
    for name, facts in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{folder / name} is damaged ({size} bytes instead of {facts['bytes']})"
            if atomic.sha256(folder / name) != facts["sha256"]:
                return f"{folder / name} is damaged (other bytes than were written)"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
    return None


def write_checkpoint(
    folder: Path, encoder: Encoder, weights: dict[str, Tensor], state: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        folder: checkpoint-<step>; an earlier one of that name is replaced.
        encoder: gives all but the weights.
        weights: the encoder's state dict.
        state: what `load_checkpoint` shall give back.
        manifest: gets the size and SHA-256 of every file, and its own.

    Raises:
        OSError: names `folder`, not the temporary one.
    """
    try:
        with atomic.atomic_path(folder) as temporary:
            encoder.save(temporary, weights)
            try:
                torch.save(state, temporary / STATE_FILE)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{temporary / STATE_FILE}: {error}") from None
            files = {
                str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": atomic.sha256(file)}
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            manifest = manifest | {"files": files}
            atomic.write_json(temporary / MANIFEST, manifest | {"sha256": _digest(manifest)})
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
        first_step: that the run goes on from.

    Attributes:
        newest: the step of the newest checkpoint in the folder, of the last `save` or of `first_step`; 0: none yet.
    """

    def __init__(
        self, output_dir: Path, encoder: Encoder, manifest: dict[str, Any], limit: int | None, first_step: int = 0
    ) -> None:
        self.output_dir, self.manifest, self.limit = output_dir, manifest, limit
        # A tokenizer of its own: saving changes it, while the loop goes on using the other.
        tokenizer = copy_tokenizer(encoder.tokenizer)
        self.encoder = Encoder(encoder.backbone, tokenizer, encoder.settings, dense=encoder.dense)
        self.newest = first_step if (output_dir / f"checkpoint-{first_step}").is_dir() else 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: dict[str, Any], keep: str | None = None) -> None:
        """Take a copy and begin to write checkpoint-<step>, once the one before is written. Every rank calls it.

        Args:
            step: optimizer steps done.
            state: what `load_checkpoint` shall give back, beside the step and the random state of each rank.
            keep: name of a checkpoint that pruning leaves.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self.newest = step
        random_states = gather_objects(random_state())
        weights = whole_copy(self.encoder.state_dict())
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
