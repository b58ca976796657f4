"""Load an encoder from the hub or a folder."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import normalizers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from bge_core import UserError
from bge_core.encoder.dense import load_dense
from bge_core.encoder.model import Encoder
from bge_core.encoder.packing import max_length
from bge_core.encoder.selfcheck import packed_or_padded
from bge_core.encoder.settings import EncoderSettings, find_file, read_settings
from bge_core.runtime.flags import Attention, Pooling

logger = logging.getLogger(__name__)
_CODE_HINT = "; it comes with model code of its own, which --trust_remote_code runs"


def load_encoder(
    name: str | Path,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    attention_dropout: float | None = None,
) -> Encoder:
    """Load a hub model or a folder.

    Args:
        name: hub name or folder.
        pooling: None: what the checkpoint's sentence-transformers files say, else cls. A contradiction is warned of.
        normalize: None: what those files say, else True. Chosen, it decides the score: cosine or inner product. A
            contradiction to what the files say is warned of.
        dtype: of the weights; float32 master weights unless told otherwise, whatever the checkpoint was saved in.
        attention: how a batch is computed, see packing.py. A model that packed texts change is padded, with a warning.
        attention_dropout: of the attention weights in training; None: what the checkpoint says.

    Returns:
        The encoder, on the CPU, in eval mode.

    Raises:
        UserError: not a model, not reachable, weights missing.
    """
    access: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    stored = settings_of(name, **access)
    backbone, tokenizer, info = open_pretrained(
        AutoModel,
        name,
        subfolder=stored.transformer_path,
        tokenizer_name=tokenizer_name,
        attention_dropout=attention_dropout,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **access,
    )
    refuse_other_models(name, backbone, tokenizer)
    if stored.do_lower_case:
        lower_case(tokenizer)
    _refuse_missing_weights(name, backbone, info)
    dense = load_dense(name, stored.dense, backbone.config.hidden_size, dtype, **access)
    if pooling and stored.pooling and pooling != stored.pooling:
        logger.warning("%s was trained with %s pooling; you chose %s", name, stored.pooling, pooling)
    settings = replace(stored, pooling=pooling or stored.pooling or "cls")
    if normalize is not None:
        settings = replace(settings, normalize=normalize, similarity=stored.similarity if normalize else "dot")
        if stored.normalize is not None and settings.scored_by != stored.scored_by:
            logger.warning("%s states %s scores; here they are %s", name, stored.scored_by, settings.scored_by)
    elif stored.normalize is None:
        settings = replace(settings, normalize=True)
    if attention != "padded":
        attention = packed_or_padded(name, backbone, attention)
    return Encoder(backbone, tokenizer, settings, attention, dense).eval()


def settings_of(name: str | Path, **access: Any) -> EncoderSettings:
    """What a folder or hub model states, once it is known that there is a whole model.

    Args:
        name: hub name or folder.
        access: cache_dir, token.

    Raises:
        UserError: no such model, an adapter without its base, or as `read_settings`.
    """
    refuse_adapter(name, **access)
    _refuse_no_model(name, str(name))
    with _loading(str(name), "model", Path(name)):
        return read_settings(name, **access)


def open_pretrained(
    kind: Any,
    name: str | Path,
    *,
    flag: str = "",
    what: str = "model",
    subfolder: str = "",
    tokenizer_name: str | None = None,
    attention_dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, fast tokenizer and what transformers says of the weights.

    Args:
        kind: the class of transformers that loads it, as AutoModel.
        name: hub name or folder.
        flag, what: for messages: how the user named it, and what it should be.
        subfolder: where it lies within `name`.
        options: of `from_pretrained`, of the model; those of the hub are for the tokenizer, too.

    Raises:
        UserError: not such a model, not reachable, an adapter, model code that is not trusted, no fast tokenizer.
    """
    label = f"{flag} {name}".strip()
    hub = {key: value for key, value in options.items() if key in ("cache_dir", "token", "trust_remote_code")}
    refuse_adapter(name, **{key: value for key, value in hub.items() if key != "trust_remote_code"})
    _refuse_no_model(name, label, subfolder)
    with _loading(label, what, Path(name)):
        config = AutoConfig.from_pretrained(name, subfolder=subfolder, **hub)
        if attention_dropout is not None:
            set_attention_dropout(config, attention_dropout)
        try:
            model, info = kind.from_pretrained(
                name, config=config, dtype=dtype, output_loading_info=True, subfolder=subfolder, **options
            )
        except RuntimeError:  # shapes that are not the class's; transformers has logged them
            hint = _CODE_HINT if _ignores_code(config) and not options.get("trust_remote_code") else ""
            raise UserError(f"{label}: its weights have not the shapes that its config.json says{hint}") from None
        own = {} if tokenizer_name else {"subfolder": subfolder}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name, use_fast=True, **own, **hub)
    if _ignores_code(config, type(model).__module__):
        logger.warning("%s: comes with model code of its own, which is not run; --trust_remote_code runs it", label)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        label = tokenizer_name or label
        raise UserError(f"{label}: needs a fast tokenizer (tokenizer.json) with a padding token")
    return model, tokenizer, info


