#!/usr/bin/env bash
# Creates a Cloud TPU (or uses an existing one), installs camopd_jax on every worker and runs a command on all of them.
# A preempted TPU is created again and the same command started again: the run continues from its last checkpoint.

set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch_tpu.sh --name=NAME --zone=ZONE --type=TYPE [options] -- --config=configs/NAME.py --workdir=gs://...

  --name=NAME        of the TPU VM, and of its queued resource; an existing one of this name is used again
  --zone=ZONE        for example us-central2-b
  --type=TYPE        accelerator type: v5litepod-16, v6e-8, v5p-8, v4-32 ... (TPU7x is not in this API)
  --version=VERSION  image (default: v2-alpha-tpuv6e, v2-alpha-tpuv5-lite, v2-alpha-tpuv5, else tpu-ubuntu2204-base)
  --project=PROJECT  (default: gcloud's own)
  --queued           request the TPU as a queued resource, and wait in Google's queue for it
  --spot             a spot TPU: cheaper, but it may be preempted at any time
  --module=MODULE    the command to run: camopd_jax.train (default), camopd_jax.sft, ...
  --with=PATH        also send this file or folder of the checkout, which git does not track: data/general; repeatable
  --env=NAME         pass this environment variable to the command, such as HF_TOKEN; repeatable
  --extras=EXTRAS    extras of the package (default: tpu; use tpu,eval for ifeval and the judge)
  --delete           delete the TPU when the command has ended, whether it succeeded or not
  --dry-run          print every command and run none

Everything after -- goes to the command. --workdir has to be a gs:// path, because the workers share it and it must
remain after they are gone.
The command does not depend on the connection: this script may be stopped. When it is started again, it first asks a run
that still goes on there to save and end.
If the command fails on a TPU that is up, it is started again, unless it failed three times in a row within ten minutes
each, or ten times in total. Exit code 2 means a mistake and ends the script at once.
Needs gcloud, logged in, with the Cloud TPU API enabled; several workers need the key in the ssh agent:
ssh-add ~/.ssh/google_compute_engine
TEXT
}

mistake() {
  echo "error: $*" >&2
  exit 2
}

name="" zone="" type="" version="" module="camopd_jax.train" extras="tpu"
queued="" spot="" delete="" dry="" here=""
project=() with=() env=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project=(--project="${1#*=}") ;;
    --module=*) module="${1#*=}" ;;
    --with=*) with+=("${1#*=}") ;;
    --env=*) env+=("${1#*=}") ;;
    --extras=*) extras="${1#*=}" ;;
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    --here=*) here="${1#*=}" ;; # on a worker, see below
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) mistake "$1 is not an option; see --help (the command's own flags come after --)" ;;
  esac
  shift
done
cd "$(dirname "${BASH_SOURCE[0]}")"

# ------------------------------------------------------------------------------------ on a worker

# gcloud connects again when a connection breaks, and gives the same command again. So the command runs apart from the
# connection, once an attempt; who connects again follows it. It leaves its process group, log and exit code behind.
# Asked to end it ends with 0, which is not the end of the run: then the code is 143.
if [[ -n "$here" ]]; then
  runs="$PWD/../camopd_jax.run"
  run="$runs/$here"
  mkdir -p "$runs"
  if mkdir "$run" 2>/dev/null; then
    : >"$run/log"
    # shellcheck source=/dev/null
    [[ ! -e launch.env ]] || source launch.env
    export CAMOPD_DISTRIBUTED=1
    # shellcheck disable=SC2016
    setsid bash -c 'stopped=0; trap "stopped=143" TERM; "$@"; code=$?
[[ $code -ne 0 ]] || code=$stopped; echo "$code" >"$0.part"; mv "$0.part" "$0"' \
      "$run/code" .venv/bin/python -m "$module" "$@" >>"$run/log" 2>&1 </dev/null &
    echo $! | tee "$runs/group" >"$run/group"
    tail -s 0.2 -n +1 --pid=$! -f "$run/log"
  else
    for _ in $(seq 50); do
      [[ ! -s "$run/group" ]] || break
      sleep 0.1
    done
    tail -s 0.2 -n 20 --pid="$(cat "$run/group")" -f "$run/log"
  fi
  exit "$(cat "$run/code" 2>/dev/null || echo 137)"
fi

