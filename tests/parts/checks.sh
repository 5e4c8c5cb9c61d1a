# Checks for suites of shell, and waiting. Sourced; needs WORK, a directory for what commands print, PATIENCE_S, and a
# function `finish` that ends the suite. Counts in `passed` and `failed`.

# shellcheck shell=bash

passed=0 failed=0

ok() {
    passed=$((passed + 1))
    echo "ok $1"
}

bad() {
    failed=$((failed + 1))
    echo "FAIL $1: ${2:-}"
}

# check NAME COMMAND...: the command's success is the check; what it printed is the reason.
check() {
    local name=$1
    shift
    if "$@" >"$WORK/check-output" 2>&1; then
        ok "$name"
    else
        bad "$name" "$(tail -n 8 "$WORK/check-output")"
        return 1
    fi
}

# must NAME COMMAND...: as check, and without it the rest makes no sense.
must() {
    check "$@" || finish
}

# refuse NAME PATTERN COMMAND...: the command must fail and say why.
refuse() {
    local name=$1 pattern=$2
    shift 2
    if "$@" >"$WORK/check-output" 2>&1; then
        bad "$name" "it worked: $(tail -n 5 "$WORK/check-output")"
    elif grep -qE "$pattern" "$WORK/check-output"; then
        ok "$name"
    else
        bad "$name" "no word of '$pattern': $(tail -n 5 "$WORK/check-output")"
    fi
}

# equal NAME WANTED COMMAND...: what the command prints.
equal() {
    local name=$1 wanted=$2 got
    shift 2
    got=$("$@" 2>"$WORK/check-error")
    if [ "$got" = "$wanted" ]; then ok "$name"; else
        bad "$name" "wanted '$wanted', got '$got' $(tail -n 5 "$WORK/check-error")"
    fi
}

# wait_for WHAT COMMAND...: polls until the command succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + PATIENCE_S))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "$what did not happen within $PATIENCE_S s"
            return 1
        fi
        sleep 0.1
    done
}

# A process whose first thread is a zombie may have others that still hold its files and sockets.
gone() {
    ! kill -0 "$1" 2>/dev/null || { grep -q '^State:.Z' "/proc/$1/status" && [ "$(ls "/proc/$1/task" | wc -l)" = 1 ]; }
}

# stop PID [SIGNAL]: sends it and waits for the end; fails if there is none.
stop() {
    [ -n "$1" ] || return 0
    kill "-${2:-TERM}" "$1" 2>/dev/null
    wait_for "the end of process $1" gone "$1" || return 1
    # The shell would print that it was killed.
    wait "$1" 2>/dev/null
    return 0
}
