"""What to say of a flag that does not exist: why not, or which one it resembles."""

import difflib
from collections.abc import Iterable

# Flags of FlagEmbedding and its examples that mean nothing here; the reason is what the user reads.
REFUSED = {
    "deepspeed": "DeepSpeed is not tested here; launch with accelerate or torchrun (DDP, or --fsdp)",
    "small_threshold": "merge small files yourself; every row is used",
    "drop_threshold": "merge small files yourself; every row is used",
    "shuffle_ratio": "it reorders thirds of a passage, which no evaluation does",
    "cache_path": "rows are memory-mapped by datasets; set HF_DATASETS_CACHE",
    "pad_to_multiple_of": "padding is the encoder's own affair",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "config_name": "the configuration always comes from the model; FlagEmbedding only printed it",
    "save_strategy": "use --save_steps (below 1: a share of all steps; 0: none)",
    "evaluation_strategy": "use --eval_steps with --val_data",
    "eval_strategy": "use --eval_steps with --val_data",
    "ddp_find_unused_parameters": "never needed: parameters without a gradient are frozen",
    "optim": "AdamW is the optimizer; change it in bge_core/training/optim.py",
    "remove_unused_columns": "unknown columns are always ignored",
    "index_factory": "the search is exact",
    "save_embedding": "--embedding_cache_dir keeps embeddings, by content",
    "load_embedding": "--embedding_cache_dir keeps embeddings, by content",
    "save_path": "--embedding_cache_dir keeps embeddings, by content",
    "query_data": "it is called --val_data here",
    "corpus_data": "it is called --corpus here",
    "do_train": "train.py always trains",
    "local_rank": "the launcher sets it in the environment",
}


def advice(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is no flag or key."""
    return REFUSED.get(name) or nearest(f"--{name}", [f"--{one}" for one in known]) or "--help lists the flags"


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` of the known name that `name` resembles most; '' where none does."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else ""
