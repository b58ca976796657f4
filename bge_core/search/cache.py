"""Vectors kept on disk by content: a text that was encoded once is read, and the vectors of millions are one array.

    <folder>/<collection>/collection.json              what the vectors are of, for people
    <folder>/<collection>/<hash of keys>.safetensors   a shard: keys (n, 16) uint8, vectors (n, D), their checksum

A collection is named by a hash of whatever determines a vector but the text: model, prompt, length, precision, dtype. A
text is known by the hash of its characters, so of a changed corpus only what is new is encoded. Shards are cut from the
list of new texts in their order; each is encoded by itself, and written whole when it is finished. So a run that was
killed has lost one shard at most, and started again it writes the same bytes as an unbroken one.

Of several processes rank 0 alone looks into the folder and writes; the others open the files that it names.

Shapes: N texts, M distinct texts, n texts of a shard, D embedding size.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.numpy import save

from bge_core import UserError
from bge_core.encoder.encode import encode_for_search
from bge_core.encoder.fingerprint import fingerprint
from bge_core.files import atomic
from bge_core.runtime.distributed import gather_objects, on_main, world

logger = logging.getLogger(__name__)

VERSION = 1  # to be raised when `encode` makes other vectors of the same model and text
KEY = "S16"
DESCRIPTION = "collection.json"
File = tuple[str, str]  # name and checksum
_COLLECTION = re.compile(r"[0-9a-f]{16}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError)  # what reading bytes that are no shard may raise


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """(N,) keys of 16 bytes: blake2b of the exact characters."""
    keys = (blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.fromiter(keys, dtype=KEY, count=len(texts))


@dataclass(frozen=True)
class _Shard:
    """One file, mapped into memory."""

    checksum: str
    key_n: np.ndarray
    vector_nD: np.ndarray

    @classmethod
    def open(cls, path: Path, dim: int, dtype: str) -> "_Shard":
        """Raises one of _DAMAGE where the file is no shard; whether the checksum is right has yet to be seen."""
        # A memory map of numpy's keeps its file open, and a process may have about 1,000 open files.
        raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
        raw.flags.writeable = False
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        key_n, data = (raw[start:][slice(*header[name]["data_offsets"])] for name in ("keys", "vectors"))
        key_n = key_n.view(KEY)
        return cls(header["__metadata__"]["checksum"], key_n, data.view(dtype).reshape(len(key_n), dim))

    def verify(self, collection: str) -> "_Shard":
        """Itself; ValueError where a bit is wrong, or the shard belongs to another collection."""
        if self.checksum != _checksum(collection, self.key_n, self.vector_nD):
            raise ValueError("its checksum is wrong")
        return self

    def find(self, wanted_M: np.ndarray, place_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the (sorted) wanted keys that have no place yet are here, and in which rows."""
        found_n = np.searchsorted(wanted_M, self.key_n)
        found_n[found_n == len(wanted_M)] = 0
        rows = np.flatnonzero((wanted_M[found_n] == self.key_n) & (place_M[found_n] < 0))
        return found_n[rows], rows


def _checksum(collection: str, key_n: np.ndarray, vector_nD: np.ndarray) -> str:
    digest = xxhash.xxh3_128(collection.encode() + key_n.tobytes())
    digest.update(np.ascontiguousarray(vector_nD).data)
    return digest.hexdigest()


