"""Folders of the families of zoo.py through every stage: as sentence-transformers has them, or refused in a sentence.

What sentence-transformers makes of each is in golden/zoo.json. The tables of docs/model-folders.md are what happens here.
"""

import ast
import contextlib
import functools
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from batches import gradients_of
from runs import flags, reset
from torch.nn import functional as F

import evaluate
import merge
import mine
import train
from bge_core import UserError
from bge_core.encoder import packing
from bge_core.encoder.fixed import FixedRows
from bge_core.encoder.load import load_encoder
from bge_core.encoder.model import Encoder
from bge_core.encoder.tokens import Tokens, tokenize
from bge_core.mining import files as mining_files

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/zoo.json").read_text(encoding="utf-8"))["families"]
TOLERANCE = 1e-6  # of vectors of length 1; of longer ones relative to their largest entry
NEAREST = 5  # mined passages of each question
PADDED = {"gte-multilingual", "stella-en-v5", "jina-v2-zh", "nomic-v1.5", "all-mpnet", "RoFormer", "SGPT"}


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else."""
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    monkeypatch.setattr(mining_files, "write_mining_report", lambda *_, **__: [])


@dataclass
class Case:
    """One family's folder, a sister of other weights, and where its stages write."""

    name: str
    root: Path

    def __post_init__(self) -> None:
        self.family, self.golden = zoo.FAMILIES[self.name], GOLDEN.get(self.name, {})
        self.folder = zoo.make_folder(self.name, self.root / "model")
        self.rows, self.corpus = zoo.write_rows(self.root)
        self.length = self.golden.get("max_length", 64)

    @cached_property
    def trained(self) -> tuple[Path, Any]:
        """The folder after two steps, and the encoder that was trained."""
        reset()
        settings = {"max_steps": 2, "train_group_size": 2, "dataloader_num_workers": 0, "learning_rate": 1e-2}
        settings |= {"query_max_len": self.length, "passage_max_len": self.length}
        words = flags(self.folder, self.rows, self.root / "trained", **settings)
        seen: list[Any] = []
        build = train.build.build_encoder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.build, "build_encoder", lambda *a: seen.append(build(*a)) or seen[-1])
            run(self, train.main, [*words, *self.family.flags, *self.family.training_flags, *self.prompts()])
        return self.root / "trained", seen[0].eval()

    @property
    def loading(self) -> dict[str, Any]:
        """What load_encoder is told of the family's flags."""
        told = dict(zip(self.family.flags[::2], self.family.flags[1::2], strict=False))
        return {"trust_remote_code": bool(self.family.code), "pooling": told.get("--sentence_pooling_method")}

    @property
    def skips(self) -> bool:
        """Whether its pooling leaves prompts out."""
        return any(not module.get("include_prompt", True) for module in self.family.modules or ())

    def prompts(self) -> list[str]:
        """The flags that say the prompts of the family."""
        named = zip(("query", "passage"), self.family.prompts, strict=True)
        return [word for which, text in named for word in (f"--{which}_instruction_for_retrieval", text)]


def run(case: Case, main: Callable[[Sequence[str]], int], words: Sequence[Any]) -> str:
    """What a stage prints. UserError with its message where it refuses, which it must, where the family is refused."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code == 2:
        raise UserError(err.getvalue().split("error: ", 1)[-1].strip())
    assert code == 0 and not case.family.refused, err.getvalue()
    return out.getvalue()


def close(found: Any, expected: Any) -> None:
    """Within TOLERANCE of the largest entry, and at least of 1."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


# ---------------------------------------------------------------------------------------------------------- stages


def encode(case: Case) -> None:
    """Packed and padded."""
    for attention in ("auto", "padded"):
        encoder = load_encoder(case.folder, attention=attention, **case.loading)  # type: ignore[arg-type]
        vectors = encoder.encode(zoo.TEXTS, max_length=case.length)
        assert vectors.shape == (len(zoo.TEXTS), case.golden["dimension"])
        if case.family.modules is not None:  # states nothing: normalized here
            close(vectors[:, : len(case.golden["vectors"][0])], case.golden["vectors"])


def compare_rows(case: Case, encoder: Encoder) -> None:
    """Rows of fixed shape give what rectangles give."""
    encoder.freeze()
    token_lists, results = tokenize(encoder.tokenizer, [*zoo.TEXTS, *case.family.prompts], case.length), []
    tokens = Tokens.from_lists(token_lists, [min(2, len(ids) - 1) for ids in token_lists] if case.skips else None)
    rows = FixedRows("", packing.first_position(encoder.backbone), encoder.tokenizer.pad_token_id, distinct=True)
    for texts in (tokens, rows.row(tokens)):
        vector_SD = encoder.eval()(texts)
        cosine_SS = F.normalize(vector_SD, dim=-1) @ F.normalize(vector_SD, dim=-1).T
        F.cross_entropy(cosine_SS[:3] / 0.05, torch.tensor([3, 4, 5])).backward()
        results.append([vector_SD.detach(), *gradients_of(encoder).values()])
    largest = max(float(gradient.abs().max()) for gradient in results[0][1:])
    bound = 1e-6 if case.name == "EmbeddingGemma" else 1e-9  # its norms compute in float32, whatever they are given
    for got, want in zip(results[1], results[0], strict=True):
        assert float((got - want).abs().max()) < bound * max(float(want.abs().max()), 1e-3 * largest)


