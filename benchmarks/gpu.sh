#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command; installs nothing.
#
#   bash benchmarks/gpu.sh [FOLDER]              default: benchmarks/results/gpu
#   MODEL=Qwen/Qwen3-8B bash benchmarks/gpu.sh   another model (default qwen3-0.6b: random weights, no download)
#   PYTHON=.venv/bin/python TOKENS="512 4096" LONG=16384 bash benchmarks/gpu.sh
#
# Runs the equality tests of tests/gpu, the overhead, the compile time, the blocking times and the demonstration,
# each to its end whatever the others did, and collects their JSON, plots and logs in FOLDER.
# The last lines name the targets that were missed, which is no failure, and the steps that failed.
# Exit code: 0 when all passed, 1 when one failed (a result differs from the model's), 2 when there is no device.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
case "$python" in # absolute, since the steps run in the repository's root; not resolved: it may be a venv's link
*/*) python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" || exit 2 ;;
esac
out="${1:-$root/benchmarks/results/gpu}"
model="${MODEL:-qwen3-0.6b}"
dtype="${DTYPE:-bfloat16}"
long="${LONG:-4096}"
read -r -a tokens <<<"${TOKENS:-512 1024 2048 4096}"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

if ! "$python" - <<'PY'
import sys

try:
    import torch
except ImportError:
    sys.exit(f"NO TEST WAS RUN: {sys.executable} has no torch. Run `make install`, or set PYTHON.")
if not torch.cuda.is_available():
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    sys.exit(f"NO TEST WAS RUN: no CUDA device: {why} (torch {torch.__version__}).")
print(f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PY
then
    exit 2
fi

mkdir -p "$out" || exit 1
out="$(cd "$out" && pwd)"
# shellcheck source=benchmarks/steps.sh
source "$root/benchmarks/steps.sh"

cd "$root" || exit 1
common=(--device cuda --model "$model" --dtype "$dtype" --output "$out")
step equality "$python" -m pytest tests/gpu -q -p no:cacheprovider --junitxml="$out/equality.xml"
step overhead "$python" benchmarks/overhead.py "${common[@]}" --repeats 30 --tokens "${tokens[@]}"
step compile-time "$python" benchmarks/overhead.py --device cuda --dtype "$dtype" --output "$out" --compile-time
step blocking "$python" benchmarks/blocking.py "${common[@]}" --tokens "$long" --prefills 20
step demo "$python" -c "from fpcompile.cli import main; main()" demo \
    --device cuda --model "$model" --long-tokens "$long" --output "$out"

summary
