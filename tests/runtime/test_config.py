"""Settings from flags and YAML: precedence, types, refusals with a reason; FlagEmbedding's flags keep working."""

import gc
import importlib
import json
import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT

from bge_core import UserError
from bge_core.runtime.cli import as_dict, changed_fields, parse_config, run_stage
from bge_core.runtime.config import EvaluateConfig, MergeConfig, MineConfig, PrepareConfig, TrainConfig
from bge_core.runtime.refused import REFUSED

STAGES: dict[str, tuple[type, list[str]]] = {  # and the flags that each needs
    "prepare": (PrepareConfig, ["--input_dir", "i", "--output_dir", "o"]),
    "mine": (MineConfig, ["--model_name_or_path", "m", "--input_file", "i", "--output_file", "o"]),
    "train": (TrainConfig, ["--model_name_or_path", "m", "--output_dir", "o", "--train_data", "d"]),
    "merge": (MergeConfig, ["--models", "a", "b", "--output_path", "o"]),
    "evaluate": (EvaluateConfig, ["--encoder", "m", "--val_data", "v"]),
}


def train(*words: str) -> TrainConfig:
    return parse_config(TrainConfig, [*STAGES["train"][1], *words])


def with_yaml(folder: Path, text: str, *words: str) -> TrainConfig:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return parse_config(TrainConfig, ["--config", str(file), *words])


REQUIRED = "model_name_or_path: m\noutput_dir: o\ntrain_data: [d]\n"


# --- the guide's commands ---------------------------------------------------------------------------------------------


def test_the_guides_training_command() -> None:
    words = """--output_dir OUT --model_name_or_path M --train_data train_minedHN.jsonl --learning_rate 1e-5 --fp16
        --num_train_epochs 30 --per_device_train_batch_size 4 --gradient_accumulation_steps 10
        --dataloader_drop_last True --normlized True --temperature 0.02 --query_max_len 64 --passage_max_len 512
        --train_group_size 2 --negatives_cross_device --logging_steps 10 --save_steps 0.2
        --query_instruction_for_retrieval"""
    config = parse_config(TrainConfig, [*words.split(), ""])
    assert changed_fields(config) == {
        "model_name_or_path": "M", "output_dir": "OUT", "train_data": ["train_minedHN.jsonl"], "train_group_size": 2,
        "query_max_len": 64, "passage_max_len": 512, "query_instruction_for_retrieval": "",
        "dataloader_drop_last": True, "negatives_cross_device": True, "num_train_epochs": 30.0,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 10, "learning_rate": 1e-5, "fp16": True,
        "save_steps": 0.2,
    }  # fmt: skip


def test_the_guides_other_commands() -> None:
    words = "--input_dir data_path --output_dir output_path --train_num 10000"
    assert parse_config(PrepareConfig, words.split()).train_num == 10000
    words = """--model_name_or_path M --input_file train.jsonl --output_file train_minedHN.jsonl
        --range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching"""
    mine = parse_config(MineConfig, words.split())
    assert mine.sampling_range == (2, 200) and mine.use_gpu_for_searching
    words = """--encoder M --fp16 --max_query_length 64 --max_passage_length 512 --batch_size 4 --val_data V
        --add_instruction --k 100"""
    evaluate = parse_config(EvaluateConfig, words.split())
    assert evaluate.encoder == ["M"] and evaluate.fp16 and evaluate.add_instruction and evaluate.k == 100
    words = "--models BASE FINETUNED --weights 0.5 0.5 --output_path OUT"
    merge = parse_config(MergeConfig, words.split())
    assert merge.models == ["BASE", "FINETUNED"] and merge.weights == [0.5, 0.5]


# --- flags, YAML ------------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    text = REQUIRED + "learning_rate: 1e-5\ntemperature: 0.05\ntrain_data: [a, b]\nfp16: true\nseed: null\n"
    config = with_yaml(tmp_path, text, "--temperature", "0.1", "--train_data", "c", "--fp16", "False")
    assert (config.learning_rate, config.temperature, config.train_data) == (1e-5, 0.1, ["c"])
    assert (config.fp16, config.seed, config.train_group_size) == (False, 42, 8)