def mine_(case: Case) -> None:
    """The nearest passages of each question but its own answer, by the folder's similarity."""
    output = case.root / "mined.jsonl"
    guards = [
        w for g in ("identical", "near_duplicates", "same_questions", "answers") for w in (f"--guard_{g}", "False")
    ]
    words = ["--model_name_or_path", case.folder, "--input_file", case.rows, "--candidate_pool", case.corpus]
    words += ["--output_file", output, "--range_for_sampling", f"0-{NEAREST + 1}", "--negative_number", NEAREST]
    words += ["--sampling", "top", "--query_max_len", case.length, "--passage_max_len", case.length]
    run(case, mine.main, [*words, *guards, *case.family.flags, *case.prompts()])
    mined = [json.loads(line)["neg"] for line in output.read_text(encoding="utf-8").splitlines()]
    for number, (scores, found) in enumerate(zip(case.golden["scores"], mined, strict=True)):
        order = [i for i in np.argsort(scores)[::-1] if i != number][:NEAREST]
        assert found == [zoo.CORPUS[i] for i in order], number


def stated(folder: Path) -> dict[str, Any]:
    """What a folder states for sentence-transformers, whatever version wrote it."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    read: Callable[[str], dict[str, Any]] = lambda file: json.loads((folder / file).read_text(encoding="utf-8"))  # noqa: E731
    configs = []
    for module in modules[1:]:
        file = f"{module['path']}/config.json"
        config = read(file) if (folder / file).exists() else {}
        configs.append(
            {k: v for k, v in config.items() if v not in (False, None) and (k, v) != ("include_prompt", True)}
        )
    root = modules[0]["path"]
    length = (
        read(str(Path(root, "sentence_bert_config.json")))
        if (folder / root / "sentence_bert_config.json").exists()
        else {}
    )
    file = folder / "config_sentence_transformers.json"
    more = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        "modules": [m["type"].rpartition(".")[2] for m in modules],
        "configs": configs,
        "do_lower_case": length.get("do_lower_case", False),
        "prompts": {name: text for name, text in (more.get("prompts") or {}).items() if text},
        "default_prompt_name": more.get("default_prompt_name"),
        "similarity": more.get("similarity_fn_name") or "cosine",
    }


def same_statement(case: Case, folder: Path) -> None:
    """A written folder states what the family's does, has its code, its length, and loads as it is."""
    assert json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    assert set(case.family.code) <= {file.name for file in folder.iterdir()}
    if case.family.modules is None:
        return
    ours, theirs = stated(folder), stated(case.folder)
    query, passage = case.family.prompts
    for name, text in (("query", query), ("passage", passage), ("document", passage)):  # used under the standard names
        if ours["prompts"].get(name) == text:
            theirs["prompts"].setdefault(name, text)
    if "Normalize" not in theirs["modules"] and theirs["similarity"] == "cosine" and "Normalize" in ours["modules"]:
        theirs["modules"].append("Normalize")  # the same score; what was trained
        theirs["configs"].append({})
    assert ours == theirs


def train_(case: Case) -> None:
    """Two steps; the saved folder, opened anew, gives the vectors that the encoder had, and states what it stated."""
    output, trained = case.trained
    same_statement(case, output)
    reopened, first = load_encoder(output, **case.loading), load_encoder(case.folder, **case.loading).state_dict()
    options = {"max_length": case.length}
    close(reopened.encode(zoo.TEXTS, **options), trained.encode(zoo.TEXTS, **options))
    moved = {name for name, tensor in reopened.state_dict().items() if not torch.equal(tensor, first[name])}
    assert moved and dense_tensors(case, first) <= moved


def dense_tensors(case: Case, state: dict[str, Any]) -> set[str]:
    """Those behind the backbone; as many as the family's Dense modules have."""
    found = {name for name in state if not name.startswith("backbone.")}
    assert len(found) == sum(1 + module["bias"] for module in case.family.modules or () if module["kind"] == "Dense")
    return found


def merge_(case: Case) -> None:
    """The mean of the folder and what was trained from it: every tensor, Dense's too, and what both state."""
    if case.family.refused:
        trained = case.folder
    else:
        trained, _ = case.trained
    output = case.root / "merged"
    trust = [word for word in case.family.flags if word == "--trust_remote_code"]
    run(case, merge.main, ["--models", case.folder, trained, "--weights", 0.25, 0.75, "--output_path", output, *trust])
    same_statement(case, output)
    merged, one, other = (load_encoder(f, **case.loading).state_dict() for f in (output, case.folder, trained))
    assert merged.keys() == one.keys() and dense_tensors(case, merged) <= merged.keys()
    for name, tensor in merged.items():
        close(tensor, 0.25 * one[name] + 0.75 * other[name])