class CachedVectors:
    """(N, D) vectors that lie in memory-mapped shards: read only, and read where they are asked for.

    Rows are chosen as in numpy, by a number, a slice or an array of row numbers of any shape; columns are not. Rows
    that follow each other in one shard come as a view, others as a copy.

    Args:
        shards: (n, D) arrays.
        place_N: of each text its row, counted through the shards.
        dim: D.
        dtype: of the vectors.
    """

    ndim = 2

    def __init__(self, shards: Sequence[np.ndarray], place_N: np.ndarray, dim: int, dtype: str) -> None:
        self.shape, self.dtype = (len(place_N), dim), np.dtype(dtype)
        self._shards, self._place_N = shards, place_N
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = np.asarray(self._place_N[rows])
        place, shape = chosen.reshape(-1), (*chosen.shape, self.shape[1])
        if not len(place):
            return np.empty(shape, dtype=self.dtype)
        shard = np.searchsorted(self._starts, place, side="right") - 1
        row = place - self._starts[shard]
        # Runs of rows that follow each other in one shard.
        begins = np.flatnonzero((np.diff(place, prepend=-2) != 1) | (np.diff(shard, prepend=-1) != 0))
        lengths = np.diff(begins, append=len(place))
        runs = zip(shard[begins].tolist(), row[begins].tolist(), lengths.tolist(), strict=True)
        vectors = [self._shards[i][first : first + length] for i, first, length in runs]
        return (vectors[0] if len(vectors) == 1 else np.concatenate(vectors)).reshape(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        vectors = np.asarray(self[:], dtype=dtype)
        return vectors.copy() if copy and not vectors.flags.writeable else vectors


class EmbeddingCache:
    """A folder of vectors, for any number of models and settings, also of several runs at the same time.

    Every rank makes one, after the process group has started, and calls it with the same arguments.

    Args:
        folder: made if needed.
        shard_size: texts of a shard, and so the most that a killed run loses.
        dtype: "float32" or "float16", of the vectors in the files.

    Attributes:
        num_encoded, num_reused: distinct texts that were new, and that were there, over all calls.
        used: names of the collections of all calls.

    Raises:
        UserError: the folder is a file or cannot be written.
    """

    def __init__(self, folder: str | Path, shard_size: int = 4096, dtype: str = "float32") -> None:
        if shard_size < 1 or dtype not in ("float32", "float16"):
            raise UserError(f"shard_size={shard_size}, dtype={dtype!r}: use 1 or more, and float32 or float16")
        self.folder, self.shard_size, self.dtype = Path(folder), shard_size, dtype
        self.num_encoded, self.num_reused, self.used = 0, 0, set[str]()
        on_main(lambda: atomic.refuse_unwritable(self.folder))

    def vectors(
        self,
        encoder: Any,
        texts: Sequence[str],
        *,
        prompt: str = "",
        max_length: int = 512,
        precision: str = "no",
        batch_size: int | None = None,
        max_tokens: int | None = None,
        description: str = "encode",
    ) -> CachedVectors:
        """Vectors of all texts, on every rank; what is new is encoded, each distinct text once, and kept.

        Args: of `encode.encode_for_search`. `batch_size` and `max_tokens` change last bits only: a collection has all.

        Returns:
            (N, D) in input order, in the cache's dtype.

        Raises:
            UserError: a vector is not finite, in float32 or in the cache's dtype; the disk is full; a rank does not
                see the files of rank 0. Shards that were finished before stay.
        """
        dim, max_length = encoder.embedding_size, min(max_length, encoder.max_length)
        folder = self.folder / on_main(lambda: self._prepare(encoder, prompt, max_length, precision))
        self.used.add(folder.name)
        key_N = text_keys(texts)
        wanted_M, first_M, number_N = np.unique(key_N, return_index=True, return_inverse=True)
        place_M = np.full(len(wanted_M), -1, dtype=np.int64)
        shards: list[np.ndarray] = []

        def add(files: list[File]) -> None:
            for shard in self._open_everywhere(folder, files, dim):
                found, rows = shard.find(wanted_M, place_M)
                place_M[found] = sum(map(len, shards)) + rows
                shards.append(shard.vector_nD)

        if len(texts):
            add(on_main(lambda: self._find(folder, wanted_M, dim)))
        new = np.sort(first_M[place_M < 0])
        self.num_reused += len(wanted_M) - len(new)
        for start in range(0, len(new), self.shard_size):
            part = new[start : start + self.shard_size]
            vector_nD = encode_for_search(
                encoder,
                [texts[i] for i in part],
                prompt=prompt,
                max_length=max_length,
                batch_size=batch_size,
                max_tokens=max_tokens,
                precision=precision,
                description=f"{description} ({start:,} of {len(new):,})",
            )
            add([on_main(partial(self._write, folder, key_N[part], vector_nD))])
            self.num_encoded += len(part)
        assert (place_M >= 0).all()
        return CachedVectors(shards, place_M[number_N], dim, self.dtype)

    def _prepare(self, encoder: Any, prompt: str, max_length: int, precision: str) -> str:
        """The name of the collection, whose folder and description are there from now on."""
        settings = {
            "pooling": encoder.settings.pooling,
            "normalize": encoder.settings.normalize,
            "prompt": prompt,
            "max_length": max_length,
            "precision": precision,
            "dtype": self.dtype,
            "dimension": encoder.embedding_size,
            "fingerprint": fingerprint(encoder),
            "version": VERSION,
        }
        name = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        model = getattr(encoder.backbone.config, "_name_or_path", None) or None
        atomic.write_json(self.folder / name / DESCRIPTION, {"model": model, **settings})
        return name

    def _find(self, folder: Path, wanted_M: np.ndarray, dim: int) -> list[File]:
        """The shards, all of them sound, that hold what is wanted."""
        useful: list[File] = []
        damaged: list[str] = []
        place_M = np.full(len(wanted_M), -1)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                shard = _Shard.open(path, dim, self.dtype)
                found, rows = shard.find(wanted_M, place_M)
                if len(rows):
                    useful.append((path.name, shard.verify(folder.name).checksum))
                    place_M[found] = rows
            except _DAMAGE as error:
                damaged.append(f"{path} ({error})")
        if damaged:
            logger.warning(
                "%d files are damaged, or not of this cache, and count for nothing: their texts are encoded again, and "
                "they may be deleted. The first is %s",
                len(damaged),
                damaged[0],
            )
        return useful

    def _write(self, folder: Path, key_n: np.ndarray, vector_nD: np.ndarray) -> File:
        """The shard of these texts, which is there from now on."""
        path = folder / f"{blake2b(key_n.tobytes(), digest_size=16).hexdigest()}.safetensors"
        with suppress(*_DAMAGE):  # another run may have written it meanwhile, with other last bits, and read it now
            return path.name, _Shard.open(path, vector_nD.shape[1], self.dtype).verify(folder.name).checksum
        with np.errstate(over="ignore"):
            vector_nD = vector_nD.astype(self.dtype, copy=False)
        if not np.isfinite(vector_nD).all():
            raise UserError(f"dtype {self.dtype}: the vectors of this model hold larger numbers; use float32")
        checksum = _checksum(folder.name, key_n, vector_nD)
        tensors = {"keys": key_n.view(np.uint8).reshape(-1, 16), "vectors": vector_nD}
        with atomic.atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"checksum": checksum}))
        return path.name, checksum

    def _open_everywhere(self, folder: Path, files: list[File], dim: int) -> list[_Shard]:
        """The shards, the same on every rank; UserError on all ranks where one does not see them."""
        shards, problem = [], None
        try:
            for name, checksum in files:
                shards.append(_Shard.open(folder / name, dim, self.dtype))
                if shards[-1].checksum != checksum:
                    raise ValueError(f"{folder / name} is another file than on rank 0")
        except _DAMAGE as error:
            problem = f"rank {world()[0]} does not find what rank 0 has there ({error})"
        for found in filter(None, gather_objects(problem)):
            raise UserError(f"--embedding_cache_dir {self.folder}: must lie where all nodes see it, but {found}")
        return shards


