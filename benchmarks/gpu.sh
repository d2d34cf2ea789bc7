#!/bin/bash
# Everything that one GPU can say about this program, in at most six minutes: parity with torch, kill and resume, the
# tests marked `gpu`, steps of three models and their variants, TRL and vLLM if there is a Python that has them.
#
#   bash benchmarks/gpu.sh [OUT.jsonl] [FLAGS OF benchmarks/gpu.py]
#   PEERS=peers/bin/python bash benchmarks/gpu.sh       beside TRL, and vLLM if installed there
#   SECONDS_IN_ALL=2100 bash benchmarks/gpu.sh          all parts, not only those that fit into six minutes
#   JAX_PLATFORMS=cpu bash benchmarks/gpu.sh try.jsonl --small    tiny shapes, to try it without a GPU
#
# Each part has its own time limit (benchmarks/gpu.py); one that fails or hangs spoils no other, and one that no longer
# fits into the time is named as not run. OUT.jsonl gets a line for each as soon as it ends, with the device's name. The
# table comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
out=gpu.jsonl
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  out=$1
  shift
fi
peers=()
[ -z "${PEERS:-}" ] || peers=(--peers_python="$PEERS")
[ -z "${TOKENIZER:-}" ] || peers+=(--tokenizer="$TOKENIZER")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" benchmarks/gpu.py --out="$out" --seconds="${SECONDS_IN_ALL:-350}" "${peers[@]}" "$@"