def test_values_have_the_type_of_their_field(tmp_path: Path) -> None:
    text = """
        learning_rate: 1e-5          # a string to PyYAML
        num_train_epochs: 3
        save_total_limit: 2
        use_mrl: yes
        mrl_dims: [8, 16]
        query_instruction_for_retrieval: "--为这个句子：\\n"
        passage_instruction_for_retrieval: ''
        run_name: 2024
        loss_args: {margin: 0.1}
        normlized: false
    """
    config = with_yaml(tmp_path, REQUIRED + "\n".join(line.strip() for line in text.splitlines()))
    assert config.learning_rate == 1e-5 and isinstance(config.num_train_epochs, float)
    assert config.save_total_limit == 2 and config.mrl_dims == [8, 16] and config.use_mrl
    assert config.query_instruction_for_retrieval == "--为这个句子：\n"
    assert config.passage_instruction_for_retrieval == "" and config.run_name == "2024"
    assert config.parsed_loss_args == {"margin": 0.1}
    assert config.normalize_embeddings is False


@pytest.mark.parametrize("words, want", [((), False), (("--fp16",), True), (("--fp16", "True"), True),
                                         (("--fp16", "false"), False), (("--fp16=1",), True)])  # fmt: skip
def test_switches_need_no_value_and_take_one(words: tuple[str, ...], want: bool) -> None:
    assert train(*words).fp16 is want


@pytest.mark.parametrize(
    "words", [("--normlized", "False"), ("--normalize_embeddings", "False"), ("--no_normalize_embeddings",)]
)
def test_a_switch_that_is_on_can_be_switched_off(words: tuple[str, ...]) -> None:
    assert train().normalize_embeddings is True
    assert train(*words).normalize_embeddings is False


def test_both_spellings_of_a_name() -> None:
    words = ["--embedder_name_or_path", "e", "--output_dir", "o", "--train_data", "d"]
    assert parse_config(TrainConfig, words).model_name_or_path == "e"
    assert (
        parse_config(EvaluateConfig, [*STAGES["evaluate"][1], "--pooling_method", "mean"]).sentence_pooling_method
        == "mean"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resolved_settings_written_as_yaml_are_read_as_they_were(stage: str, tmp_path: Path) -> None:
    config_class, words = STAGES[stage]
    config = parse_config(config_class, words)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if v != []}), encoding="utf-8")
    assert parse_config(config_class, ["--config", str(file)]) == config


