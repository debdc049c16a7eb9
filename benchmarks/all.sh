#!/usr/bin/env bash
# All benchmarks, one after the other, each to its end whatever the others did. For a machine that does nothing
# else.
#
#   bash benchmarks/all.sh [OPTIONS]        options that all have: --model, --dtype, --device, --seed
#   OUTPUT=folder PYTHON=.venv/bin/python bash benchmarks/all.sh
#
# Not among them: compare_servers.py, which needs other servers installed (docs/comparison.md).
#
# JSON, plots and logs go to OUTPUT (default: benchmarks/results). The last lines name the targets that were
# missed, which is no failure. Exit code 1 when a benchmark failed: a result differs from the model's.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUTPUT:-$root/benchmarks/results}"
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 1
export PYTHONUNBUFFERED=1
# shellcheck source=benchmarks/steps.sh
source "$root/benchmarks/steps.sh"

here="$root/benchmarks"
options=("$@" --output "$out")
step overhead "$python" "$here/overhead.py" "${options[@]}"
step overhead-packed "$python" "$here/overhead.py" "$@" --weights packed --output "$out/packed"
step overhead-float32 "$python" "$here/overhead.py" "$@" --dtype float32 --output "$out/float32"
step compile-time "$python" "$here/overhead.py" "${options[@]}" --compile-time
step backends "$python" "$here/backends.py" "${options[@]}"
step backends-compile-time "$python" "$here/backends.py" "${options[@]}" --compile-time
step cost-model "$python" "$here/cost_model.py" "${options[@]}"
step preemption-packed "$python" "$here/preemption.py" "$@" --weights packed --tokens --output "$out/packed"
step budget-cost "$python" "$here/budget_cost.py" "$@" --weights packed --output "$out/packed"
step blocking "$python" "$here/blocking.py" "${options[@]}"
step preemption "$python" "$here/preemption.py" "${options[@]}"
step many-programs "$python" "$here/many_programs.py" "${options[@]}"
step checkpoint-rate "$python" "$here/checkpoint_rate.py" "${options[@]}"
step decode "$python" "$here/decode.py" "${options[@]}"
step dispatch "$python" "$here/dispatch.py" "${options[@]}"
step serve-mixed "$python" "$here/serve_mixed.py" --json "$out/serve_mixed.json"
step serve-stalls "$python" "$here/serve_stalls.py" --json "$out/serve_stalls.json"
step serve-disconnects "$python" "$here/serve_disconnects.py" --json "$out/serve_disconnects.json"
step soak "$python" "$here/soak.py" "${options[@]}"
step scheduler-cost "$python" "$here/scheduler_cost.py" --json "$out/scheduler_cost.json"
summary
