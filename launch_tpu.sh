#!/usr/bin/env bash
# Makes (or takes again) a Cloud TPU VM, installs camopd_jax on every worker and runs one command on all of them.
# A preempted TPU is made anew and the same command started again: the run goes on from its last checkpoint.

set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch_tpu.sh --name=NAME --zone=ZONE --type=TYPE [options] -- --config=configs/NAME.py --workdir=gs://...

  --name=NAME        of the TPU VM; one of that name is taken again
  --zone=ZONE        for example us-central2-b
  --type=TYPE        accelerator type: v5litepod-16, v6e-8, v4-32 ...
  --version=VERSION  image (default: tpu-ubuntu2204-base; v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5-lite for v5e)
  --project=PROJECT  (default: gcloud's own)
  --module=MODULE    what runs: camopd_jax.train (default), camopd_jax.sft, ...
  --spot             a spot TPU: cheaper, and preempted at any time
  --delete           delete the TPU VM when the command is done
  --dry-run          print every command and run none

All after -- goes to the command. --workdir has to be a gs:// path: the workers share it, and it outlives them.
Needs gcloud, logged in, with the Cloud TPU API on.
TEXT
}

mistake() {
  echo "error: $*" >&2
  exit 2
}

name="" zone="" type="" version="tpu-ubuntu2204-base" module="camopd_jax.train" spot="" delete="" dry=""
project=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project=(--project="${1#*=}") ;;
    --module=*) module="${1#*=}" ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) mistake "$1 is not an option; see --help (the command's own flags come after --)" ;;
  esac
  shift
done
[[ -n "$name" ]] || mistake "--name is missing; for example --name=camopd"
[[ -n "$zone" ]] || mistake "--zone is missing; for example --zone=us-central2-b"
[[ -n "$type" ]] || mistake "--type is missing; for example --type=v5litepod-16"
[[ " $*" == *" --workdir=gs://"* ]] || mistake "--workdir=gs://... is missing after --; the workers share it"

cd "$(dirname "${BASH_SOURCE[0]}")"
where=("$name" --zone="$zone" ${project[@]+"${project[@]}"})
archive="$(mktemp -d)/camopd_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT

run() { # prints a command, and runs it unless --dry-run
  printf '+' && printf ' %q' "$@" && echo
  [[ -n "$dry" ]] || "$@"
}

tpu() { run gcloud compute tpus tpu-vm "$@"; }

on_all() { tpu ssh "${where[@]}" --worker=all --command="$1"; }

state() { # READY, CREATING, PREEMPTED ...; NONE where there is no such TPU
  if [[ -n "$dry" ]]; then
    echo NONE
  else
    gcloud compute tpus tpu-vm describe "${where[@]}" --format='value(state)' 2>/dev/null || echo NONE
  fi
}

provide() { # a TPU that is READY
  local now
  now="$(state)"
  while [[ "$now" == CREATING || "$now" == STARTING || "$now" == RESTARTING || "$now" == REPAIRING ]]; do
    echo "$name is $now"
    sleep "${LAUNCH_TPU_WAIT:-20}"
    now="$(state)"
  done
  if [[ "$now" == STOPPED ]]; then
    tpu start "${where[@]}"
  elif [[ "$now" != READY ]]; then
    [[ "$now" == NONE ]] || tpu delete "${where[@]}" --quiet
    until tpu create "${where[@]}" --accelerator-type="$type" --version="$version" ${spot:+--spot}; do
      echo "no $type in $zone now; asked again soon"
      sleep "${LAUNCH_TPU_WAIT:-60}"
    done
  fi
}

install() { # the tracked files of this checkout, as they are here, into a fresh environment on every worker
  run bash -c 'git ls-files -z | tar --null --files-from=- -czf "$1"' - "$archive"
  tpu scp "$archive" "$name:camopd_jax.tar.gz" --zone="$zone" ${project[@]+"${project[@]}"} --worker=all
  on_all 'set -e; rm -rf camopd_jax && mkdir camopd_jax && tar -xzf camopd_jax.tar.gz -C camopd_jax
python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.12 camopd_jax/.venv
python3 -m uv pip install -q --python camopd_jax/.venv/bin/python "./camopd_jax[tpu]"'
}

command="CAMOPD_DISTRIBUTED=1 .venv/bin/python -m $module$(printf ' %q' "$@")"
# A run that a lost connection left behind gets SIGTERM first: it saves, and ends.
start="cd camopd_jax && { pkill -TERM -f '[p]ython -m $module' && sleep 120; true; }; $command"

provide
install
while true; do
  code=0
  on_all "$start" || code=$?
  if [[ $code -eq 0 ]]; then
    break
  fi
  now="$(state)"
  if [[ "$now" == READY && $code -ne 255 ]]; then
    echo "error: the command ended with exit code $code on a TPU that is up; its last lines above tell why" >&2
    exit "$code"
  fi
  echo "$name is $now (exit code $code): starting again from the last checkpoint"
  if [[ "$now" != READY ]]; then
    provide
    install
  fi
done
if [[ -n "$delete" ]]; then
  tpu delete "${where[@]}" --quiet
fi
