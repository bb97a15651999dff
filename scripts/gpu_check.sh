#!/usr/bin/env bash
# Everything that needs a GPU, in two calls of at most 7 minutes each, with the python3 of the PATH, without pip and
# without a network:
#
#   scripts/gpu_check.sh first [folder]    builds, tests what is marked cuda, and measures every target in a quick form
#   scripts/gpu_check.sh rest [folder]     compute-sanitizer, launch counts, slow tests, whole benchmarks, all other tests
#
# The folder (default: $OUT, else benchmarks/results) gets everything as it comes, so that a call which is cut keeps what
# it has: <gpu>-<call>.log; <gpu>-<call>.txt, a verdict for each part that has ended; the JSON, tables and picture of the
# benchmarks. Every part has a time limit, and one that fails stops no later one. The exit status is 1 if any failed. The
# first call keeps time for its benchmarks: a part that this leaves too little is `cut`, or `not run`, and has not failed.
set -uo pipefail

call=${1:-}
if [[ $call != first && $call != rest ]]; then
  echo "scripts/gpu_check.sh: the first argument must be first or rest, got '$call'" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-410}))
results=$(realpath -m "${2:-${OUT:-benchmarks/results}}")
mkdir -p "$results" || exit 1
gpu=$(python3 -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))' 2>/dev/null)
gpu=${gpu:-no-gpu}
log=$results/$gpu-$call.log verdicts=$results/$gpu-$call.txt
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
toolkit=${CUDA_HOME:-/usr/local/cuda}
if [[ -z ${FUSED_REG_COMMIT:-} ]] && commit=$(git rev-parse HEAD 2>/dev/null); then
  export FUSED_REG_COMMIT=$commit
fi
if [[ -x $toolkit/bin/nvcc ]]; then # a script named nvcc elsewhere on the PATH misleads torch
  export CUDA_HOME=$toolkit PATH=$PATH:$toolkit/bin
fi
unset TORCH_CUDA_ARCH_LIST # images that name all GPUs in it would have the build take minutes: it is for the one here
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FUSED_REG_REQUIRE_CUDA=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # what else is installed there is not ours to test

# part NAME SECONDS COMMAND: runs the command and writes its verdict, with the last line of its output.
failed=0 kept=0 # kept: the seconds of the call that are for later parts
part() {
  local name=$1 limit=$2 command=$3 began=$SECONDS output status=0 verdict=passed last
  local left=$((deadline - kept - began)) is_short=0
  ((left < limit)) && limit=$left is_short=1
  printf '\n=== %s: %s\n' "$name" "$command"
  if ((limit <= 0)); then
    verdict='not run' last='no time is left'
    echo "$last"
  else
    output=$(mktemp)
    timeout --kill-after=5 "$limit" bash -c "$command" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}
    last=$(grep -v '^[[:space:]]*$' "$output" | tail -n 1)
    rm -f "$output"
    if ((status == 124 || status == 137)); then
      last="stopped after $limit s${last:+; $last}"
      ((status == 124 && is_short)) && [[ $last != *failed* ]] && verdict=cut status=0
    fi
    last=${last:-exit status $status}
    ((status == 0)) || { verdict=failed failed=1; }
  fi
  printf '%-7s %4d s  %-12s %s\n' "$verdict" $((SECONDS - began)) "$name" "${last:0:160}" >>"$verdicts"
}

# shellcheck disable=SC2016 # the parts' own bash expands these
environment='status=0
  for tool in nvidia-smi nvcc compute-sanitizer g++; do
    echo "--- $tool"
    [[ $tool == nvidia-smi ]] && options= || options=--version
    $tool $options 2>&1 | head -n 20
    ((PIPESTATUS[0] == 0)) || { lacking+=" $tool" status=1; }
  done
  for module in torch numpy setuptools pytest hypothesis ninja matplotlib pandas rich; do
    python3 -c "import $module as m; print(m.__name__, getattr(m, \"__version__\", \"\"))" || { lacking+=" $module" status=1; }
  done
  echo "${lacking:+not here, or broken:$lacking}"
  exit $status'
# shellcheck disable=SC2016
self_check='out=$(python3 -m fused_reg 2>&1); status=$?; echo "$out"
  [[ $out == *"self-check cuda:0"* ]] || { echo "no CUDA device was checked"; exit 1; }; exit $status'
pytest='python3 -m pytest -q -p no:cacheprovider'
by_file="OMP_NUM_THREADS=2 python3 scripts/pytest_by_file.py $(((cores + 1) / 2))"
# Files with tests marked cuda: those of CUDA alone first, then test_compile.py, which takes long.
on_gpu=$(grep -lE 'mark\.cuda|def \w+\(.*\bdevice\b' tests/test_cuda*.py tests/test_c[!u]*.py tests/test_[!c]*.py | xargs)
sanitized=$(grep -lE 'mark\.sanitizer' tests/test_*.py | xargs)

build() {
  part build 200 "FORCE_CUDA=1 MAX_JOBS=$cores python3 setup.py -q egg_info build_ext --inplace && echo built"
}

sanitize() { # a part of compute-sanitizer, its seconds, and what it needs: allocations of their own show their bounds
  part "$1" "$2" "$3 compute-sanitizer --tool $1 --error-exitcode 1 $pytest -m 'cuda and sanitizer' $sanitized"
}

# measure SECONDS NAME OPTIONS: the benchmarks, and the tables and the picture of what was measured, be it cut.
measure() {
  local json=$results/$2.json
  kept=20
  part benchmarks "$1" "python3 -m benchmarks --device cuda --output '$json' $3"
  kept=0
  part tables 20 "python3 -m benchmarks.report '$json' >'${json%.json}.md' &&
    python3 -m benchmarks.report '$json' '${json%.json}.png'"
}

main() {
  : >"$verdicts"
  if [[ $call == first ]]; then
    kept=190 # for the benchmarks
    part environment 30 "$environment"
    build
    part self-check 30 "$self_check"
    part tests 100 "$by_file -m cuda $on_gpu"
    measure 400 "$gpu-quick" --quick
  else
    build
    sanitize memcheck 80 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitize racecheck 40 ''
    sanitize initcheck 40 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitize synccheck 30 ''
    part launches 30 "$pytest -m cuda -k launches tests/test_cuda_calls.py tests/test_optim_devices.py"
    part slow 60 "$by_file --slow -m 'cuda and slow' $on_gpu"
    measure 140 "$gpu" '--compile-seconds 60'
    part others 400 "$by_file -m 'not cuda' tests/test_*.py"
  fi
  printf '\n=== %s\n' "$gpu, commit ${FUSED_REG_COMMIT:-unknown}"
  cat "$verdicts"
  return "$failed"
}

main 2>&1 | tee "$log"
exit "${PIPESTATUS[0]}"
