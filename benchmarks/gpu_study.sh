#!/bin/bash
# The study of configs/smollm2_study.py on one GPU, from the original model to the table: fine-tuning, three methods,
# three seeds, report. Aim: within 9 minutes on an H100 (not run there). The same command continues after a stop.
#
#   bash benchmarks/gpu_study.sh pack MODEL PIECES       MODEL, a Hugging Face folder, as files of at most 38 MiB
#   bash benchmarks/gpu_study.sh run PIECES DATA OUT     DATA: the folder with the JSONL files of configs/smollm2.py
#   bash benchmarks/gpu_study.sh try PIECES DATA OUT     the same at a small size, to try it on a CPU
#
# PIECES may be MODEL itself. SEEDS, RATES and METHODS in the environment change the grid.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

repository=$(cd "$(dirname "$0")/.." && pwd)
case "${1:-}-$#" in pack-3 | run-4 | try-4) ;; *) usage ;; esac
[ -d "$2" ] || { echo "$2: no such folder" >&2; exit 2; }

if [ "$1" = pack ]; then
  mkdir -p "$3"
  rm -f "$3"/model.tar.xz.*
  tar -C "$2" -c . | xz -T0 -6 | split -b 38M -d -a 3 - "$3/model.tar.xz."
  ls -l "$3"
  exit
fi

pieces=$(realpath "$2")
data=$(realpath "$3")
for name in general_open medqa_dev medmcqa gsm8k_test ifeval medqa_test; do
  [ -s "$data/$name.jsonl" ] || { echo "$data/$name.jsonl is missing" >&2; exit 2; }
done
mkdir -p "$4"
cd "$4"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=$PWD/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1 PYTHONUNBUFFERED=1

model=$pieces
if [ ! -e "$pieces/config.json" ]; then
  model=$PWD/original
  if [ ! -e original ]; then
    mkdir -p unpacked
    cat "$pieces"/model.tar.xz.* | tar -C unpacked -xJ
    mv unpacked original
  fi
fi

small_sft=() small=()
rm -rf data
if [ "$1" = run ]; then
  ln -s "$data" data
else # the 24 shortest rows of each file (sed reads all of them, where head would break the pipe)
  mkdir data
  for file in "$data"/*.jsonl; do
    awk '{ print length($0) "\t" $0 }' "$file" | sort -n -s -k 1,1 | sed -n 1,24p | cut -f 2- > "data/$(basename "$file")"
  done
  SEEDS=${SEEDS:-1}
  small_sft=(--config.steps=2 --config.batch_size=4 --config.optimizer.micro_batch=4 --config.optimizer.warmup_steps=0)
  small=(--config.steps=2 --config.rollout.batch_size=4 --config.rollout.max_response_tokens=16
         --config.optimizer.micro_batch=4 --config.evaluation.batch_size=24)
fi

started=$SECONDS
step() { echo "$((SECONDS - started)) s: $*"; }
if [ ! -e runs/smollm2_medical/export ]; then
  python -m camopd_jax.sft --config="$repository/configs/smollm2_sft.py" --workdir=runs/smollm2_medical \
    --config.model="$model" "${small_sft[@]}"
fi
step "fine-tuned"
python -m camopd_jax.compare --config="$repository/configs/smollm2_study.py" --workdir=runs/study \
  --config.general_model="$model" --methods="${METHODS:-vanilla,camopd,recover}" --rates="${RATES:-5e-5}" \
  --seeds="${SEEDS:-3}" --workers=1 "${small[@]}"
step "compared"
python -m camopd_jax.report runs/study --out=study.html
cp runs/study/study.json study.json
step "study.json and study.html are in $PWD"
