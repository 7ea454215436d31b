#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes and without network: build, device tests, compute-sanitizer,
# benchmarks, and their tables last. Each part has its own time limit; a later one runs although an earlier one
# failed. Without a GPU it is a dry run, which says what it skips and ends with exit code 3.
#
#   bench/on_gpu.sh              logs go to $OUT (build/gpu where OUT is not set), the run also to results/<gpu>/
#   bench/on_gpu.sh --quick [K]  3 minutes: build, the tests of tests/cuda/test_cuda_device.py that pytest's -k K
#                                chooses (a few sizes of each kernel where K is not given), eight shapes; the run
#                                goes to $OUT alone
#
# It needs a python3 with torch >= 2.11 and CUDA, numpy, pytest, pytest-benchmark, pytest-timeout, hypothesis, scipy,
# rich, click and pybind11, ninja, setuptools; and nvcc of torch's major release. What is missing there can travel
# as wheels in the folder .whl (or $WHEELS), made where there is a network, for the Python of that machine (3.12):
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     -d .whl expecttest liger-kernel quack-kernels apache-tvm-ffi torch-c-dlpack-ext
#
# expecttest is needed by torch's own samples; liger-kernel (with triton) and quack-kernels are contenders. quack also
# needs nvidia-cutlass-dsl with its libs-base, libs-core and libs-cu13, the last 92 MB as a wheel: it races where these
# are installed. What is not there is a line "not installed" in the results. Keep one version of each wheel.
set -uo pipefail
cd "$(dirname "$0")/.."
readonly out=${OUT:-build/gpu} wheels=${WHEELS:-.whl}
quick='' seconds=470
case ${1:-} in
  --quick) quick=${2:-few} seconds=180 ;;
  '') ;;
  *) echo "usage: bench/on_gpu.sh [--quick [K]], not: $*" >&2; exit 2 ;;
esac
mkdir -p "$out"
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# part NAME SECONDS COMMAND...: run it within its time; say how it ended.
part() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  printf '\n=== %s (at most %d s)\n' "$name" "$limit"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  printf '%-12s exit code %d after %d s%s\n' "$name" "$code" $((SECONDS - began)) "$dry" | tee -a "$out/summary.txt"
}

machine() {
  nvcc --version | tail -n 2
  [[ $dry ]] && { python3 -c 'import torch; print(f"torch {torch.__version__}, no GPU")'; return; }
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,memory.total --format=csv
  python3 - <<'PYTHON'
import torch
gpu = torch.cuda.get_device_properties(0)
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu.name}, compute capability {gpu.major}.{gpu.minor},"
      f" {gpu.multi_processor_count} multiprocessors, L2 {gpu.L2_cache_size >> 20} MiB")
PYTHON
}

wheels_into_path() {
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$1" "$wheels"/*.whl
}

# For the card that is there: one architecture takes half the time of the two that are shipped.
build() {
  local here='import torch; print("%d.%d+PTX" % torch.cuda.get_device_capability())'
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$here")} MBPERF_CUDA=1 \
    MAX_JOBS=${MAX_JOBS:-$(nproc)} python3 setup.py -q build_ext --inplace &&
    python3 -c 'import mbperf.extension as e; assert e._C_cuda; print("built:", e._C_cuda.__file__)'
}

# An installed mbperf brings its pytest plugin by itself. In a dry run tests are only chosen, not run.
pytest_here() {
  local plugin=(-p mbperf.plugin.hooks)
  python3 -c 'from importlib.metadata import distribution as d; d("mbperf")' 2>/dev/null && plugin=()
  MBPERF_NEEDS_CUDA=1 python3 -m pytest "${plugin[@]}" "$@"
}

device_suite() {
  local how=(-q --timeout=120 --durations=8)
  python3 -c 'import xdist' 2>/dev/null && how+=(-n 8 --benchmark-disable)
  [[ $dry ]] && how=(-qq --collect-only)
  pytest_here "${how[@]}" -k cuda tests/cuda/test_cuda_device.py tests/ops
}

# A few sizes of each kernel: a checked kernel runs some hundred times slower.
SUBSET='(against_float64 and (float32 or bfloat16) and mean and (-10- or -1000- or -50257- or -262144-))
  or (token_rows and 0.7 and (float32 or bfloat16) and (-10- or -1000- or -50257- or -262144-))
  or (gathered_rows and (uint8 or bfloat16) and (784 or 4099)) or (stacked_there and uint8 and 449)
  or pinned_rows_are_converted'

