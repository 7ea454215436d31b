#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes and without network: build, device tests, compute-sanitizer,
# benchmarks. Each part has its own time limit; a later one runs although an earlier one failed.
#
#   bench/on_gpu.sh              results go to $OUT, or to build/gpu where OUT is not set; the run also to results/
#
# It needs a python3 with torch >= 2.11 and CUDA, numpy, pytest, pytest-benchmark, pytest-timeout, hypothesis, scipy,
# rich, click and pybind11, ninja, setuptools; and nvcc of torch's major release. What is missing there can travel
# as wheels in the folder .whl (or $WHEELS), made where there is a network, for the Python of that machine (3.12):
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     -d .whl expecttest liger-kernel quack-kernels apache-tvm-ffi torch-c-dlpack-ext einops
#
# expecttest is needed by torch's own samples; liger-kernel and quack-kernels are contenders. quack also needs
# nvidia-cutlass-dsl with its libs-base and libs-core, by far the largest: leave it out where 64 MiB is the limit.
# What is not there is a line "not installed" in the results. Keep one version of each wheel.
set -uo pipefail
cd "$(dirname "$0")/.."
readonly out=${OUT:-build/gpu} wheels=${WHEELS:-.whl}
mkdir -p "$out"
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
declare -A codes
parts=()

# part NAME SECONDS COMMAND...: run it within its time; say how it ended.
part() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  printf '\n=== %s (at most %d s)\n' "$name" "$limit"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  codes[$name]=${PIPESTATUS[0]}
  parts+=("$name")
  printf '=== %s: exit code %d after %d s\n' "$name" "${codes[$name]}" $((SECONDS - began))
}

machine() {
  nvcc --version | tail -n 2
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
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$here" || echo "9.0+PTX")} MBPERF_CUDA=1 \
    MAX_JOBS=${MAX_JOBS:-$(nproc)} python3 setup.py -q build_ext --inplace &&
    python3 -c 'import mbperf.extension as e; assert e._C_cuda; print("built:", e._C_cuda.__file__)'
}

# An installed mbperf brings its pytest plugin by itself.
pytest_here() {
  local plugin=(-p mbperf.measure.pytest_plugin)
  python3 -c 'from importlib.metadata import distribution as d; d("mbperf")' 2>/dev/null && plugin=()
  MBPERF_NEEDS_CUDA=1 python3 -m pytest "${plugin[@]}" "$@"
}

device_suite() {
  local parallel=()
  python3 -c 'import xdist' 2>/dev/null && parallel=(-n 6 --benchmark-disable)
  pytest_here -q "${parallel[@]}" --timeout=120 -k cuda tests/test_cuda_device.py tests/test_collate_device.py \
    tests/test_gather.py tests/test_cross_entropy_contract.py tests/test_cross_entropy_autograd.py \
    tests/test_cross_entropy_numerics.py
}

# A few sizes of each kernel: a checked kernel runs some hundred times slower.
SUBSET='(against_float64 and (float32 or bfloat16) and mean and (-10- or -1000- or -50257- or -262144-))
  or (gathered_rows and (uint8 or bfloat16) and (784 or 4099)) or (stacked_there and uint8 and 449)
  or pinned_rows_are_converted'

# compute-sanitizer TOOL over our kernels; the caching allocator would hide an overrun.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "skipped: no compute-sanitizer"; return 0; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 MBPERF_NEEDS_CUDA=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes application-only --kernel-name kns=mbperf python3 -m pytest -q --timeout=0 \
    tests/test_cuda_device.py -k "${SUBSET//$'\n'/ }"
}

benchmarks() {
  local gpu storage
  gpu=$(python3 -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))') || return 1
  storage=results/$gpu
  pytest_here bench/bench_cross_entropy_cuda.py bench/bench_batch_cuda.py -q -rs --timeout=0 --mbperf-budget=80 \
    --benchmark-storage="file://./$storage" --benchmark-autosave
  local code=$?
  find "$storage" -name '*.json' -newer "$out/build.log" -exec cp {} "$out/" \;
  return $code
}

export -f machine wheels_into_path build pytest_here device_suite sanitize benchmarks
export SUBSET out wheels

part machine 15 bash -c machine
if compgen -G "$wheels/*.whl" >/dev/null; then
  part wheels 30 bash -c 'wheels_into_path build/gpu-site'
  export PYTHONPATH=$PYTHONPATH:$PWD/build/gpu-site
fi
part build 200 bash -c build
part device_suite 130 bash -c device_suite
part memcheck 40 bash -c 'sanitize memcheck'
part racecheck 40 bash -c 'sanitize racecheck'
part benchmarks $((530 - SECONDS)) bash -c benchmarks  # what the others left of 9 minutes

printf '\n=== all parts, %d s\n' "$SECONDS"
failed=0
for name in "${parts[@]}"; do
  printf '%-14s exit code %d\n' "$name" "${codes[$name]}" | tee -a "$out/summary.txt"
  ((codes[$name] == 0)) || failed=1
done
exit $failed
