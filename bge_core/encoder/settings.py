"""What a model folder states beyond its weights, read and written in the one place: modules, prompts, similarity."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from tokenizers.pre_tokenizers import BertPreTokenizer, PreTokenizer
from transformers.utils import cached_file

from bge_core import UserError
from bge_core.runtime.flags import Pooling, Similarity

# Each pooling in sentence-transformers' files: the flag of versions 2 to 5, the value of version 6.
_POOLING_NAMES: dict[Pooling, tuple[str, str]] = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "last_token": ("pooling_mode_lasttoken", "lasttoken"),
    "max": ("pooling_mode_max_tokens", "max"),
    "mean_sqrt_len": ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    "weightedmean": ("pooling_mode_weightedmean_tokens", "weightedmean"),
}
_PASSAGE_NAMES = ("document", "passage", "corpus")  # in sentence-transformers' order
_LENGTH_FILES = [  # one of them holds the length; all but the first are of old versions
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_REMEDY = "; open it with sentence-transformers, or use another model"


@dataclass(frozen=True)
class DenseSettings:
    """A linear layer behind the pooling, activation(W x + b), with + x or + R x where it has a residual.

    Args:
        path: its folder in the model folder, which holds its weights.
        in_features, out_features: dimensions.
        bias: whether there is a b.
        activation: the class of torch, by its full name.
        residual: whether the input is added, by a matrix R where the dimensions differ.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "torch.nn.modules.activation.Tanh"
    residual: bool = False


@dataclass(frozen=True)
class EncoderSettings:
    """What a checkpoint says beyond its weights.

    Args:
        pooling: how token vectors become one; None: not stated.
        normalize: vectors have length 1; None: not stated.
        max_length: longest text in tokens that the vectors were trained for; None: not stated.
        query_prompt, passage_prompt: put before each text; None: not stated.
        other_prompts: those of other names.
        default_prompt_name: that which sentence-transformers' `encode` takes where none is named.
        similarity: how two vectors are compared, as stated; cosine where nothing is, as in sentence-transformers.
        do_lower_case: texts are put into lower case before the tokenizer sees them.
        include_prompt: the tokens of the prompt take part in the pooling.
        dense: the linear layers behind the pooling.
        transformer_path: where config, weights and tokenizer lie within the folder that was read; saving has them in
            the folder itself.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    other_prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: Similarity = "cosine"
    do_lower_case: bool = False
    include_prompt: bool = True
    dense: tuple[DenseSettings, ...] = ()
    transformer_path: str = field(default="", compare=False)

    @property
    def is_stated(self) -> bool:
        """Whether the model has sentence-transformers' files at all."""
        return self.normalize is not None

    @property
    def scored_by(self) -> Similarity:
        """How two vectors are compared in effect: of those of length 1 the inner product is the cosine."""
        return "cosine" if self.normalize else self.similarity

    @property
    def scoring(self) -> dict[str, Any]:
        """All that changes the score of two texts that already have their prompts and are not cut; None: not stated."""
        stated = asdict(self) | {"similarity": self.scored_by}
        for name in ("max_length", "query_prompt", "passage_prompt", "other_prompts", "default_prompt_name"):
            del stated[name]
        del stated["transformer_path"]
        return stated | {"dense": [{**of, "path": ""} for of in stated["dense"]]}

    @property
    def prompts(self) -> dict[str, str]:
        """All prompts by name, the passages' under both names that are in use; those that are not stated are absent."""
        named = {"query": self.query_prompt, "passage": self.passage_prompt, "document": self.passage_prompt}
        return {name: text for name, text in {**named, **self.other_prompts}.items() if text is not None}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files; OSError on a full disk, for which the tokenizers library has a bare Exception."""
    tokenizer.backend_tokenizer.no_truncation()  # else the length of the last call would be saved with it
    tokenizer.backend_tokenizer.no_padding()
    try:
        with _without_python(tokenizer.backend_tokenizer):
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None


def copy_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer of its own, which saving may change."""
    with _without_python(tokenizer.backend_tokenizer):
        return copy.deepcopy(tokenizer)


@contextmanager
def _without_python(backend: Any) -> Iterator[None]:
    """Within it a word splitter written in Python (RoFormer's) is away: no JSON can hold it; its class puts it back."""
    splitter = backend.pre_tokenizer
    in_python = type(splitter) is PreTokenizer
    if in_python:
        backend.pre_tokenizer = BertPreTokenizer()
    try:
        yield
    finally:
        if in_python:
            backend.pre_tokenizer = splitter


