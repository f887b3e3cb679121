#!/bin/sh
# Measures the loss kernels on the GPU at hand, beside its own ceilings and the peers that are installed; under ten minutes.
#   bench/gpu.sh [OUT.json]          PYTHON=... chooses the interpreter
# Peers (liger-kernel, cut-cross-entropy) are used when they are installed, or when their wheels lie in FUSECHAT_PEER_WHEELS or
# in bench/wheels: those are unpacked into a temporary folder, without a network and without touching the environment.
set -e
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
out="$(realpath -m "${1:-$here/results/loss-gpu.json}")"
wheels="${FUSECHAT_PEER_WHEELS:-$here/wheels}"
cd "$here/.."
if ls "$wheels"/*.whl >/dev/null 2>&1; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT INT TERM
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
elif [ -n "${FUSECHAT_PEER_WHEELS:-}" ]; then
    echo "gpu.sh: FUSECHAT_PEER_WHEELS is $FUSECHAT_PEER_WHEELS, where there are no wheels: put *.whl there or unset it" >&2
    exit 2
fi
"$python" bench/loss_gpu.py --json "$out"
