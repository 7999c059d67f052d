#!/bin/sh
# On a machine with a GPU, in under nine minutes: the tests that need one and those of the ops on its
# tensors (both compile kernels, so in JOBS processes), then the grid of bench/gpu.py. A short table
# comes last; the numbers go to OUT/cuda.json, what the tests said to OUT/tests.txt.
#   bench/gpu.sh OUT [options of python -m bench]
#
# SANITIZE=1 also runs the CUDA kernels under compute-sanitizer, which takes minutes more.
set -eu
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [options of python -m bench]" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ -n "${SANITIZE:-}" ]; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "$PYTHON" -m bench.gpu_check
  done
fi
status=0
CUBLAS_WORKSPACE_CONFIG=:4096:8 FASTATTN_TEST_DEVICE=cuda FASTATTN_TEST_BACKENDS=triton,cuda \
  timeout 200 "$PYTHON" -m pytest -q -n "${JOBS:-8}" tests/gpu tests/ops > "$OUT/tests.txt" 2>&1 || status=$?
tail -n 15 "$OUT/tests.txt"
timeout 330 "$PYTHON" -m bench --device cuda --budget 270 --output "$OUT" "$@" || status=$?
exit $status