@pytest.mark.parametrize("stage", ["mine", "evaluate"])
def test_the_earlier_name_of_the_vectors_folder(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    config_class, needed = STAGES[stage]
    old, new = ["--cache_dir", "v"], ["--embedding_cache_dir", "v"]
    assert parse_config(config_class, [*needed, *new]).embedding_cache_dir == "v" and not caplog.messages
    for words in (old, old + new):
        caplog.clear()
        assert parse_config(config_class, [*needed, *words]).embedding_cache_dir == "v"
        assert caplog.messages == ["--cache_dir: the vectors' folder is called --embedding_cache_dir now"]
    with pytest.raises(UserError, match="earlier name of --embedding_cache_dir w"):
        parse_config(config_class, [*needed, *old, "--embedding_cache_dir", "w"])


def test_the_home_folder_in_flags_and_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("train_data: [~/a.jsonl, b~/c]\nmodel_name_or_path: ~/bge\nrun_name: ~\n")
    config = parse_config(TrainConfig, ["--config", "~/run.yaml", "--output_dir=~/out", "--val_data", "~/v.jsonl"])
    assert config.train_data == [f"{tmp_path}/a.jsonl", "b~/c"] and config.model_name_or_path == f"{tmp_path}/bge"
    assert (config.output_dir, config.val_data) == (f"{tmp_path}/out", f"{tmp_path}/v.jsonl")
    assert config.run_name is None


def test_an_empty_list_in_yaml_is_an_empty_list(tmp_path: Path) -> None:
    """As a manifest's resolved settings have it."""
    assert with_yaml(tmp_path, REQUIRED + "mrl_dims: []\n").mrl_dims == []


def test_a_hub_token_is_no_setting_to_record() -> None:
    assert "token" not in as_dict(train("--token", "secret")) and "secret" not in str(
        changed_fields(train("--token", "secret"))
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (("--learning_rat", "1"), "unknown flag --learning_rat: did you mean --learning_rate?"),
        (("--learning_rat=1",), "unknown flag --learning_rat: did you mean --learning_rate?"),
        (("--xyzzy",), "unknown flag --xyzzy: --help lists the flags"),
        (("--train_group", "3"), "did you mean --train_group_size?"),  # no abbreviations
        (("--deepspeed", "ds.json"), "unknown flag --deepspeed: DeepSpeed is not tested here"),
        (("--learning_rate", "fast"), "--learning_rate"),
        (("--train_group_size", "2.5"), "--train_group_size"),
        (("--kd_loss_type", "mse"), "--kd_loss_type"),
        (("--attention", "flex"), "invalid choice: 'flex' (choose from"),
        (("--fp16", "perhaps"), "perhaps"),
        (("--seed", "1", "2"), "'2' belongs to no flag"),
        (("--temperature", "0"), "--temperature 0.0: use a number above 0"),
        (("--warmup_ratio", "2"), "--warmup_ratio 2.0: use a share from 0 to 1"),
        (("--weight_decay", "-1"), "--weight_decay -1.0: use 0 or a number above it"),
        (("--ema_decay", "1"), "--ema_decay 1.0: use a number above 0 and below 1"),
        (("--ema_decay", "0"), "--ema_decay 0.0: use a number above 0 and below 1"),
        (("--adam_beta1", "1.5"), "--adam_beta1 1.5: use 0 to below 1"),
        (("--eval_steps", "-1", "--val_data", "v"), "--eval_steps -1.0: use 0 or a number above it"),
        (("--lr_scheduler_type", "cosin"), "--lr_scheduler_type 'cosin': did you mean cosine? use linear, cosine,"),
        (("--use_mrl", "--mrl_dims", "8", "0"), "--mrl_dims 0: use a number above 0"),
        (("--fp16", "--bf16"), "--fp16 True: cannot go with --bf16"),
        (("--use_mrl",), "--mrl_dims []: go with --use_mrl"),
        (("--mrl_dims", "8"), "--mrl_dims [8]: go with --use_mrl"),
        (("--negatives_cross_device", "--use_inbatch_neg", "False"), "--negatives_cross_device True: needs in-batch"),
        (("--load_best_model_at_end",), "--load_best_model_at_end True: needs --val_data"),
        (("--query_instruction_format", "{}"), "must hold '{}' twice"),
        (("--passage_instruction_format", "{0}{1}"), "must hold '{}' twice"),
        (("--report_to", "mlflow"), "--report_to 'mlflow': use tensorboard"),
        (("--loss_args", "margin=1"), "--loss_args 'margin=1': write a JSON object"),
        (("--loss_args", "[1]"), "write a JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named_with_what_to_do(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("learning_rat: 1", "unknown key 'learning_rat': did you mean --learning_rate?"),
    ("deepspeed: x", "unknown key 'deepspeed': DeepSpeed is not tested here"),
    ("config: other.yaml", "unknown key 'config'"),
    ("learning_rate: fast", "--learning_rate"),
    ("- a\n- b", "holds list"),
    ("a: [", "not readable as YAML"),
])  # fmt: skip
def test_a_wrong_file_is_named_with_what_to_do(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        with_yaml(tmp_path, text, *STAGES["train"][1])
    assert message in str(caught.value)


def test_a_missing_file_and_missing_flags(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.yaml: no such file"):
        parse_config(TrainConfig, ["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(UserError, match="required: --model_name_or_path"):
        parse_config(TrainConfig, [])


def test_small_conventions_of_others() -> None:
    assert train("--sub_batch_size", "-1").sub_batch_size is None  # FlagEmbedding's "off"
    assert train("--max_steps", "-1").max_steps == -1
    assert train("--query_instruction_format", "{}\\n{}").query_instruction_format == "{}\n{}"


@pytest.mark.parametrize("text", ["2", "200-2", "5-5", "a-b", "2-200-3", "-3-5"])
def test_a_range_is_two_ranks(text: str) -> None:
    with pytest.raises(UserError, match="range_for_sampling"):
        parse_config(MineConfig, [*STAGES["mine"][1], f"--range_for_sampling={text}"])


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_a_stage_ends_with_0_2_or_its_own_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = STAGES["train"][1]
    seen: list[Any] = []
    assert run_stage(TrainConfig, lambda config: seen.append(config.seed), [*words, "--seed", "7"]) == 0 and seen == [7]
    assert run_stage(TrainConfig, lambda config: 75, words) == 75

    def fails(error: Exception) -> Any:
        def stage(config: TrainConfig) -> None:
            raise error

        return stage

    assert capsys.readouterr().err == ""
    assert run_stage(TrainConfig, fails(UserError("the file is bad")), words) == 2
    assert capsys.readouterr().err == "error: the file is bad\n"
    assert run_stage(TrainConfig, fails(OSError(28, "No space left on device")), words) == 2
    assert "No space left" in capsys.readouterr().err
    assert run_stage(TrainConfig, fails(UserError("x")), [*words, "--no_such"]) == 2
    assert "unknown flag --no_such" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # rank 0 has said it
    assert run_stage(TrainConfig, fails(UserError("the file is bad")), words) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # ours: with its traceback
        run_stage(TrainConfig, fails(ZeroDivisionError()), words)
    assert logging.getLogger("datasets").level == logging.WARNING


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_flag_with_its_default(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no hyphenation
    config_class, _ = STAGES[stage]
    with pytest.raises(SystemExit) as caught:
        parse_config(config_class, ["--help"])
    assert caught.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(config_class):
        assert f" --{f.name}" in text
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "" if default is MISSING else f" (default: {default})"
        assert " ".join(f.metadata["help"].replace("%%", "%").split()) + shown in text


# --- FlagEmbedding's flags --------------------------------------------------------------------------------------------

GOLDEN = json.loads((ROOT / "tests" / "golden" / "flagembedding_flags.json").read_text(encoding="utf-8"))
FLAGS = [(stage, name) for stage, flags in GOLDEN.items() for name in flags]
COMPANIONS = {  # what a flag needs beside it
    "use_mrl": ["--mrl_dims", "8"],
    "mrl_dims": ["--use_mrl"],
    "eval_steps": ["--val_data", "v"],
    "corpus_data": ["--val_data", "v", "w"],  # as many as corpora
}
SAMPLES = {"query_instruction_format": "{}-{}", "passage_instruction_format": "{}-{}", "range_for_sampling": "3-30",
           "report_to": "tensorboard", "kd_loss_type": "m3_kd_loss", "sentence_pooling_method": "mean",
           "lr_scheduler_type": "cosine"}  # fmt: skip


def field_of(config_class: type, flag: str) -> Any:
    """The dataclass field behind a flag or its alias."""
    return next(f for f in fields(config_class) if flag == f.name or f"--{flag}" in f.metadata.get("aliases", []))


def sample_of(field: Any) -> tuple[list[str], Any]:
    """Words for a flag, and the value that they mean: another one than the default."""
    kind = field.type
    kinds = (kind, *get_args(kind))
    if field.name in SAMPLES:
        return [SAMPLES[field.name]], SAMPLES[field.name]
    if bool in kinds:
        return [str(not field.default)], not field.default
    if kind == list[int]:
        return ["8", "16"], [8, 16]
    if kind == list[str]:
        return ["x", "y"], ["x", "y"]
    if int in kinds:
        return ["3"], 3
    if float in kinds:
        return ["0.25"], 0.25
    return ["x"], "x"


@pytest.mark.parametrize("stage, flag", FLAGS)
def test_a_flag_of_flagembedding_is_kept_renamed_or_refused_with_a_reason(stage: str, flag: str) -> None:
    config_class, required = STAGES[stage]
    entry = GOLDEN[stage][flag]
    assert entry["verdict"] in ("same", "renamed", "refused")
    if entry["verdict"] != "refused":
        field = field_of(config_class, entry["ours"])
        words, value = sample_of(field)
        extra = COMPANIONS.get(flag, [])
        config = parse_config(config_class, [*required, *extra, f"--{entry['ours']}", *words])
        assert getattr(config, field.name) == value
    if entry["verdict"] == "same":
        assert entry["ours"] == flag
        return
    with pytest.raises(UserError) as caught:
        parse_config(config_class, [*required, f"--{flag}", "1"])
    assert str(caught.value) == f"unknown flag --{flag}: {REFUSED[flag]}"
    if entry["verdict"] == "renamed":
        assert f"--{entry['ours']}" in REFUSED[flag]
    else:
        assert entry["why"] and len(REFUSED[flag]) > 10


def test_every_refusal_is_in_the_golden_list() -> None:
    listed = {flag for flags in GOLDEN.values() for flag, entry in flags.items() if entry["verdict"] != "same"}
    assert set(REFUSED) <= listed
    known = {f.name for config_class, _ in STAGES.values() for f in fields(config_class)}
    assert known & set(REFUSED) == {"index_factory"}  # mining has it, evaluation refuses it


def test_a_script_collects_garbage_again_once_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts switch it off while they import; a caller who imports a script sees nothing of that."""
    monkeypatch.setattr(gc, "freeze", lambda: None)  # it would hold what the other tests leave behind
    seen = []
    gc.disable()
    try:
        words = ["--input_dir", "in", "--output_dir", "out"]
        assert run_stage(PrepareConfig, lambda config: seen.append(gc.isenabled()), words) == 0
    finally:
        gc.enable()
    assert seen == [True]
    for script in ("prepare", "mine", "train", "merge", "evaluate"):
        importlib.import_module(script)
        assert gc.isenabled()
