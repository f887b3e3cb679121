#!/bin/sh
# Measures the loss kernels on the GPU at hand, beside its own ceilings and the peers that are installed; under ten minutes.
#   bench/gpu.sh [OUT.json]          PYTHON=... chooses the interpreter; liger-kernel and cut-cross-entropy are used when present
set -e
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" bench/loss_gpu.py --json "${1:-bench/results/loss-gpu.json}"