def find_file(name: str | Path, file: str, **hub: Any) -> Path | None:
    """A file of a folder or hub model, None where it has none."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    found = cached_file(str(name), file.lstrip("/"), **hub, **quiet)
    return None if found is None else Path(found)


def _read_file(name: str | Path, file: str, **hub: Any) -> Any:
    """A JSON file of a model, None where it has none."""
    found = find_file(name, file, **hub)
    try:
        return None if found is None else json.loads(found.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}/{file}: not JSON: {error}") from None


def read_settings(name: str | Path, **hub: Any) -> EncoderSettings:
    """What a checkpoint's sentence-transformers files state; nothing stated without them.

    Raises:
        UserError: files that are damaged; a module, pooling or similarity that is not known here.
    """
    modules = _read_file(name, "modules.json", **hub)
    if not modules:
        return EncoderSettings()
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m and "path" in m for m in modules):
        raise UserError(f"{name}/modules.json: is not the list of modules that sentence-transformers writes")
    kinds = _module_kinds(name, [str(module["type"]) for module in modules])
    configs = [_read_file(name, f"{module['path']}/config.json", **hub) or {} for module in modules]
    root = modules[0]["path"]
    lengths = (_read_file(name, f"{root}/{file}", **hub) for file in _LENGTH_FILES)
    transformer: dict[str, Any] = next(filter(None, lengths), {})
    length = transformer.get("max_seq_length")
    if length is None:  # sentence-transformers 6 keeps it with the tokenizer, which has 10^30 for "none"
        limits = ("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")
        stated_lengths = [(_read_file(name, f"{root}/{file}", **hub) or {}).get(key) for file, key in limits]
        length = min(filter(None, stated_lengths), default=None) if stated_lengths[0] else None
    _refuse_stated(name, transformer, "config_kwargs", "config_args", "processing_kwargs")
    stated = _read_file(name, "config_sentence_transformers.json", **hub) or {}
    _refuse_stated(name, stated, "truncate_dim")
    prompts = {key: text for key, text in (stated.get("prompts") or {}).items() if text is not None}
    of_passages = [prompts[key] for key in _PASSAGE_NAMES if key in prompts]
    passage_prompt = next(filter(None, of_passages), of_passages[0] if of_passages else None)
    known = {"query": prompts.get("query"), **{key: passage_prompt for key in _PASSAGE_NAMES}}
    similarity: Any = stated.get("similarity_fn_name") or "cosine"
    if similarity not in get_args(Similarity):
        raise UserError(
            f"{name}: states the similarity {similarity!r}, and scores here are cosines or inner products: write "
            '"similarity_fn_name": "cosine" into its config_sentence_transformers.json if that will do '
            "(it ranks as euclidean does where a Normalize module stands)"
        )
    return EncoderSettings(
        pooling=_pooling(name, configs[1]),
        normalize="Normalize" in kinds,
        max_length=int(length) if length and length < 1_000_000 else None,
        query_prompt=prompts.get("query"),
        passage_prompt=passage_prompt,
        other_prompts={
            key: text for key, text in prompts.items() if text != known.get(key) and (text or key not in known)
        },
        default_prompt_name=stated.get("default_prompt_name"),
        similarity=similarity,
        do_lower_case=bool(transformer.get("do_lower_case")),
        include_prompt=configs[1].get("include_prompt", True),
        dense=tuple(
            _dense(name, module["path"], config)
            for module, kind, config in zip(modules, kinds, configs, strict=True)
            if kind == "Dense"
        ),
        transformer_path=root,
    )


def _module_kinds(name: str | Path, types: list[str]) -> list[str]:
    """The classes' names: Transformer, Pooling, any number of Dense, and perhaps Normalize. UserError for others."""
    kinds = [kind.rpartition(".")[2] for kind in types]
    for full, kind in zip(types, kinds, strict=True):
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize") or not full.startswith(
            "sentence_transformers."
        ):
            raise UserError(f"{name}: has the module {full}, which cannot be run here{_REMEDY}")
    order = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * kinds.count("Normalize")]
    if kinds != order:
        raise UserError(
            f"{name}: has the modules {', '.join(kinds)}; this order cannot be run here, "
            f"only Transformer, Pooling, Dense, Normalize{_REMEDY}"
        )
    return kinds


def _pooling(name: str | Path, config: dict[str, Any]) -> Pooling:
    """The one pooling that a pooling module's file names; mean where it names none. UserError for others."""
    modes = config.get("pooling_mode") or [mode for flag, mode in _POOLING_NAMES.values() if config.get(flag)]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    names = [ours for ours, (_, mode) in _POOLING_NAMES.items() if modes == [mode]]
    if not names:
        raise UserError(f"{name}: states the pooling {' + '.join(map(str, modes))}, which is not known here{_REMEDY}")
    return names[0]


def _dense(name: str | Path, path: str, config: dict[str, Any]) -> DenseSettings:
    known = DenseSettings(
        path,
        int(config["in_features"]),
        int(config["out_features"]),
        bool(config.get("bias", True)),
        config.get("activation_function", DenseSettings.activation),
        bool(config.get("use_residual", False)),
    )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UserError(f"{name}/{path}: a Dense module with {key} {config[key]!r} cannot be run here{_REMEDY}")
    return known


def _refuse_stated(name: str | Path, config: dict[str, Any], *keys: str) -> None:
    """UserError for what changes the vectors and cannot be honoured."""
    for key in keys:
        if config.get(key):
            raise UserError(f"{name}: its sentence-transformers files state {key} {config[key]}, unknown here{_REMEDY}")


def write_settings(folder: Path, settings: EncoderSettings, embedding_size: int, max_length: int = 512) -> None:
    """The files that tell sentence-transformers (2 to 6) what `settings` says; the weights of Dense modules are not.

    Args:
        folder: of the model.
        settings: what to state.
        embedding_size: of the final vectors.
        max_length: stated where the settings state none: some servers do not start without.
    """

    def write(file: str, value: Any) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((dense.path, "Dense") for dense in settings.dense)]
    if settings.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (folder / modules[-1][0]).mkdir(exist_ok=True)
    write(
        "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    pooling = {flag: settings.pooling == ours for ours, (flag, _) in _POOLING_NAMES.items()}
    write(
        "1_Pooling/config.json",
        {
            "word_embedding_dimension": settings.dense[0].in_features if settings.dense else embedding_size,
            **pooling,
            **({} if settings.include_prompt else {"include_prompt": False}),
        },
    )
    for dense in settings.dense:
        config = {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": dense.bias,
            "activation_function": dense.activation,
        }
        write(f"{dense.path}/config.json", config | ({"use_residual": True} if dense.residual else {}))
    length = settings.max_length or max_length
    write("sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": settings.do_lower_case})
    write(
        "config_sentence_transformers.json",
        {
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity,
        },
    )
