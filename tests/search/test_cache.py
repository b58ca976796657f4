"""The cache of vectors: found by content, never wrong after damage or a kill, and as good as an array for the search."""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_kill_drill as drill
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import bge_core.search.cache as cache_module
from bge_core import UserError
from bge_core.encoder.encode import encode
from bge_core.encoder.fingerprint import fingerprint
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.search.cache import CachedVectors, EmbeddingCache, cache_summary, clean_cache, text_keys
from bge_core.search.exact import exact_search

TEXTS = [
    "信用卡怎么申请？",
    "",
    "loan",
    "快递" * 40,
    "卡",
    "快递",
    "loan",
    *(f"第{i}号" * (i % 9 + 1) for i in range(20)),
]
NUM_DISTINCT = len(set(TEXTS))


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return load_encoder(tiny_bert)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of `encode`."""
    calls: list[list[str]] = []

    def record(encoder: Any, texts: list[str], **options: Any) -> np.ndarray:
        calls.append(texts)
        return encode(encoder, texts, **options)

    monkeypatch.setattr(cache_module, "encode_for_search", record)
    return calls


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def sharded(
    rng: np.random.Generator, sizes: list[int], num: int, dim: int, dtype: str
) -> tuple[CachedVectors, np.ndarray]:
    """A view of `num` random rows of random shards, and the array that it must equal; a row may come twice."""
    parts = [rng.standard_normal((size, dim)).astype(dtype) for size in sizes]
    places = rng.integers(0, sum(sizes), num)
    if num > 8:
        places[: num // 2] = np.arange(num // 2) % sum(sizes)  # runs, some across shards
    return CachedVectors(parts, places, dim, dtype), np.concatenate(parts)[places]


# ------------------------------------------------------------------------------------------------- found, or encoded


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 1e-3)])
def test_vectors_are_those_of_encode(dtype: str, atol: float, encoder: Encoder, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, 4, dtype)
    vectors = cache.vectors(encoder, TEXTS, prompt="问：", max_length=20, batch_size=3)
    assert (
        vectors.shape == (len(TEXTS), 32)
        and vectors.ndim == 2
        and vectors.dtype == dtype
        and len(vectors) == len(TEXTS)
    )
    np.testing.assert_allclose(vectors, encode(encoder, TEXTS, prompt="问：", max_length=20), atol=atol)
    assert (cache.num_encoded, cache.num_reused) == (NUM_DISTINCT, 0)


def test_shards_are_cut_from_the_new_texts_in_order(encoder: Encoder, encoded: list[list[str]], tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, 10).vectors(encoder, TEXTS)
    distinct = list(dict.fromkeys(TEXTS))
    assert encoded == [distinct[:10], distinct[10:20], distinct[20:]]
    by_keys = {load_file(path)["keys"].tobytes(): load_file(path)["vectors"] for path in shards(tmp_path)}
    for texts in encoded:
        assert by_keys[text_keys(texts).tobytes()].tobytes() == encode(encoder, texts).tobytes()


def test_a_changed_corpus_encodes_what_is_new(encoder: Encoder, encoded: list[list[str]], tmp_path: Path) -> None:
    first = np.asarray(EmbeddingCache(tmp_path, 10).vectors(encoder, TEXTS))
    encoded.clear()
    cache = EmbeddingCache(tmp_path, 7)
    assert np.asarray(cache.vectors(encoder, TEXTS[::-1])).tobytes() == first[::-1].tobytes()
    assert encoded == [] and (cache.num_encoded, cache.num_reused) == (0, NUM_DISTINCT)
    changed = ["新的", *TEXTS[3:], "卡 ", "新的", "新的二", *TEXTS[:3]]  # a space makes another text
    vectors = cache.vectors(encoder, changed)
    assert encoded == [["新的", "卡 ", "新的二"]]
    assert vectors[1:-6].tobytes() == first[3:].tobytes() and vectors[-3:].tobytes() == first[:3].tobytes()
    np.testing.assert_allclose(vectors, encode(encoder, changed), atol=1e-6)
    assert (cache.num_encoded, cache.num_reused) == (3, 2 * NUM_DISTINCT)


def test_a_text_in_two_shards_is_read_from_the_first(encoder: Encoder, tmp_path: Path) -> None:
    def fill(folder: Path, texts: list[str], value: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                cache_module,
                "encode_for_search",
                lambda encoder, texts, **_: np.full((len(texts), 32), value, "float32"),
            )
            EmbeddingCache(folder, 10).vectors(encoder, texts)

    texts = list(dict.fromkeys(TEXTS))
    for number, part in enumerate((texts[:10], texts[5:15], texts[:10:-1])):
        fill(tmp_path / str(number), part, number)
        shutil.copytree(tmp_path / str(number), tmp_path / "all", dirs_exist_ok=True)
    want = {}
    for path in shards(tmp_path / "all")[::-1]:
        tensors = load_file(path)
        want.update(zip(tensors["keys"].view("S16")[:, 0].tolist(), tensors["vectors"].tolist(), strict=True))
    cache = EmbeddingCache(tmp_path / "all")
    vectors = cache.vectors(encoder, texts)
    assert cache.num_encoded == 0
    assert vectors[:].tolist() == [want[key] for key in text_keys(texts).tolist()]


def test_keys_are_of_the_exact_text() -> None:
    texts = ["a", "A", "a ", "ａ", "", " ", "\x00", "\x00\x00", "é", "e\u0301", "\ud800", "\udfff"]
    keys = text_keys(texts)
    assert keys.dtype == "S16" and len(set(keys.tolist())) == len(texts)
    assert keys.tobytes() == b"".join(text_keys([text]).tobytes() for text in texts)  # also those that end in zeros


def test_a_collection_is_of_one_model_and_one_way_to_encode(encoder: Encoder, tiny_bert: Path, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    other = load_encoder(tiny_bert, normalize=False)
    for settings in ({}, {"prompt": "问："}, {"max_length": 8}, {"precision": "bf16"}):
        np.testing.assert_allclose(
            cache.vectors(encoder, TEXTS, **settings), encode(encoder, TEXTS, **settings), atol=1e-6
        )
    np.testing.assert_allclose(cache.vectors(other, TEXTS), encode(other, TEXTS), atol=1e-5)
    EmbeddingCache(tmp_path, dtype="float16").vectors(encoder, TEXTS)
    assert len(cache.used) == 5 and len(list(tmp_path.iterdir())) == 6
    cache.vectors(encoder, TEXTS, max_length=512)
    cache.vectors(encoder, TEXTS, max_length=10_000, batch_size=2, max_tokens=100)  # the model takes 512
    assert len(cache.used) == 5 and len(list(tmp_path.iterdir())) == 6
    described = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*/collection.json")]
    (found,) = [one for one in described if one["prompt"]]
    assert found == {
        "model": str(tiny_bert), "pooling": "cls", "normalize": True, "prompt": "问：", "max_length": 512,
        "precision": "no", "dtype": "float32", "dimension": 32, "fingerprint": fingerprint(encoder), "version": 1,
    }  # fmt: skip


def test_no_texts(encoder: Encoder, tmp_path: Path) -> None:
    vectors = EmbeddingCache(tmp_path).vectors(encoder, [])
    assert vectors.shape == (0, 32) and np.asarray(vectors).shape == (0, 32) and len(vectors) == 0
    assert exact_search(vectors, vectors, 3)[0].shape == (0, 3)


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a vector": lambda path: flip(path, len(path.read_bytes()) // 2),
    "a key": lambda path: flip(path, -20),
    "the header": lambda path: flip(path, 30),
    "its length": lambda path: flip(path, 1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("[" * 10_000),
    "a JSON list": lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_encoded_again(
    name: str, encoder: Encoder, encoded: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = np.asarray(EmbeddingCache(tmp_path, 10).vectors(encoder, TEXTS))
    whole = drill.files(tmp_path)
    damaged = shards(tmp_path)[1]
    DAMAGES[name](damaged)
    for path in shards(tmp_path):
        assert (path.read_bytes() == whole[str(path.relative_to(tmp_path))]) == (path != damaged)
    encoded.clear()
    vectors = EmbeddingCache(tmp_path, 10).vectors(encoder, TEXTS)
    (record,) = caplog.records
    assert (
        record.levelno == logging.WARNING and str(damaged) in record.getMessage() and "1 files" in record.getMessage()
    )
    assert vectors[:].tobytes() == want.tobytes() and len(encoded) == 1
    assert drill.files(tmp_path) == whole  # the new shard stands in the damaged one's place
    caplog.clear()
    EmbeddingCache(tmp_path, 10).vectors(encoder, TEXTS)
    assert not caplog.records


def test_every_flipped_bit_and_every_cut_is_seen(encoder: Encoder, tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).vectors(encoder, TEXTS[:2])
    (path,) = shards(tmp_path)
    content, name = path.read_bytes(), path.parent.name
    want = cache_module._Shard.open(path, 32, "float32").verify(name)
    broken = tmp_path / "broken"
    for changed in [content[:end] for end in range(len(content))] + [
        content[:i] + bytes([content[i] ^ 1 << (i % 8)]) + content[i + 1 :] for i in range(len(content))
    ]:
        broken.unlink(missing_ok=True)
        broken.write_bytes(changed)
        try:
            shard = cache_module._Shard.open(broken, 32, "float32").verify(name)
        except cache_module._DAMAGE:
            continue
        assert shard.key_n.tobytes() == want.key_n.tobytes() and shard.vector_nD.tobytes() == want.vector_nD.tobytes()


def test_foreign_shards_are_ignored(
    encoder: Encoder, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = np.asarray(EmbeddingCache(tmp_path / "cache", 10).vectors(encoder, TEXTS))
    (ours,) = (tmp_path / "cache").iterdir()
    EmbeddingCache(tmp_path / "other", 27).vectors(load_encoder(tiny_bert, normalize=False), TEXTS)
    (foreign,) = shards(tmp_path / "other")
    shutil.copy(foreign, ours / f"{0:032}.safetensors")  # sound, of the same texts, and sorted to the front
    shutil.copy(tiny_bert / "model.safetensors", ours)
    (ours / "folder.safetensors").mkdir()
    assert EmbeddingCache(tmp_path / "cache").vectors(encoder, TEXTS)[:].tobytes() == want.tobytes()
    (record,) = caplog.records
    assert "3 files" in record.getMessage() and f"{0:032}.safetensors" in record.getMessage()


def test_a_damaged_description_is_written_again(encoder: Encoder, encoded: list[list[str]], tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.vectors(encoder, TEXTS)
    (file,) = tmp_path.glob("*/collection.json")
    want = file.read_bytes()
    for damage in (b"", b"{", b"[1]", b"null", b'"text"', b"\xff"):
        file.write_bytes(damage)
        cache.vectors(encoder, TEXTS)
        assert file.read_bytes() == want
    assert len(encoded) == 1


# ------------------------------------------------------------------------------------------------------------ the view


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    num=st.integers(0, 30),
    dtype=st.sampled_from(["float32", "float16"]),
    data=st.data(),
)
def test_the_view_is_read_like_an_array(seed: int, sizes: list[int], num: int, dtype: str, data: st.DataObject) -> None:
    view, array = sharded(np.random.default_rng(seed), sizes, num, 3, dtype)
    bound = st.none() | st.integers(-num - 2, num + 2)
    rows: list[Any] = [slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, -1]))), []]
    if num:
        index = st.integers(-num, num - 1)
        rows += [data.draw(index), data.draw(st.lists(index, min_size=1)), np.array(data.draw(index))]
        rows += [np.array([[data.draw(index) for _ in range(4)] for _ in range(2)]), np.arange(num) % 2 == 0]
    for chosen in rows:
        found = view[chosen]
        assert found.dtype == array.dtype and found.shape == array[chosen].shape
        assert found.tobytes() == array[chosen].tobytes()
    assert view.shape == array.shape and np.asarray(view).tobytes() == array.tobytes()
    assert np.asarray(view, dtype=np.float64).dtype == np.float64
    with pytest.raises(IndexError):
        view[num]


def test_consecutive_rows_of_a_shard_are_not_copied() -> None:
    parts = [np.zeros((5, 3), dtype=np.float32), np.ones((4, 3), dtype=np.float32)]
    view = CachedVectors(parts, np.arange(9), 3, "float32")
    assert np.shares_memory(view[1:4], parts[0]) and np.shares_memory(view[[5, 6]], parts[1])
    assert view[3:7].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    parts[0].flags.writeable = False
    assert np.array(CachedVectors(parts[:1], np.arange(5), 3, "float32")).flags.writeable


def test_vectors_are_read_only_and_keep_no_file_open(encoder: Encoder, tmp_path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    before = num_open()
    vectors = EmbeddingCache(tmp_path, 1).vectors(encoder, TEXTS)
    assert len(shards(tmp_path)) == NUM_DISTINCT and num_open() <= before + 2
    with pytest.raises(ValueError, match="read-only"):
        vectors[3][0] = 1
    kept = vectors[3].copy()
    shutil.rmtree(tmp_path)  # a run goes on without the folder
    assert vectors[3].tobytes() == kept.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("memory_mb", [0.001, 0.05, 512])
def test_exact_search_reads_the_view_as_the_array(memory_mb: float, dtype: str) -> None:
    rng = np.random.default_rng(3)
    corpus, corpus_array = sharded(rng, [40, 1, 90, 60], 300, 8, dtype)
    queries, query_array = sharded(rng, [9, 8], 25, 8, dtype)
    found = exact_search(queries, corpus, 10, memory_mb=memory_mb)  # type: ignore[arg-type]
    want = exact_search(query_array, corpus_array, 10, memory_mb=memory_mb)
    assert found[0].tobytes() == want[0].tobytes() and found[1].tobytes() == want[1].tobytes()


def test_exact_search_reads_a_cache(encoder: Encoder, tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, 5).vectors(encoder, TEXTS[::3])
    vectors = EmbeddingCache(tmp_path, 5).vectors(encoder, TEXTS)
    for memory_mb in (0.001, 512):
        found = exact_search(vectors, vectors, 5, memory_mb=memory_mb)  # type: ignore[arg-type]
        want = exact_search(np.asarray(vectors), np.asarray(vectors), 5, memory_mb=memory_mb)
        assert found[0].tobytes() == want[0].tobytes() and found[1].tobytes() == want[1].tobytes()


# -------------------------------------------------------------------------------------------- killed, together, failing


def test_three_kills(tiny_bert: Path, tmp_path: Path) -> None:
    assert drill.kill_and_start_again(tiny_bert, tmp_path, num_kills=3, seed=1)["kills"] >= 3


@pytest.mark.slow
def test_twenty_kills(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("DRILL_SEED", "0"))
    counts = drill.kill_and_start_again(tiny_bert, tmp_path, num_kills=20, seed=seed)
    assert counts["kills"] >= 20 and counts["between"] >= 10
    with capsys.disabled():
        print(f"\nkilled while the cache was filled: {counts}", file=sys.stderr)


def test_two_ranks_write_what_one_writes(tiny_bert: Path, tmp_path: Path) -> None:
    assert drill.finish(drill.fill(tiny_bert, tmp_path / "one", tmp_path / "one")) == [0]
    want = np.load(tmp_path / "one.0.npz")["vectors"].tobytes()
    for num_encoded in (len(drill.TEXTS), 30, 0):
        if num_encoded == 30:
            for path in shards(tmp_path / "two")[::4]:
                path.unlink()
        ranks = drill.fill_with_two_ranks(tiny_bert, [tmp_path / "two"] * 2, tmp_path / "two")
        assert drill.finish(*ranks) == [0, 0]
        assert drill.files(tmp_path / "two") == drill.files(tmp_path / "one")
        for rank in range(2):
            result = np.load(tmp_path / f"two.{rank}.npz")
            assert result["vectors"].tobytes() == want and result["encoded"] == num_encoded


@pytest.mark.parametrize("there", ["nothing", "shards", "other shards"])
def test_ranks_that_do_not_see_one_folder_say_so(there: str, tiny_bert: Path, tmp_path: Path) -> None:
    if there != "nothing":
        assert drill.finish(drill.fill(tiny_bert, tmp_path / "one", tmp_path / "one")) == [0]
    if there == "other shards":  # of the same texts, and sound, had their vectors other bits
        shutil.copytree(tmp_path / "one", tmp_path / "other")
        path = shards(tmp_path / "other")[7]
        path.write_bytes(re.sub(rb'(?<="checksum":").{8}', b"01234567", path.read_bytes()))
    ranks = drill.fill_with_two_ranks(tiny_bert, [tmp_path / "one", tmp_path / "other"], tmp_path / "two")
    assert drill.finish(*ranks) == [2, 2]
    for rank in range(2):
        message = (tmp_path / f"two.{rank}.error").read_text(encoding="utf-8")
        assert message.startswith("--embedding_cache_dir ") and "must lie where all nodes see it, but rank 1" in message


def test_two_runs_fill_one_cache_at_the_same_time(tiny_bert: Path, tmp_path: Path) -> None:
    runs = [drill.fill(tiny_bert, tmp_path / "cache", tmp_path / name) for name in ("a", "b", "c")]
    assert drill.finish(*runs) == [0, 0, 0]
    assert drill.finish(drill.fill(tiny_bert, tmp_path / "alone", tmp_path / "alone")) == [0]
    want = np.load(tmp_path / "alone.0.npz")["vectors"]
    for name in ("a", "b", "c"):  # who comes late finds some shards, and cuts the rest elsewhere
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.0.npz")["vectors"], want, atol=1e-6)
    assert not list(tmp_path.rglob(".*"))


def test_a_shard_that_another_run_wrote_meanwhile_stays(encoder: Encoder, tmp_path: Path) -> None:
    EmbeddingCache(tmp_path / "other").vectors(encoder, TEXTS, batch_size=1)
    (other,) = shards(tmp_path / "other")

    def meanwhile(*arguments: Any, **options: Any) -> np.ndarray:
        shutil.copy(other, tmp_path / "cache" / other.parent.name)
        return encode(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "encode_for_search", meanwhile)
        vectors = EmbeddingCache(tmp_path / "cache").vectors(encoder, TEXTS)
    assert shards(tmp_path / "cache")[0].read_bytes() == other.read_bytes()
    np.testing.assert_allclose(vectors, encode(encoder, TEXTS), atol=1e-6)


def test_a_broken_model_leaves_the_shards_before(tiny_bert: Path, tmp_path: Path) -> None:
    broken = load_encoder(tiny_bert)
    with torch.no_grad():
        broken.backbone.embeddings.word_embeddings.weight[broken.tokenizer.convert_tokens_to_ids("卡")] = float("nan")
    texts = ["快递", "loan", "退款", "信用卡", "酒店"]
    cache = EmbeddingCache(tmp_path, 2)
    with pytest.raises(UserError, match="NaN for 1 of 2 texts, first '信用卡'"):
        cache.vectors(broken, texts)
    assert len(shards(tmp_path)) == 1 and cache.num_encoded == 2
    cache.vectors(broken, texts[:2])
    assert cache.num_reused == 2 and not list(tmp_path.rglob(".*"))


def test_numbers_too_large_for_float16_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_bert, normalize=False)
    with torch.no_grad():
        encoder.backbone.encoder.layer[1].output.LayerNorm.weight *= 1e6
    with pytest.raises(UserError, match="dtype float16: .*use float32"):
        EmbeddingCache(tmp_path, dtype="float16").vectors(encoder, TEXTS)
    assert shards(tmp_path) == []


def test_a_full_disk_leaves_the_shards_before(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def third_fails(path: Path, content: bytes) -> int:
        written.append(path)
        write(path, content[: len(content) // 2] if len(written) == 3 else content)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", third_fails)
    with pytest.raises(UserError, match="No space left on device"):
        EmbeddingCache(tmp_path, 4).vectors(encoder, TEXTS)
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.rglob(".*"))
    cache = EmbeddingCache(tmp_path, 4)
    cache.vectors(encoder, TEXTS)
    assert cache.num_reused == 8


@pytest.mark.parametrize("below", ["", "below"])
def test_a_folder_that_cannot_be_one(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        EmbeddingCache(tmp_path / "file" / below)


@pytest.mark.parametrize("settings", [{"shard_size": 0}, {"dtype": "bfloat16"}])
def test_settings_that_make_no_sense(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use 1 or more, and float32 or float16"):
        EmbeddingCache(tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- summary, cleaning


@pytest.fixture
def two_collections(encoder: Encoder, tmp_path: Path) -> tuple[Path, str, str]:
    """A cache, and the names of its two collections: without a prompt, and with one."""
    names = []
    for prompt in ("", "问："):
        cache = EmbeddingCache(tmp_path / "cache", 10)
        cache.vectors(encoder, TEXTS, prompt=prompt)
        names += cache.used
    return tmp_path / "cache", names[0], names[1]


def test_summary(two_collections: tuple[Path, str, str], tiny_bert: Path) -> None:
    folder, first, second = two_collections
    (folder / "notes.txt").touch()
    (folder / second / f"{0:032}.safetensors").write_bytes(b"damaged")
    num_bytes = sum(path.stat().st_size for path in (folder / first).glob("*.safetensors"))
    found = cache_summary(folder)
    assert found == [
        {"collection": name, "model": str(tiny_bert), "texts": NUM_DISTINCT, "bytes": num_bytes + 7 * (name == second)}
        for name in sorted((first, second))
    ]


def test_cleaning_removes_other_collections_and_nothing_else(two_collections: tuple[Path, str, str]) -> None:
    folder, first, second = two_collections
    outside = folder.parent / "outside"
    shutil.copytree(folder / second, outside)
    (folder / "0123456789abcdef").symlink_to(outside)
    (folder / "fedcba9876543210").mkdir()  # no collection
    (folder / "Flat-0123.faiss").write_text("mine")
    num_bytes = sum(path.stat().st_size for path in (folder / first).iterdir())
    kept = {name: content for name, content in drill.files(folder).items() if not name.startswith(first)}
    assert clean_cache(folder, keep={second}) == num_bytes
    assert drill.files(folder) == kept and not (folder / first).exists() and len(drill.files(outside)) == 4
    assert clean_cache(folder, keep={second}) == 0
    clean_cache(folder)
    assert not (folder / second).exists() and (folder / "Flat-0123.faiss").exists() and len(drill.files(outside)) == 4