def _refuse_no_model(name: str | Path, label: str, subfolder: str = "") -> None:
    folder = Path(name)
    files = ("config.json", "modules.json") if not subfolder else (f"{subfolder}/config.json",)
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise UserError(f"{label}: is not a model folder (it has no {files[0]})")
    if not folder.exists() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise UserError(f"{label}: no such folder")
    if not folder.exists() and folder.parent.is_dir() and str(folder.parent) != ".":
        logger.warning("%s: there is no such folder in %s; taken as a name of the hub", name, folder.parent)


@contextmanager
def _loading(label: str, what: str, folder: Path) -> Iterator[None]:
    """What transformers raises, as the user's error."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno and not folder.is_dir()):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{label}: comes with model code of its own; read it, and if you trust it, add --trust_remote_code"
            ) from None
        if "does not recognize this architecture" in str(error):
            raise UserError(
                f"{label}: states a model_type that transformers does not know: it is no {what} that can be run here, "
                "or needs a newer transformers"
            ) from None
        raise UserError(
            f"{label}: could not be loaded as a {what}: {str(error).strip().splitlines()[0]}\n"
            "Give a folder, or a hub name; where the hub is out of reach, set HF_ENDPOINT to a mirror."
        ) from None


def refuse_adapter(name: str | Path, **access: Any) -> None:
    """UserError for a LoRA adapter, whether or not its base lies beside it, with how to merge the two."""
    found: Path | None = None
    with suppress(OSError, ValueError):  # what is no model at all is told of later
        found = find_file(name, "adapter_config.json", **access)
    if found is None:
        return
    base = json.loads(found.read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE"
    raise UserError(
        f"{name}: is a LoRA adapter (adapter_config.json), no whole model; merge it into its base first, in Python:\n"
        "  from peft import PeftModel\n"
        "  from transformers import AutoModel, AutoTokenizer\n"
        f"  adapted = PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {str(name)!r})\n"
        "  adapted.merge_and_unload().save_pretrained('whole_model')\n"
        f"  AutoTokenizer.from_pretrained({base!r}).save_pretrained('whole_model')\n"
        "and name the folder whole_model in its place"
    )


def refuse_other_models(name: str | Path, backbone: Any, tokenizer: Any) -> None:
    """UserError for what gives no vector a token of a text, and for a tokenizer that knows tokens the model does not.

    Special tokens without a vector are warned of: a text has to hold their very name.
    """
    kind = type(backbone).__name__
    problem = "has a decoder" if backbone.config.is_encoder_decoder else None
    if max_length(backbone) < 1:
        problem = "states no longest text"
    if problem is None and backbone.device.type != "meta":  # there no weights are
        id_sL = torch.full((2, 3), tokenizer.pad_token_id)
        mask_sL = torch.tensor([[1, 1, 1], [1, 1, 0]])
        try:
            with torch.no_grad():
                shape = tuple(backbone(input_ids=id_sL, attention_mask=mask_sL).last_hidden_state.shape)
            if shape != (want := (2, 3, backbone.config.hidden_size)):
                problem = f"gives vectors of the shape {shape} where {want} is needed"
        except Exception as error:  # another author's model: it may raise anything
            problem = f"does not run on tokens alone: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if problem:
        raise UserError(f"{name}: a {kind} is no encoder that can be trained here (it {problem})")
    num_rows = backbone.get_input_embeddings().num_embeddings
    unknown = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    added = tokenizer.added_tokens_decoder
    if not all(number in added and added[number].special for number in unknown):
        raise UserError(
            f"{name}: its tokenizer has {max(unknown) + 1:,} tokens, as {unknown[max(unknown)]!r}, and its embedding "
            f"{num_rows:,} rows; enlarge it: model.resize_token_embeddings({max(unknown) + 1}), and save both"
        )
    if unknown:
        logger.warning("%s: texts with %s cannot be read: the model has no vector for it", name, unknown[min(unknown)])


_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")  # whatever the model calls it


def set_attention_dropout(config: Any, dropout: float) -> None:
    """Set the dropout of attention weights. UserError where the model has none."""
    found = [name for name in _ATTENTION_DROPOUTS if hasattr(config, name)]
    if not found:
        raise UserError(f"--attention_dropout: a {config.model_type} model has none")
    for name in found:
        setattr(config, name, dropout)


def stated_attention_dropout(config: Any) -> float:
    """The dropout of attention weights that a model's config states; 0 where the model has none."""
    return max((getattr(config, name) for name in _ATTENTION_DROPOUTS if hasattr(config, name)), default=0.0)


def lower_case(tokenizer: Any) -> None:
    """Let a tokenizer see texts in lower case, whatever else it does to them."""
    backend = tokenizer.backend_tokenizer
    stored: Any = backend.normalizer
    steps: list[Any] = [stored] if stored else []
    if type(stored) is normalizers.Sequence:
        steps = [stored[i] for i in range(len(stored))]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _ignores_code(config: Any, module: str = "") -> bool:
    """Whether a checkpoint has model code of its own and the class in use is not of it."""
    return "AutoModel" in (getattr(config, "auto_map", None) or {}) and not module.startswith("transformers_modules.")


def _refuse_missing_weights(name: str | Path, backbone: Any, info: dict[str, Any]) -> None:
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if missing - pooler:
        hint = _CODE_HINT if _ignores_code(backbone.config, type(backbone).__module__) else ""
        raise UserError(
            f"{name}: the checkpoint lacks weights of {type(backbone).__name__}: {', '.join(sorted(missing)[:5])}{hint}"
        )
    if pooler:  # a random pooler, which nothing uses, must not get into what we save
        backbone.pooler = None
