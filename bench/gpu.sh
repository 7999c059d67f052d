#!/bin/sh
# On a machine with a GPU, in under nine minutes: the tests that need one and those of the ops on its
# tensors (both compile kernels, so in JOBS processes), then the grid of bench/gpu.py. A short table
# comes last; the numbers go to OUT/cuda.json, what the tests said to OUT/tests.txt.
#   bench/gpu.sh OUT [options of python -m bench]
#
# The CUDA kernels take part if they are built beside these sources, which hide an installed package:
# FASTATTN_CUDA=1 pip install --no-build-isolation --no-deps -e . SANITIZE=1 runs them, and nothing
# else, under compute-sanitizer: up to eight minutes.
set -eu
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [options of python -m bench]" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

BACKENDS=triton
if "$PYTHON" -c "import fastattn._cuda"; then
  BACKENDS=triton,cuda
else
  echo "fastattn._cuda is not built: the tests of the CUDA kernels are left out" >&2
fi
CORES=$(nproc)
JOBS_THAT_FIT=$((CORES < 16 ? CORES : 16))  # each has a context of its own on the GPU
status=0
if [ -n "${SANITIZE:-}" ]; then
  # Only our kernels, and no errors of the API: what torch probes for and does not find is one, too.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 20 240 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 --report-api-errors no --kernel-regex kns=fastattn --target-processes all \
      "$PYTHON" -m bench.gpu_check > "$OUT/$tool.txt" 2>&1 || status=$?
    tail -n 15 "$OUT/$tool.txt"
  done
  exit $status
fi
# Every drawn problem compiles kernels of its own, so few are drawn. After a fault that breaks a GPU's
# context all is failure, so it stops early; interrupted, pytest still says what has failed.
CUBLAS_WORKSPACE_CONFIG=:4096:8 FASTATTN_TEST_DEVICE=cuda FASTATTN_TEST_BACKENDS=$BACKENDS \
  FASTATTN_TEST_EXAMPLES=4 timeout -s INT -k 10 190 "$PYTHON" -m pytest -q --maxfail 40 \
  -n "${JOBS:-$JOBS_THAT_FIT}" tests/gpu tests/ops > "$OUT/tests.txt" 2>&1 || status=$?
tail -n 15 "$OUT/tests.txt"
timeout 310 "$PYTHON" -m bench --device cuda --budget 250 --output "$OUT" "$@" || status=$?
exit $status
