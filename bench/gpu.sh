#!/bin/sh
# All that only a GPU can show, in one command under ten minutes: builds the engine, runs the GPU tests, measures the loss
# kernels beside their own ceilings and the peers, and reads their counters where Nsight Compute is.
#   bench/gpu.sh [OUT.json]          PYTHON=... chooses the interpreter
# The environment stays as it is: the engine, where it is not installed, is built into a temporary folder without a network.
# So are packages whose wheels lie in FUSECHAT_PEER_WHEELS or in bench/wheels: peers (liger-kernel, cut-cross-entropy), or
# what the interpreter lacks. Counters go to OUT.ncu.csv. Exits with 1 when a test failed, after measuring.
set -e
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
out="$(realpath -m "${1:-$here/results/loss-gpu.json}")"
wheels="${FUSECHAT_PEER_WHEELS:-$here/wheels}"
cd "$here/.."
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT INT TERM
into="$python -m pip install --quiet --no-index --no-deps --no-compile --target $site"
began="$(date +%s)"
step() { echo "[$(($(date +%s) - began)) s] $*"; }

if ls "$wheels"/*.whl >/dev/null 2>&1; then
    $into "$wheels"/*.whl
elif [ -n "${FUSECHAT_PEER_WHEELS:-}" ]; then
    echo "gpu.sh: FUSECHAT_PEER_WHEELS is $FUSECHAT_PEER_WHEELS, where there are no wheels: put *.whl there or unset it" >&2
    exit 2
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
# -P: the checkout itself, which has no engine, must not come before what is installed.
if ! "$python" -P -c "import fusechat._native" 2>/dev/null; then
    step "building the engine"
    $into --no-build-isolation .
fi
failed=0
step "GPU tests"
FUSECHAT_NATIVE=require "$python" -P -m pytest -q -m gpu tests || failed=1
step "benchmarks"
"$python" -P bench/loss_gpu.py --json "$out"
if command -v ncu >/dev/null; then
    step "counters"
    ncu --clock-control none --kernel-name 'regex:soft_ce|scale|topk' --launch-skip 6 --launch-count 6 --kill yes \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
        --csv --log-file "${out%.json}.ncu.csv" "$python" -P bench/loss_gpu.py --vocabularies 128256 --rounds 2 ||
        echo "gpu.sh: Nsight Compute failed: ${out%.json}.ncu.csv says why" >&2
fi
step "done"
exit "$failed"
