#!/bin/sh
# On a machine with an NVIDIA GPU: the CUDA kernels under compute-sanitizer, then measurements of
# CUDA, Triton and PyTorch into bench/results/cuda.json.   bench/gpu.sh [--quick]
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "$PYTHON" -m bench.gpu_check
  done
else
  echo "compute-sanitizer is not on PATH: the kernels are checked without it" >&2
  "$PYTHON" -m bench.gpu_check
fi
exec "$PYTHON" -m bench.gpu "$@"
