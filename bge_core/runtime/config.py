"""One dataclass a stage: the names of its flags and YAML keys, their types, defaults and bounds. cli.py reads them.

What several stages share is in flags.py; a stage states again what is otherwise with it.
"""

import json
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from bge_core import UserError
from bge_core.runtime.flags import (
    ABOVE_0,
    BELOW_1,
    DECAY,
    FROM_0,
    LIKENESS,
    SHARE,
    CorpusStage,
    EncodingStage,
    ModelStage,
    Stage,
    flag,
    need,
    need_one_of,
    required,
)
from bge_core.runtime.refused import advice

MergeMethod = Literal["linear", "slerp", "task_arithmetic", "ties", "greedy_soup"]
MergeType = Literal["float32", "float16", "bfloat16", "keep"]
SCHEDULES = (  # those of transformers that are a function of the step alone
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip


def _two_placeholders(name: str, value: str) -> str:
    value = value.replace("\\n", "\n")
    try:
        value.format("", "")
        complete = value.count("{}") == 2
    except (IndexError, KeyError, ValueError):
        complete = False
    need(complete, name, value, "must hold '{}' twice: first the instruction, then the text")
    need(
        value.endswith("{}"),
        name,
        value,
        "no prompt of a saved model can hold what stands behind the text: end with '{}'",
    )
    return value


@dataclass(kw_only=True)
class PrepareConfig(Stage):
    """Raw question/answer files -> train.jsonl, test.jsonl, corpus.jsonl."""

    input_dir: str = required(
        "Folder (or one file) with .jsonl .json .csv .tsv .xlsx .parquet files; read recursively."
    )
    output_dir: str = required("Where train.jsonl, test.jsonl, corpus.jsonl and manifest.json go.")
    train_num: int | None = flag(None, "At most this many training rows. Default: nine tenths of the rows.", ABOVE_0)
    split_by: Literal["group", "question"] = flag(
        "group", "group: no question and no answer on both sides. question: new questions about known answers."
    )
    query_field: str | None = flag(
        None, "Column of the question, or its place from 1 without a header line; default: found by common names."
    )
    answer_field: str | None = flag(None, "Column of the answer, likewise.")
    min_label: float | None = flag(None, "Of a column of scores: rows at or above this are pairs, others are left out.")
    strip_html: bool = flag(False, "Take the tags out of cells that hold HTML.")
    seed: int = flag(42, "Seed of the split.")
    overwrite_output_dir: bool = flag(False, "Replace the files of an earlier run in output_dir.")


@dataclass(kw_only=True)
class MineConfig(CorpusStage):
    """Training data -> training data with hard negatives, found with faiss."""

    model_name_or_path: str | None = flag(None, "Encoder that finds the negatives.", alias="embedder_name_or_path")
    input_file: list[str] = flag([], "Training data (query, pos, optional neg): JSONL, parquet, folders, hub names.")
    output_file: str | None = flag(None, "Where the rows with their mined `neg` go.")
    candidate_pool: list[str] = flag(
        [], "Texts to choose from (`text`, optional `title`); default: the distinct pos and neg of input_file."
    )
    # where to look
    retriever: Literal["dense", "bm25", "hybrid"] = flag(
        "dense", "dense: by vectors; bm25: by words; hybrid: both, fused by reciprocal rank."
    )
    range_for_sampling: str = flag("10-210", "a-b: sample from hits [a, b) of the ranking counted from 0.")
    use_gpu_for_searching: bool = flag(False, "Search with faiss on the GPUs.")
    index_factory: str = flag("Flat", "faiss index: Flat is exact; HNSW32, 'IVF4096,PQ64', ... are faster on millions.")
    index_path: str | None = flag(
        None, "Its file, reused if it fits. Default: in embedding_cache_dir, if there is one."
    )
    search_memory: int = flag(512, "MiB to search in; larger arrays are searched block by block.", ABOVE_0)
    # what is no negative
    guard_identical: bool = flag(True, "Exclude texts with the letters and digits of a positive.")
    guard_near_duplicates: bool = flag(True, "Exclude texts that say what a positive says in nearly the same words.")
    near_duplicate_threshold: float = flag(0.82, "How much of what they say they must share, 0 to 1.", LIKENESS)
    guard_same_questions: bool = flag(True, "Exclude positives of questions that are the same or nearly so.")
    same_question_threshold: float = flag(0.8, "How much of the questions must be shared, 0 to 1.", LIKENESS)
    guard_answers: bool = flag(True, "Exclude texts that hold the row's `answer`, if it states one.")
    max_score: float | None = flag(None, "Highest score of a negative.")
    min_score: float | None = flag(None, "Lowest score of a negative.")
    absolute_margin: float | None = flag(None, "A negative scores at least this much below its positive.", FROM_0)
    relative_margin: float | None = flag(None, "A negative scores at most (1 - this) times its positive.", FROM_0)
    # what to take
    negative_number: int = flag(15, "Negatives per query.", ABOVE_0)
    sampling: Literal["uniform", "top", "score"] = flag(
        "uniform", "From the range: each hit equally likely, the highest ones, or by exp(score / temperature)."
    )
    sampling_temperature: float = flag(0.05, "Of --sampling score; smaller: harder negatives.", ABOVE_0)
    keep_neg: bool = flag(False, "Keep the input's own negatives and add the mined ones behind them.")
    seed: int = flag(42, "Seed of the sampling.")
    # a teacher
    reranker_name_or_path: str | None = flag(
        None, "Cross-encoder whose scores become pos_scores and neg_scores, for --knowledge_distillation."
    )
    reranker_max_length: int = flag(512, "Longest query and passage together in tokens.", ABOVE_0)
    teacher_encoder: str | None = flag(None, "The same with a second encoder's cosines.")
    teacher_margin: float | None = flag(
        None, "A negative's teacher score is at least this much below its positive's.", FROM_0
    )
    teacher_temperature: float | None = flag(
        None, "Divides the scores that are written. Default: 0.02 for cosines, 1 for a cross-encoder.", ABOVE_0
    )
    # the cache
    cache_dtype: Literal["float32", "float16"] = flag("float32", "Type of the vectors in the cache.")
    clean_cache: bool = flag(False, "When done, remove what embedding_cache_dir holds of other models and settings.")
    # look at it
    inspect: int = flag(0, "Show this many rows with their negatives and scores.", FROM_0)
    report: str | None = flag(None, "The report, one HTML file. Default: <output_file>.report.html.")
    check: str | None = flag(None, "Only look at a training file, and mine nothing: duplicates, contradictions, ...")
    check_against: str | None = flag(None, "With --check: test data whose questions must not be in it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            self.min_score is None or self.max_score is None or self.min_score < self.max_score,
            "min_score",
            self.min_score,
            f"is not below --max_score {self.max_score}",
        )
        two = self.reranker_name_or_path and self.teacher_encoder
        need(not two, "teacher_encoder", self.teacher_encoder, "cannot go with --reranker_name_or_path: choose one")
        teacher = self.reranker_name_or_path or self.teacher_encoder
        for name in ("teacher_margin", "teacher_temperature"):
            value = getattr(self, name)
            need(value is None or bool(teacher), name, value, "needs --reranker_name_or_path or --teacher_encoder")
        need(self.check_against is None or self.check is not None, "check_against", self.check_against, "needs --check")
        for name in () if self.check is not None else ("model_name_or_path", "input_file", "output_file"):
            if not getattr(self, name):
                raise UserError(f"the following arguments are required: --{name}; --help lists the flags")
        needs = "needs --embedding_cache_dir"
        need(not self.clean_cache or self.embedding_cache_dir is not None, "clean_cache", True, needs)
        _ = self.sampling_range

    @property
    def guards(self) -> bool:
        """Whether any guard stands."""
        return self.guard_identical or self.guard_near_duplicates or self.guard_same_questions or self.guard_answers

    @property
    def sampling_range(self) -> tuple[int, int]:
        """(a, b) of range_for_sampling "a-b": hits a (included) to b (excluded), counted from 0."""
        try:
            start, end = (int(part) for part in self.range_for_sampling.split("-"))
        except ValueError:
            start, end = 0, -1
        need(0 <= start < end, "range_for_sampling", self.range_for_sampling, "write two rising ranks, as 2-200")
        return start, end


@dataclass(kw_only=True)
class TrainConfig(EncodingStage):
    """Training data -> a fine-tuned encoder; names and defaults of FlagEmbedding and transformers."""

    # model
    model_name_or_path: str = required("Hub name or folder of the encoder to fine-tune.", alias="embedder_name_or_path")
    output_dir: str = required("Run folder: final model, checkpoints, metrics.jsonl, curves.png, manifest.json.")
    train_data: list[str] = required("Files (jsonl, parquet), folders, hub names or a sources.yaml.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it lies elsewhere than the model.")
    cache_dir: str | None = flag(None, "Folder of the hub's downloads.")
    token: str | None = flag(None, "Hub token; default: the environment's HF_TOKEN.")
    normalize_embeddings: bool = flag(True, "Scale vectors to length 1, so that scores are cosines.", alias="normlized")
    fix_position_embedding: bool = flag(False, "Freeze the position embeddings.")
    attention_dropout: float | None = flag(None, "Dropout of attention weights. Default: the checkpoint's.", BELOW_1)
    # data
    train_group_size: int = flag(
        8, "Passages per query: one positive and train_group_size - 1 of its negatives.", ABOVE_0
    )
    query_max_len: int = flag(32, "Longest query in tokens.", ABOVE_0)
    passage_max_len: int = flag(128, "Longest passage in tokens.", ABOVE_0)
    query_instruction_format: str = flag("{}{}", "How instruction and query are joined.")
    passage_instruction_format: str = flag("{}{}", "How instruction and passage are joined.")
    max_example_num_per_dataset: int = flag(
        100_000_000, "At most this many rows of each file, drawn with the seed.", ABOVE_0
    )
    same_dataset_within_batch: bool = flag(False, "All rows of a batch come from the same file.")
    dataloader_drop_last: bool = flag(False, "Leave out the last, smaller batch of an epoch.")
    dataloader_num_workers: int = flag(1, "Processes that tokenize ahead; 0: the training process itself.", FROM_0)
    # loss
    temperature: float = flag(0.02, "Scores are divided by it.", ABOVE_0)
    negatives_cross_device: bool = flag(False, "Passages of every process are negatives for every query.")
    use_inbatch_neg: bool = flag(True, "Passages of other queries are negatives; False: a query's own passages alone.")
    exclude_positives: bool = flag(True, "A passage that is a known positive of the query is never its negative.")
    knowledge_distillation: bool = flag(False, "Learn from pos_scores and neg_scores.")
    kd_loss_type: Literal["kl_div", "m3_kd_loss"] = flag("kl_div", "Distillation loss.")
    use_mrl: bool = flag(False, "Matryoshka: the loss is the mean over mrl_dims.")
    mrl_dims: list[int] = flag([], "Leading dimensions that shall work alone.", ABOVE_0)
    loss: str | None = flag(None, "FILE.py:FUNCTION(LossInput, LossConfig) -> LossOutput instead of the built-in loss.")
    loss_args: str | None = flag(None, "JSON object, given to the loss as cfg.args.")
    loss_block_size: int | None = flag(
        None,
        "Rows of the score matrix at a time; 0: the whole matrix. Default: by size, about 16 MB a block.",
        FROM_0,
    )
    guide_encoder: str | None = flag(None, "Frozen encoder whose vectors a loss of your own sees, too (GISTEmbed).")
    # optimization
    num_train_epochs: float = flag(3.0, "Passes over the data; may be a fraction.")
    max_steps: int = flag(-1, "Optimizer updates; above 0 it beats num_train_epochs.")
    per_device_train_batch_size: int = flag(8, "Queries per process and micro-batch.", ABOVE_0)
    gradient_accumulation_steps: int | None = flag(
        None, "Micro-batches per update. Default: Accelerate's, else 1.", ABOVE_0
    )
    sub_batch_size: int | None = flag(
        None, "GradCache: encode this many texts at a time; memory no longer grows with the batch."
    )
    max_tokens: int | None = flag(None, "GradCache: encode texts of at most this many tokens at a time.", ABOVE_0)
    learning_rate: float = flag(5e-5, "Peak learning rate of AdamW.", ABOVE_0)
    lr_scheduler_type: str = flag("linear", "As in transformers: linear, cosine, constant, constant_with_warmup, ...")
    warmup_ratio: float = flag(0.0, "Warm-up as a share of all steps.", SHARE)
    warmup_steps: int = flag(0, "Warm-up in steps; above 0 it beats warmup_ratio.", FROM_0)
    weight_decay: float = flag(0.0, "Decoupled weight decay of matrices (never of biases and norms).", FROM_0)
    adam_beta1: float = flag(0.9, "AdamW's beta1.", BELOW_1)
    adam_beta2: float = flag(0.999, "AdamW's beta2.", BELOW_1)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", ABOVE_0)
    ema_decay: float | None = flag(
        None, "Evaluate and publish a moving average of the weights, with this decay.", DECAY
    )
    max_grad_norm: float = flag(1.0, "Clip the whole gradient to this norm; 0: never.", FROM_0)
    fp16: bool = flag(False, "float16 autocast with loss scaling (GPU).")
    gradient_checkpointing: bool = flag(False, "Trade time for activation memory.")
    torch_compile: bool = flag(False, "Compile the layers (needs a C++ compiler, on GPUs Triton).")
    fsdp: bool = flag(False, "FSDP2 instead of DDP: weights, gradients and AdamW's state lie in shards.")
    ddp_timeout: int = flag(
        1800, "Seconds that processes wait for one that hangs; then all end, and it is named.", ABOVE_0
    )
    seed: int = flag(42, "Seed of data order, choice of passages and dropout.")
    full_determinism: bool = flag(
        False, "Deterministic GPU kernels: slower, the same bits in every run.", alias="deterministic"
    )
    # run folder
    logging_steps: int = flag(10, "Steps between two lines of metrics.jsonl.", ABOVE_0)
    save_steps: float = flag(500, "Steps between two checkpoints; below 1: that share of all steps; 0: none.", FROM_0)
    save_total_limit: int | None = flag(None, "Keep this many newest checkpoints (and the best).", ABOVE_0)
    resume_from_checkpoint: str | None = flag(None, "'latest', or the path of a checkpoint.")
    allow_changed: list[str] = flag([], "Settings that may differ from those of the run that is resumed.")
    overwrite_output_dir: bool = flag(False, "Begin anew in a folder that holds another run.")
    report_to: str = flag("none", "tensorboard, wandb or none.")
    run_name: str | None = flag(None, "Name of the run for the tracker.")
    # evaluation while training
    val_data: str | None = flag(None, "Evaluation data (query, pos); scored every eval_steps and at the end.")
    val_corpus: str | None = flag(None, "Corpus to search; default: the distinct pos and neg of val_data.")
    eval_steps: float | None = flag(
        None, "Steps between two evaluations, as save_steps; 0: at the end alone. Default: save_steps.", FROM_0
    )
    per_device_eval_batch_size: int | None = flag(None, "At most this many texts per batch of the evaluation.", ABOVE_0)
    metric_for_best_model: str = flag("MRR@10", "Of the best checkpoint: MRR@1, 10, 100, Recall@1, 10, 100, nDCG@10.")
    load_best_model_at_end: bool = flag(False, "The final model is that of the best evaluation.")
    early_stopping_patience: int | None = flag(None, "Stop after this many evaluations without a better one.", ABOVE_0)
    # look before you train
    show_batch: bool = flag(False, "Print one batch, decoded, and end.")
    plan: bool = flag(False, "Print what the run will take (memory, time, checkpoints, ...), and end; stdout: JSON.")

    def __post_init__(self) -> None:
        if self.sub_batch_size is not None and self.sub_batch_size <= 0:
            self.sub_batch_size = None  # FlagEmbedding's -1: off
        super().__post_init__()
        if self.max_steps <= 0:
            need(ABOVE_0.holds(self.num_train_epochs), "num_train_epochs", self.num_train_epochs, ABOVE_0.remedy)
        need(
            self.guide_encoder is None or self.loss is not None,
            "guide_encoder",
            self.guide_encoder,
            "the built-in loss asks no guide: add --loss examples/losses/gist.py:gist_loss, or your own",
        )
        remedy = "go with --use_mrl, as --use_mrl --mrl_dims 256 512"
        need(self.use_mrl == bool(self.mrl_dims), "mrl_dims", self.mrl_dims, remedy)
        need_one_of("report_to", self.report_to, ("tensorboard", "wandb", "none"))
        need_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        need(
            self.negatives_cross_device <= self.use_inbatch_neg,
            "negatives_cross_device",
            True,
            "needs in-batch negatives: drop --use_inbatch_neg False",
        )
        names = {f.name for f in fields(self)}
        for name in self.allow_changed:
            need(name in names, "allow_changed", name, f"is no setting; {advice(name, names)}")
        if self.val_data is None:
            self._need_unset("load_best_model_at_end early_stopping_patience eval_steps val_corpus", "needs --val_data")
        self.query_instruction_format = _two_placeholders("query_instruction_format", self.query_instruction_format)
        self.passage_instruction_format = _two_placeholders(
            "passage_instruction_format", self.passage_instruction_format
        )
        _ = self.parsed_loss_args

    @property
    def parsed_loss_args(self) -> dict[str, Any]:
        """loss_args as the object it states, {} without."""
        try:
            args: Any = json.loads(self.loss_args) if self.loss_args else {}
        except json.JSONDecodeError:
            args = None
        need(isinstance(args, dict), "loss_args", self.loss_args, """write a JSON object, as '{"margin": 0.1}'""")
        return cast(dict[str, Any], args)


@dataclass(kw_only=True)
class MergeConfig(ModelStage):
    """Several checkpoints -> one model: their weighted average, or merged in another way."""

    models: list[str] = required("Two or more hub names or folders.")
    output_path: str = required("Where the merged model goes.")
    method: MergeMethod = flag("linear", "Weighted average; slerp, task_arithmetic, ties; greedy_soup of checkpoints.")
    weights: list[float] = flag([], "One a model, summing to 1 (task_arithmetic: any). Default: equal.")
    base_model: str | None = flag(None, "Of task_arithmetic and ties: the model that those of --models started from.")
    density: float | None = flag(None, "Of ties: the share of each difference that is kept, by size. Default: 0.2.")
    dtype: MergeType = flag("float32", "Type of the merged weights; keep: that of the first model.")
    prompts_from: str | None = flag(None, "The model whose prompts the result states, where two state different ones.")
    example_data: str | None = flag(None, "JSONL with query, pos, neg: weights from each model's loss on it.")
    sweep: str | None = flag(None, "start:stop:step: measure these weights of the second model, and write the best.")
    val_data: str | None = flag(None, "Of sweep and greedy_soup: test set of the domain, as evaluate.py reads it.")
    corpus: str | None = flag(None, "Its corpus; default: the distinct pos and neg of val_data.")
    general_data: str | None = flag(None, "Of sweep: test set of what should not get significantly worse.")
    general_corpus: str | None = flag(None, "Its corpus; default: the distinct pos and neg of general_data.")
    general_weight: float | None = flag(
        None, "Of sweep: choose by (1 - a) domain + a general instead, 0 <= a <= 1.", SHARE
    )
    metric: str | None = flag(None, "Of sweep and greedy_soup: what decides. Default: MRR@10.")
    temperature: float = flag(5.0, "Of the softmax over the losses; larger: more equal weights.", ABOVE_0)
    neg_number: int = flag(7, "Negatives per example when the loss is computed.")
    max_input_length: int = flag(512, "Longest text in tokens when a loss or a score is computed.", ABOVE_0)
    batch_size: int = flag(2, "Examples per batch when the loss is computed.", ABOVE_0)
    seed: int = flag(42, "Seed of the choice of negatives, and of the sweep's intervals.", FROM_0)
    overwrite_output_dir: bool = flag(False, "Replace an earlier model in output_path.")
    cache_dir: str | None = flag(None, "Folder of the hub's downloads.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "greedy_soup" or self.sweep:
            name = "method" if self.method == "greedy_soup" else "sweep"
            need(self.val_data is not None, name, getattr(self, name), "needs --val_data, to score on")
            self._need_unset("weights example_data", "--sweep and --method greedy_soup find the weights: drop it")
        else:
            remedy = "goes with --sweep or --method greedy_soup alone: drop it"
            self._need_unset("val_data corpus metric fp16 bf16", remedy)
        if self.sweep:
            need(len(self.models) == 2, "sweep", self.sweep, "takes two models: the base, then the fine-tuned one")
            need(self.method == "linear", "sweep", self.sweep, "goes with --method linear")
        else:
            self._need_unset("general_data general_corpus general_weight", "goes with --sweep alone: drop it")
        if self.general_data is None:
            self._need_unset("general_corpus general_weight", "needs --general_data")


@dataclass(kw_only=True)
class EvaluateConfig(CorpusStage):
    """One or more encoders and evaluation data -> metrics by exact search, with intervals, tests and a report."""

    val_data: list[str] = required("Test sets: JSONL with query and pos, BEIR folders, hub names; with --run: qrels.")
    encoder: list[str] = flag([], "One or more hub names or folders; the first is what the others are compared with.")
    corpus: list[str] = flag(
        [],
        "JSONL with text, folders. One test set: all of them; several: one for all, or one each. Default: own texts.",
    )
    run: list[str] = flag([], "TREC run files to score, in place of encoders.")
    k: int = flag(100, "Depth of the ranking; a deeper one of --metrics counts.", ABOVE_0)
    metrics: list[str] = flag([], "Such as MRR@10 nDCG@20 Recall@100 MAP@100 Precision@5 Success@1 CappedRecall@10.")
    add_instruction: bool = flag(False, "Use the model's stored prompts, else BGE's instruction for its language.")
    query_instruction_for_retrieval: str | None = flag(None, "Put before each query; beats --add_instruction.")
    passage_instruction_for_retrieval: str | None = flag(None, "Put before each passage; beats --add_instruction.")
    query_max_len: int = flag(64, "Longest query in tokens.", ABOVE_0, alias="max_query_length")
    passage_max_len: int = flag(512, "Longest passage in tokens.", ABOVE_0, alias="max_passage_length")
    # what it costs
    dims: list[int] = flag([], "Also with vectors cut to these dimensions.")
    dtypes: list[str] = flag([], "Also with vectors kept as float32, float16, int8 or binary.")
    index_factories: list[str] = flag([], "Also with these faiss indexes, as HNSW32 or IVF256,PQ48.")
    # how sure
    resamples: int = flag(10_000, "Of the bootstrap and of the permutation test.", ABOVE_0)
    seed: int = flag(0, "Of both.", FROM_0)
    # what is written
    output_dir: str | None = flag(None, "Where the report, plots, metrics, rankings and the manifest go.")
    overwrite_output_dir: bool = flag(False, "Replace the files of an earlier evaluation in output_dir.")
    lang: Literal["en", "zh"] = flag("en", "Language of the report.")
    update_model_card: bool = flag(False, "Write scores and thresholds into the README.md of each encoder's folder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            bool(self.encoder) != bool(self.run), "encoder", self.encoder, "name models to encode with, or --run files"
        )
        if self.run:
            self._need_unset(
                "corpus dims dtypes index_factories update_model_card embedding_cache_dir add_instruction fp16 bf16 "
                "max_tokens query_instruction_for_retrieval passage_instruction_for_retrieval query_prompt_name "
                "passage_prompt_name sentence_pooling_method",
                "has no meaning with --run",
            )
            need(self.lang == "en", "lang", self.lang, "has no meaning with --run, which writes no report")
            need(len(self.val_data) == 1, "val_data", self.val_data, "with --run: one file of qrels")
        fits = len(self.val_data) == 1 or len(self.corpus) in (0, 1, len(self.val_data))
        need(fits, "corpus", self.corpus, f"give one for all, or one for each of {len(self.val_data)} test sets")
        for dtype in self.dtypes:
            need_one_of("dtypes", dtype, ("float32", "float16", "int8", "binary"))
