#!/usr/bin/env bash
# The whole job on CMRC 2018 (real Chinese questions, 13,728 sentences), with CLS and with mean pooling, three seeds.
#
#   bash benchmarks/cmrc.sh        (or: make bench)          CMRC=folder SEEDS="42 43 44" PRECISION="--bf16"
#
# CMRC holds qa/, train.jsonl, test.jsonl, corpus.jsonl. What is finished is not run again: a stopped benchmark goes on
# where it was. Everything lands in outputs/cmrc, the table in benchmarks/results/cmrc.md and cmrc.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CMRC=${CMRC:-../shared/data/cmrc}
SEEDS=${SEEDS:-42 43 44}
PRECISION=${PRECISION-}       # empty: float32
OUT=${OUT:-outputs/cmrc}
PYTHON=${PYTHON:-python}
[ -f "$CMRC/corpus.jsonl" ] || { echo "error: CMRC=$CMRC: holds no corpus.jsonl; name the folder of the data" >&2; exit 2; }
mkdir -p "$OUT"

# 1. prepare, on the raw pairs: what it counts is checked against what is known of the data.
if [ ! -f "$OUT/prepared/manifest.json" ]; then
    $PYTHON prepare.py --input_dir "$CMRC/qa" --output_dir "$OUT/prepared" --train_num 3219 --split_by question
fi
$PYTHON - "$OUT/prepared" "$CMRC/qa" <<'PYTHON'
import json, sys
from pathlib import Path
from bge_core.files.text import normalize_text as clean
prepared, raw = map(Path, sys.argv[1:])
rows = {name: [json.loads(line) for line in open(prepared / f"{name}.jsonl", encoding="utf-8")] for name in ("train", "test", "corpus")}
pairs = [json.loads(line) for file in sorted(raw.glob("*.jsonl")) for line in open(file, encoding="utf-8")]
full = [pair for pair in pairs if clean(pair["question"]) and clean(pair["answer"])]
questions, answers = {clean(pair["question"]) for pair in full}, {clean(pair["answer"]) for pair in full}
found = {clean(row["query"]) for name in ("train", "test") for row in rows[name]}
print(f"prepare: {len(pairs)} pairs, {len(pairs) - len(full)} with an empty side -> {len(rows['train'])} train + {len(rows['test'])} test questions, {len(rows['corpus'])} answers")
assert found == questions, (len(found), len(questions))
assert {clean(row["text"]) for row in rows["corpus"]} == answers
PYTHON

# 2. the recipe. The encoder was pretrained with mean pooling and says so; without those files it is a bare checkpoint,
# which everybody opens with CLS pooling.
$PYTHON examples/get_encoder.py --output outputs/encoder
mkdir -p "$OUT/base"
[ -e "$OUT/base/mean" ] || ln -s "$PWD/outputs/encoder" "$OUT/base/mean"
if [ ! -d "$OUT/base/cls" ]; then
    mkdir "$OUT/base/cls"
    for file in config.json model.safetensors tokenizer.json tokenizer_config.json; do
        ln -s "$PWD/outputs/encoder/$file" "$OUT/base/cls/$file"
    done
fi
NONE=(--query_instruction_for_retrieval "" --passage_instruction_for_retrieval "")

score() {  # score NAME MODEL
    [ -f "$OUT/scores/$1/manifest.json" ] || $PYTHON evaluate.py --encoder "$2" --val_data "$CMRC/test.jsonl" \
        --corpus "$CMRC/corpus.jsonl" --k 100 --max_query_length 64 --max_passage_length 128 $PRECISION \
        --output_dir "$OUT/scores/$1" --overwrite_output_dir
}
for pooling in mean cls; do
    base=$OUT/base/$pooling
    score "base-$pooling" "$base"
    mined=$OUT/mined-$pooling.jsonl
    [ -f "$mined.manifest.json" ] || $PYTHON mine.py --model_name_or_path "$base" --input_file "$CMRC/train.jsonl" \
        --output_file "$mined" --candidate_pool "$CMRC/corpus.jsonl" --range_for_sampling 2-200 --negative_number 15 \
        --query_max_len 64 --passage_max_len 128 "${NONE[@]}" $PRECISION
done
for seed in $SEEDS; do
    for pooling in mean cls; do
        base=$OUT/base/$pooling
        name=$pooling-$seed
        [ -f "$OUT/scores/trained-$name/manifest.json" ] || $PYTHON train.py --model_name_or_path "$base" --train_data "$OUT/mined-$pooling.jsonl" \
            --output_dir "$OUT/trained/$name" --learning_rate 2e-5 --lr_scheduler_type linear --num_train_epochs 1 \
            --per_device_train_batch_size 32 --train_group_size 2 --query_max_len 64 --passage_max_len 128 \
            --temperature 0.02 --max_grad_norm 1.0 --seed "$seed" --save_steps 25 --save_total_limit 1 \
            --resume_from_checkpoint latest "${NONE[@]}" $PRECISION
        score "trained-$name" "$OUT/trained/$name"
        [ "$seed" = "${SEEDS%% *}" ] || continue  # merging has no randomness of its own: the first seed shows it
        [ -f "$OUT/merged/$name/manifest.json" ] || $PYTHON merge.py --models "$base" "$OUT/trained/$name" \
            --weights 0.5 0.5 --output_path "$OUT/merged/$name"
        score "merged-$name" "$OUT/merged/$name"
    done
done
$PYTHON benchmarks/cmrc_table.py "$OUT/scores" --command "PRECISION=\"$PRECISION\" SEEDS=\"$SEEDS\" bash benchmarks/cmrc.sh"
