#!/bin/sh
# All that only a GPU can show, in one command under ten minutes: builds the engine, measures the loss kernels beside their
# own ceilings and the peers, runs the GPU tests, and reads the kernels' counters where Nsight Compute is.
#   bench/gpu.sh [OUT.json]          PYTHON=... chooses the interpreter
# The environment stays as it is: the engine, where it is not installed, is built into a temporary folder without a network.
# So are packages whose wheels lie in FUSECHAT_PEER_WHEELS or in bench/wheels: peers (liger-kernel, cut-cross-entropy), or
# what the interpreter lacks; `make gpu-wheels` downloads both. Counters go to OUT.ncu.csv. A step that fails or overruns its
# time is told and the next one runs; the exit status is then 1. Without pydantic the GPU tests of whole stages are skipped.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}"
out="$(realpath -m "${1:-$here/results/loss-gpu.json}")"
wheels="${FUSECHAT_PEER_WHEELS:-$here/wheels}"
mkdir -p "$(dirname "$out")"
cd "$here/.."
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT INT TERM
into="$python -m pip install --quiet --no-index --no-deps --no-compile --target $site"
began="$(date +%s)"
step() { echo "[$(($(date +%s) - began)) s] $*"; }
# within SECONDS COMMAND...: all limits together, and some seconds for the wheels, stay below ten minutes.
within() {
    timeout -k 5 "$@" && return 0
    status=$?
    [ "$status" -ne 124 ] || echo "gpu.sh: not done within $1 s" >&2
    return "$status"
}

if ls "$wheels"/*.whl >/dev/null 2>&1; then
    for wheel in "$wheels"/*.whl; do
        $into "$wheel" || echo "gpu.sh: $wheel is of no use to $python: left out" >&2
    done
elif [ -n "${FUSECHAT_PEER_WHEELS:-}" ]; then
    echo "gpu.sh: FUSECHAT_PEER_WHEELS is $FUSECHAT_PEER_WHEELS, where there are no wheels: put *.whl there or unset it" >&2
    exit 2
fi
failed=0
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
# In no process may the checkout itself, which has no engine, come before what is installed.
export PYTHONSAFEPATH=1
# The benchmarks' gigabytes go with the folder, also when their time is up.
mkdir "$site/tmp"
export TMPDIR="$site/tmp"
if ! "$python" -c "import fusechat._native" 2>/dev/null; then
    step "building the engine"
    if ! within 90 $into --no-build-isolation .; then
        echo "gpu.sh: no engine: what needs it fails, the kernels are measured from the checkout" >&2
        failed=1
        export PYTHONPATH="$PWD:$PYTHONPATH"
    fi
fi
step "benchmarks"
within 290 "$python" bench/loss_gpu.py --json "$out" || failed=1
step "GPU tests"
# By name: the other files want packages that a lent machine lacks.
within 120 "$python" -m pytest -q -m gpu tests/test_gpu.py tests/test_loss_ops.py || failed=1
if command -v ncu >/dev/null; then
    step "counters"
    # The benchmark's first two kernels check it; the next four are loss and scaling, twice.
    within 45 ncu --clock-control none --kernel-name 'regex:soft_ce|scale' --launch-skip 2 --launch-count 4 --kill yes \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
        --csv --log-file "${out%.json}.ncu.csv" "$python" bench/loss_gpu.py --vocabularies 128256 --rounds 2 ||
        echo "gpu.sh: Nsight Compute failed: ${out%.json}.ncu.csv says why" >&2
fi
step "done"
exit "$failed"