quick_tests() {
  local how=(-q --timeout=60)
  [[ $dry ]] && how=(-qq --collect-only)
  [[ $quick == few ]] && quick=${SUBSET//$'\n'/ }
  pytest_here "${how[@]}" tests/cuda/test_cuda_device.py -k "$quick"
}

# compute-sanitizer over our kernels; the caching allocator would hide an overrun. Errors that calls of the driver
# return are no finding: torch and the launches ask questions that are answered so, and check every answer.
sanitize() {
  local tool code=0 how=(-q --timeout=0) under=()
  [[ $dry ]] || command -v compute-sanitizer || { echo "not checked: no compute-sanitizer here"; return 4; }
  for tool in memcheck racecheck; do
    under=(compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes application-only
      --report-api-errors no --kernel-name kns=mbperf)
    [[ $dry ]] && how=(-qq --collect-only) under=()
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 MBPERF_NEEDS_CUDA=1 "${under[@]}" python3 -m pytest "${how[@]}" \
      tests/cuda/test_cuda_device.py -k "${SUBSET//$'\n'/ }" || code=$?
  done
  return $code
}

# benchmarks SECONDS FILE...: a part's time is theirs, and what collecting, checking and compiling take beside it.
benchmarks() {
  local storage=build/gpu/dry-run budget=$1
  shift
  [[ $quick ]] && storage=build/gpu/quick
  [[ $dry || $quick ]] || storage=results/$(python3 -c \
    'from mbperf.measure import machine; print(machine.gpu()["machine"])') || return 1
  pytest_here "$@" -q -rs --timeout=0 \
    --mbperf-budget="$budget" --benchmark-storage="file://./$storage" --benchmark-autosave
  local code=$?
  [[ $dry ]] || find "$storage" -name '*.json' -newer "$out/machine.log" -exec cp {} "$out/" \;
  return $code
}

tables() {
  local file
  for file in $(find "$out" -maxdepth 1 -name '*.json' -newer "$out/machine.log" | sort); do
    python3 tools/readme.py --show "$file" && echo
  done
}

dry=''
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || dry=' (dry run: no GPU)'
export -f machine wheels_into_path build pytest_here device_suite quick_tests sanitize benchmarks tables
export SUBSET out wheels dry quick

if [[ $dry ]]; then
  why=$(python3 -c 'import torch; print(f"torch {torch.__version__} sees no GPU")' 2>&1 | tail -n 1)
  echo "=== DRY RUN: $why. Skipped: the build with CUDA, every run of a kernel, compute-sanitizer, all measuring." |
    tee -a "$out/summary.txt"
fi
part machine 20 bash -c machine
if compgen -G "$wheels/*.whl" >/dev/null; then
  part wheels 40 bash -c 'wheels_into_path build/gpu-site'
  export PYTHONPATH=$PYTHONPATH:$PWD/build/gpu-site
fi
[[ $dry ]] || part build 200 bash -c build
if [[ $quick ]]; then
  part tests 40 bash -c quick_tests
  left=$((seconds - SECONDS))
  # One pass and dtype of eight shapes; test_peer says which of the others race.
  part benchmarks $((left > 30 ? left : 30)) bash -c "benchmarks $((left > 50 ? left - 25 : 20)) \
    bench/bench_cross_entropy_cuda.py -k '(bf16 and fwd+bwd and not eager) or test_peer'"
else
  # The checks side by side, as nothing is timed in them.
  part sanitizers 150 bash -c sanitize >/dev/null &
  part device_suite 150 bash -c device_suite
  wait
  tail -n 30 "$out/sanitizers.log"
  # Some 180 s are left: two thirds for the loss and batches, a third for what else is read off logits.
  left=$(((seconds - SECONDS) * 2 / 3))
  part benchmarks $((left > 60 ? left : 60)) bash -c "benchmarks $((left > 100 ? left - 40 : 60)) \
    bench/bench_batch_cuda.py bench/bench_cross_entropy_cuda.py"
  left=$((seconds - SECONDS))
  part off_logits $((left > 30 ? left : 30)) bash -c "benchmarks $((left > 70 ? left - 40 : 30)) \
    bench/bench_off_logits_cuda.py"
fi
part tables 20 bash -c tables
printf '\n=== all parts, %d s\n' "$SECONDS"
cat "$out/summary.txt"
[[ $dry ]] && exit 3
! grep -qv 'exit code 0 ' "$out/summary.txt"