def _collections(folder: str | Path) -> list[Path]:
    """The collections of a cache, and nothing else that lies there; no symbolic link."""
    found = [path.parent for path in sorted(Path(folder).glob(f"*/{DESCRIPTION}"))]
    return [path for path in found if _COLLECTION.fullmatch(path.name) and not path.is_symlink()]


def cache_summary(folder: str | Path) -> list[dict[str, Any]]:
    """Of each collection of a cache its name, the model, the number of texts and the bytes."""
    entries = []
    for collection in _collections(folder):
        described, num_texts = atomic.read_json(collection / DESCRIPTION), 0
        files = list(collection.glob("*.safetensors"))
        for file in files:
            with suppress(*_DAMAGE):  # what is damaged holds none
                num_texts += len(_Shard.open(file, described["dimension"], described["dtype"]).key_n)
        num_bytes = sum(file.stat().st_size for file in files)
        entries.append(
            {"collection": collection.name, "model": described["model"], "texts": num_texts, "bytes": num_bytes}
        )
    return entries


def clean_cache(folder: str | Path, keep: Collection[str] = ()) -> int:
    """Remove the collections of a cache but those that are named; not while another run uses them.

    Returns:
        The number of bytes that were removed.
    """
    num_bytes = 0
    for collection in _collections(folder):
        if collection.name not in keep:
            num_bytes += sum(file.lstat().st_size for file in collection.iterdir())
            shutil.rmtree(collection)
    return num_bytes