# ------------------------------------------------------------------------------------------- here

[[ -n "$name" ]] || mistake "--name is missing; for example --name=camopd"
[[ -n "$zone" ]] || mistake "--zone is missing; for example --zone=us-central2-b"
[[ -n "$type" ]] || mistake "--type is missing; for example --type=v5litepod-16"
[[ " $*" == *" --workdir=gs://"* ]] || mistake "--workdir=gs://... is missing after --; the workers share it"
for path in ${with[@]+"${with[@]}"}; do
  [[ -e "$path" && "$path" != /* && "$path" != *..* ]] || mistake "--with=$path: give a path inside this checkout"
done
for variable in ${env[@]+"${env[@]}"}; do
  [[ "$variable" =~ ^[A-Za-z_][A-Za-z_0-9]*$ && -n "${!variable:-}" ]] || mistake "--env=$variable: it is not set here"
done
[[ -e .git ]] || mistake "$PWD is not a git checkout; the workers get the files that git tracks"
[[ -n "$dry" ]] || command -v gcloud >/dev/null || mistake "gcloud is not installed; see https://cloud.google.com/sdk"
if [[ -z "$version" ]]; then
  case "$type" in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

where=(--zone="$zone" ${project[@]+"${project[@]}"})
pause="${LAUNCH_TPU_WAIT:-30}"   # seconds between two looks at the TPU, and before a start again
quick="${LAUNCH_TPU_QUICK:-600}" # a failure within so many seconds is quick
box="$(mktemp -d)"
trap 'rm -rf "$box"' EXIT

run() { # prints a command, and runs it unless --dry-run
  printf '+' && printf ' %q' "$@" && echo
  [[ -n "$dry" ]] || "$@"
}

tpus() { run gcloud compute tpus "$@"; }

# Without ServerAlive a connection to a worker that is gone would stay for ever.
on_all() {
  tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oServerAliveCountMax=6 --command="$1"
}

give_up() { # CODE MESSAGE
  echo "error: $2" >&2
  if [[ -n "$delete" ]]; then
    discard || true
  else
    echo "$name still exists; --delete would have deleted it" >&2
  fi
  exit "$1"
}

# ---------------------------------------------------------------------------------- a TPU that is up

now="" known="" assumed=NONE

describe() { # KIND FIELD: its state, or NONE where there is none of that name
  local answer tries=1
  [[ -z "$known" ]] || tries=10
  while true; do
    if answer="$(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>"$box/said")"; then
      echo "$answer" && return
    elif grep -q NOT_FOUND "$box/said"; then
      echo NONE && return
    fi
    cat "$box/said" >&2
    tries=$((tries - 1))
    [[ $tries -gt 0 ]] || return 1
    sleep "$pause"
  done
}

look() { # sets `now`: READY, CREATING, WAITING_FOR_RESOURCES, PREEMPTED ...; NONE where there is nothing of that name
  local kind=tpu-vm field=state
  [[ -z "$queued" ]] || kind=queued-resources field=state.state
  if [[ -n "$dry" ]]; then
    tpus "$kind" describe "$name" "${where[@]}" --format="value($field)"
    now="$assumed"
    return
  fi
  now="$(describe "$kind" "$field")" || mistake "gcloud cannot tell the state of $name; see its output above"
  if [[ -n "$queued" && "$now" == ACTIVE ]]; then
    now="$(describe tpu-vm state)" || mistake "gcloud cannot tell the state of $name; see its output above"
    [[ "$now" != NONE ]] || now=LOST
  fi
  known=1
}

create() {
  local code=0 flags=(--version="$version") kind=tpu-vm
  [[ -z "$queued" ]] || kind=queued-resources flags=(--node-id="$name" --runtime-version="$version")
  assumed=READY fresh=1
  tpus "$kind" create "$name" "${where[@]}" --accelerator-type="$type" "${flags[@]}" ${spot:+--spot} \
    2>"$box/said" || code=$?
  cat "$box/said" >&2
  [[ $code -ne 0 ]] || return 0
  if grep -qi quota "$box/said" ||
    ! grep -qE 'capacity|"code": (8|13|14),|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL' "$box/said"; then
    mistake "gcloud cannot create $name; see its output above"
  fi
  echo "no $type in $zone now; will ask again"
  sleep "$pause"
}

discard() {
  if [[ -n "$queued" ]]; then
    tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

provide() {
  local failed=0 told=""
  while true; do
    look
    [[ "$now" == "$told" || "$now" == NONE ]] || echo "$name is $now"
    told="$now"
    case "$now" in
      READY) return ;;
      NONE) create ;;
      STOPPED) tpus tpu-vm start "$name" "${where[@]}" ;;
      FAILED | LOST | PREEMPTED | SUSPENDED | TERMINATED | UNKNOWN | HIDDEN)
        if [[ "$now" == FAILED ]]; then
          failed=$((failed + 1))
          echo "why: $(describe queued-resources state.failedData.error.message)"
          [[ $failed -lt 3 ]] || give_up 1 "the request for $type in $zone failed $failed times; the reason is above"
        fi
        discard || mistake "gcloud cannot delete $name; see its output above"
        ;;
      *) sleep "$pause" ;;
    esac
  done
}

# ------------------------------------------------------------------------------ the command, on it

fresh=1 attempt="" attempts=0

# shellcheck disable=SC2016
stop='group=$(cat camopd_jax.run/group 2>/dev/null) || exit 0
for second in $(seq 900); do
  pgrep -g "$group" -f camopd_jax >/dev/null || exit 0
  [ "$second" -gt 1 ] || { echo "a run goes on here: asked to save and end"; kill -TERM -- "-$group"; }
  sleep 1
done
kill -KILL -- "-$group"'

# The images have Python 3.10; uv brings 3.12.
setup="set -e; rm -rf camopd_jax; mkdir camopd_jax; tar -xzf camopd_jax.tar.gz -C camopd_jax; rm camopd_jax.tar.gz
export PATH=\"\$HOME/.local/bin:\$PATH\"
command -v uv >/dev/null || python3 -m pip install -q --user uv || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv -q --python 3.12 camopd_jax/.venv
uv pip install -q --python camopd_jax/.venv/bin/python './camopd_jax[$extras]'"

pack() { # what git tracks, as it is here, what --with names, and the variables, which are printed nowhere
  (
    umask 077
    for variable in ${env[@]+"${env[@]}"}; do
      printf 'export %s=%q\n' "$variable" "${!variable}"
    done >"$box/launch.env"
  )
  # shellcheck disable=SC2016
  run bash -c '{ git ls-files -z; [[ $# -lt 2 ]] || printf "%s\0" "${@:2}"; } |
  tar -czf "$1/camopd_jax.tar.gz" --null -T - -C "$1" launch.env' - "$box" ${with[@]+"${with[@]}"}
}

install() { # a fresh environment on every worker
  pack && tpus tpu-vm scp "$box/camopd_jax.tar.gz" "$name:camopd_jax.tar.gz" "${where[@]}" --worker=all \
    --scp-flag=-oServerAliveInterval=30 && on_all "$setup"
}

serve() { # a new attempt, or the one that goes on behind a lost connection
  if [[ -z "$attempt" ]]; then
    on_all "$stop" || return
    [[ -z "$fresh" ]] || install || return
    fresh=""
    attempts=$((attempts + 1))
    attempt="$(date +%s)-$attempts"
  fi
  on_all "cd camopd_jax && bash launch_tpu.sh --here=$attempt --module=$module --$command"
}

command="$(printf ' %q' "$@")"
in_a_row=0 failures=0
while true; do
  provide
  code=0 began=$SECONDS
  serve || code=$?
  [[ $code -ne 0 ]] || break
  look
  if [[ "$now" != READY ]]; then
    echo "$name is $now (exit code $code): the run continues from its last checkpoint when it is back"
    attempt="" fresh=1
    continue
  fi
  [[ $code -ne 2 ]] || give_up 2 "the command ended with exit code 2, a mistake; see its last lines above"
  [[ $code -eq 255 ]] || attempt=""
  in_a_row=$((in_a_row + 1)) failures=$((failures + 1))
  [[ $((SECONDS - began)) -lt $quick ]] || in_a_row=0
  if [[ $in_a_row -ge 3 || $failures -ge 10 ]]; then
    give_up "$code" "exit code $code on a TPU that is up, failure $failures; see the last lines of the command above"
  fi
  echo "exit code $code on a TPU that is up: starting again from the last checkpoint"
  sleep "$pause"
done
if [[ -n "$delete" ]]; then
  discard
fi