def evaluate_(case: Case) -> None:
    """MRR@10."""
    words = ["--encoder", case.folder, "--val_data", case.rows, "--corpus", case.corpus, "--resamples", 10]
    words += ["--max_query_length", case.length, "--max_passage_length", case.length]
    out = run(case, evaluate.main, [*words, *case.family.flags, *case.prompts()])
    (means,) = re.findall(r"^\{.*\}$", out, re.MULTILINE)
    close(ast.literal_eval(means)["MRR@10"], case.golden["MRR@10"])


STAGES: dict[str, Callable[[Case], None]] = {
    "encode": encode, "mine": mine_, "train": train_, "merge": merge_, "evaluate": evaluate_,
}  # fmt: skip


MODES: dict[str, Callable[[Any], str]] = {
    "Pooling": lambda module: next(m for m, flag in zoo.POOLING_FLAGS.items() if module[f"pooling_mode_{flag}"]),
    "Dense": lambda module: "Dense " + module["activation_function"].rpartition(".")[2],
    "Normalize": lambda module: "Normalize",
}


class Tables:
    """The rows of docs/model-folders.md and its Chinese twin. WRITE_TABLES=1 writes them, in place of a comparison."""

    pages = ROOT / "docs/model-folders.md", ROOT / "docs/model-folders.zh-CN.md"

    def hold(self, marker: str, name: str, row: str) -> None:
        """Both pages have this row for the family, within the marker; or get it."""
        for page in self.pages:
            text = page.read_text(encoding="utf-8")
            start = text.index(f"<!-- {marker} -->")
            before, table, after = text[:start], *text[start:].split(f"<!-- /{marker} -->", 1)
            rows = {
                line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("|")
            }
            if "WRITE_TABLES" in os.environ and rows.get(name) != row:
                table = table.replace(rows[name], row) if name in rows else f"{table}{row}\n"
                page.write_text(f"{before}{table}<!-- /{marker} -->{after}", encoding="utf-8")
            else:
                assert rows.get(name) == row, f"{page}: write it with WRITE_TABLES=1 pytest tests/test_zoo.py"


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each family's folder is made once, and trained once."""
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp("family")))


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if not family.refused])
@pytest.mark.parametrize("stage", STAGES)
def test_a_family_goes_through(stage: str, name: str, cases: Callable[[str], Case]) -> None:
    STAGES[stage](cases(name))


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if not family.refused])
def test_rows_of_fixed_shape_are_the_family_s_texts(name: str, cases: Callable[[str], Case]) -> None:
    """Where its texts are packed: vectors and the gradient of a loss by rectangles, in float64."""
    encoder = load_encoder(cases(name).folder, dtype=torch.float64, **cases(name).loading)
    assert (encoder.attention == "padded") == (name in PADDED)
    if name not in PADDED:
        compare_rows(cases(name), encoder)


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if family.refused])
def test_what_is_no_encoder_is_refused_in_every_stage(name: str, cases: Callable[[str], Case], tables: Tables) -> None:
    case, sentences = cases(name), set()
    for stage in STAGES.values():
        with pytest.raises(UserError) as refused:
            stage(case)
        sentences.add(str(refused.value).splitlines()[0].removeprefix(f"{case.folder}: "))
    (sentence,) = sentences
    tables.hold("refused", name, f"| {name} | {case.family.like} | {sentence} |")


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if not family.refused])
def test_the_table_has_what_goes_through(name: str, tables: Tables) -> None:
    family = zoo.FAMILIES[name]
    modules = [
        family.config["model_type"],
        *(MODES.get(module["kind"], str)(module) for module in family.modules or ()),
    ]
    modules += ["no files of sentence-transformers"] * (family.modules is None) + ["code of its own"] * bool(
        family.code
    )
    needs = " ".join(f"`{word}`" if word.startswith("--") else word for word in (" ".join(family.flags),) if word)
    equal = "| = " * len(STAGES)
    tables.hold("zoo", name, f"| {name} | {family.like} | {', '.join(modules)} | {needs} {equal}|")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if not family.refused])
def test_what_is_written_opens_in_sentence_transformers(name: str, cases: Callable[[str], Case]) -> None:
    """The trained folder, and its average with the first: there as here."""
    from sentence_transformers import SentenceTransformer

    case = cases(name)
    written, output = [case.trained[0]], case.root / "average"
    trust = [word for word in case.family.flags if word == "--trust_remote_code"]
    run(case, merge.main, ["--models", case.folder, *written, "--output_path", output, *trust])
    for folder in (*written, output):
        own = {"dtype": torch.float32}
        theirs = SentenceTransformer(str(folder), device="cpu", trust_remote_code=bool(trust), model_kwargs=own)
        ours = load_encoder(folder, trust_remote_code=bool(trust)).encode(zoo.TEXTS, max_length=theirs.max_seq_length)
        close(ours / 2, theirs.encode(zoo.TEXTS, prompt="") / 2)  # two roundings
