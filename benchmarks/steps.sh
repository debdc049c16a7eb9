# Sourced by scripts that run several measurements. Set `out` (a folder) first.
#
#   step NAME COMMAND...   run it, keep its log as $out/NAME.log, remember whether it failed and what it missed
#   summary                say where the results are and which targets were missed; 1 when a step failed
failed=()
missed=()

step() {
    local name="$1"
    shift
    echo "== $name"
    if ! "$@" 2>&1 | tee "$out/$name.log"; then
        failed+=("$name")
        echo "== $name FAILED"
    fi
    while IFS= read -r line; do
        missed+=("$name: ${line#TARGET MISSED: }")
    done < <(grep '^TARGET MISSED: ' "$out/$name.log")
}

summary() {
    echo
    echo "results in $out:"
    ls "$out"
    if ((${#missed[@]})); then
        printf 'target missed: %s\n' "${missed[@]}"
    fi
    if ((${#failed[@]})); then
        echo "FAILED: ${failed[*]}"
        return 1
    fi
    echo "all passed"
}
