#!/usr/bin/env bash
# Everything that needs a GPU, with the python3 of the PATH, without pip and without a network:
#
#   scripts/gpu_check.sh [folder]    where <gpu>.log, .json, .md and .png go; default: $OUT, else benchmarks/results
#
# Builds in place, then runs each part below under a time limit; the whole ends within 8 minutes. A part that fails stops
# no later one. The log ends with a line per part; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

deadline=$((SECONDS + 470))
results=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
mkdir -p "$results" || exit 1
gpu=$(python3 -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))' 2>/dev/null)
base=$results/${gpu:-no-gpu}
cores=$(nproc)
toolkit=${CUDA_HOME:-/usr/local/cuda}
if commit=$(git rev-parse HEAD 2>/dev/null); then
  export FUSED_REG_COMMIT=$commit
fi
if [[ -x $toolkit/bin/nvcc ]]; then # a script named nvcc elsewhere on the PATH misleads torch
  export CUDA_HOME=$toolkit PATH=$PATH:$toolkit/bin
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FUSED_REG_REQUIRE_CUDA=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # what else is installed there is not ours to test

# part NAME SECONDS COMMAND: runs the command and keeps a line about it, with the last line of its output.
summary=() failed=0
part() {
  local name=$1 limit=$2 command=$3 began=$SECONDS output status verdict=passed last
  local left=$((deadline - began))
  ((limit = limit < left ? limit : left))
  printf '\n=== %s: %s\n' "$name" "$command"
  output=$(mktemp)
  if ((limit <= 0)); then
    echo "no time is left" | tee "$output"
    status=1
  else
    timeout --kill-after=5 "$limit" bash -c "$command" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}
  fi
  last=$(grep -v '^[[:space:]]*$' "$output" | tail -n 1)
  rm -f "$output"
  ((status == 124 || status == 137)) && last="stopped after $limit s; $last"
  ((status == 0)) || { verdict=failed failed=1; }
  summary+=("$(printf '%s %4d s  %-12s %s' "$verdict" $((SECONDS - began)) "$name" "${last:0:160}")")
}

# shellcheck disable=SC2016 # the part's own bash expands it
self_check='out=$(python3 -m fused_reg 2>&1); status=$?; echo "$out"
  [[ $out == *"self-check cuda:0"* ]] || { echo "no CUDA device was checked"; exit 1; }; exit $status'
pytest='python3 -m pytest -q -p no:cacheprovider'
parallel=
if python3 -c 'import xdist' 2>/dev/null; then
  parallel="-p xdist.plugin -n $(((cores + 1) / 2))"
fi
sanitize() { # part of compute-sanitizer; every allocation is its own, so that the tool sees its bounds
  part "$1" 45 "$2 compute-sanitizer --tool $1 --error-exitcode 1 $pytest -m 'cuda and sanitizer'"
}

main() {
  nvidia-smi 2>&1 | head -n 15
  part build 150 "FORCE_CUDA=1 MAX_JOBS=$cores python3 setup.py -q egg_info build_ext --inplace && echo built"
  part self-check 40 "$self_check"
  part tests 150 "OMP_NUM_THREADS=2 $pytest $parallel"
  part launches 40 "$pytest -m cuda -k launches"
  sanitize memcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize racecheck ''
  sanitize initcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize synccheck ''
  part benchmarks 180 "python3 -m benchmarks --device cuda --quick --output '$base.json'"
  part slow 90 "$pytest --slow -m 'cuda and slow'"
  printf '\n=== %s\n' "${gpu:-no GPU}, commit ${FUSED_REG_COMMIT:-unknown}"
  printf '%s\n' "${summary[@]}"
  return "$failed"
}

main 2>&1 | tee "$base.log"
exit "${PIPESTATUS[0]}"
