"""From words to a stage: `--config FILE.yaml` and flags become its dataclass; errors of the user become one line.

A flag beats the YAML file, which beats the default. YAML values travel through the same argparse types as flags, so
`learning_rate: 1e-5` (a string to PyYAML) is a number here.
"""

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from huggingface_hub.utils import disable_progress_bars as disable_hub_progress_bars
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from bge_core import UserError
from bge_core.runtime.refused import advice

T = TypeVar("T")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")

    def add_argument(self, *names: str, bound: object = None, **options: Any) -> argparse.Action:
        return super().add_argument(*names, **options)  # config.py checks the bound


def make_parser(config_class: type) -> HfArgumentParser:
    """A stage's parser; in its help the flags that other stages have, too, come last."""
    parser = _Parser(cast(Any, config_class), allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", help="YAML file with the same names as the flags; flags override it.")
    order = ["help", "config", *config_class.__annotations__, *(f.name for f in fields(cast(Any, config_class)))]
    for actions in (parser._actions, parser._optionals._group_actions):
        actions.sort(key=lambda action: order.index(action.dest))
    return parser


def parse_config(config_class: type[T], argv: Sequence[str] | None = None) -> T:
    """Read `--config FILE.yaml` and flags into `config_class`.

    Args:
        config_class: one of the dataclasses above.
        argv: words of the command line; None: sys.argv[1:].

    Returns:
        The filled and checked dataclass.

    Raises:
        UserError: unknown flag or key (the nearest name is offered), a value of the wrong type or range.
    """
    words = list(map(expand_home, sys.argv[1:] if argv is None else argv))
    parser = make_parser(config_class)
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name[2:] not in known:
            raise UserError(f"unknown flag {name}: {advice(name[2:], known)}")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    config_file = early.parse_known_args(words)[0].config
    from_yaml = _yaml_words(Path(config_file), known) if config_file else []
    config, _, *unknown = parser.parse_args_into_dataclasses(
        args=[*map(expand_home, from_yaml), *words], look_for_args_file=False, return_remaining_strings=True
    )
    stray = [word for group in unknown for word in group]
    if stray:
        raise UserError(f"{stray[0]!r} belongs to no flag; --help lists the flags")
    return cast(T, config)


def _yaml_words(path: Path, known: set[str]) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds {type(values).__name__}; write one `name: value` a line")
    words: list[str] = []
    for name, value in values.items():
        if name not in known or name in ("config", "help"):
            raise UserError(f"--config {path}: unknown key {name!r}: {advice(str(name), known)}")
        words += as_words({name: value})
    return words


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them; None and [] are left out."""
    words: list[str] = []
    for name, value in values.items():
        texts = as_texts(value)
        begins = len(texts) == 1 and texts[0].startswith("-")  # what looks like a flag needs the sign
        words += [f"--{name}={texts[0]}"] if begins else [f"--{name}", *texts] if texts else []
    return words


def expand_home(word: str) -> str:
    """~/x and --flag=~/x with the home folder: a shell does it for a bare word, and nobody for one in a YAML file."""
    flag, sign, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + sign + os.path.expanduser(path) if path.startswith("~/") else word


def as_texts(value: Any) -> list[str]:
    """A flag's value as words: a list becomes several, a mapping JSON, None none."""
    given = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    return [json.dumps(one) if isinstance(one, dict) else str(one) for one in given]


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved settings for a manifest; a hub token is a secret and never part of it."""
    return {name: value for name, value in asdict(config).items() if name != "token"}


def changed_fields(config: Any) -> dict[str, Any]:
    """Settings that differ from their defaults, in the order of the dataclass."""
    blank = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(config)}
    return {name: value for name, value in as_dict(config).items() if value != blank[name]}


def run_stage(config_class: type[T], stage: Callable[[T], int | None], argv: Sequence[str] | None = None) -> int:
    """Parse and run one stage; turn the user's errors into one line on stderr.

    Returns:
        The exit code: 0 done, 2 the user's input, settings or disk; what `stage` returns otherwise. A fault of ours
        passes through as the exception it is, with its traceback.
    """
    if not gc.isenabled():
        gc.freeze()  # modules are no garbage, neither now nor at the end
        gc.enable()
    is_main = os.environ.get("RANK", "0") == "0"  # the other ranks say only what is wrong: each warning once
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.INFO if is_main else logging.ERROR)
    transformers_logging.set_verbosity_error()  # what a load lacks, load_encoder says itself
    transformers_logging.disable_progress_bar()
    disable_hub_progress_bars()
    for noisy in ("httpx", "datasets", "faiss", "faiss.loader", "matplotlib", "fsspec", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return stage(parse_config(config_class, argv)) or 0
    except (UserError, OSError) as error:
        if is_main or not isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
