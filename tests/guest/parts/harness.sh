# What every suite in this folder stands on: checks, the daemon, the registries, mounts, and an end that cleans up.
# Runs inside the guest as root. A suite sources it, makes its checks, and ends with `finish`.
# Expects: /guest/suite (this folder), /guest/parts (tests/parts), /fixtures/small, perhaps /fixtures/large; sluice and
# registryd in the PATH.

# shellcheck shell=bash

PARTS=/guest/suite/parts
SOCKET=/run/sluice.sock
DOOR=${SLUICE_DOOR:-cachefiles}
# What the door fills: the kernel's directory, or ours.
if [ "$DOOR" = fanotify ]; then CACHE=/cache/sluice; else CACHE=/cache/fscache; fi
DAEMON_LOG=/tmp/daemon.log
# Under emulation a daemon takes its time to start; nothing here waits this long unless something is wrong.
PATIENCE_S=30

WORK=/tmp
. /guest/parts/checks.sh

daemon_pid="" registry_pid="" control=""

# fails NAME COMMAND...: it must fail, and by itself, not by a signal or a time limit of its own.
fails() {
    local name=$1 status
    shift
    "$@" >/tmp/check-output 2>&1
    status=$?
    if [ "$status" -ge 1 ] && [ "$status" -lt 124 ]; then
        ok "$name"
    else
        bad "$name" "status $status: $(tail -n 5 /tmp/check-output)"
    fi
}

# --- the daemon

daemon_start() {
    local -a place=(--cache "$CACHE")
    [ "$DOOR" = fanotify ] || place=(--cache /cache/sluice --fscache "$CACHE")
    mkdir -p "$CACHE"
    sluice daemon --door "$DOOR" "${place[@]}" --apisock "$SOCKET" --state-dir /cache/state "$@" >>"$DAEMON_LOG" 2>&1 &
    daemon_pid=$!
    wait_for "the daemon's API" api GET /api/v1/daemon
}

daemon_alive() {
    kill -0 "$daemon_pid" && api GET /api/v1/daemon
}

# Orderly, and in bounded time: the exit status is the daemon's own.
daemon_stop() {
    local pid=$daemon_pid
    kill -TERM "$pid" 2>/dev/null
    wait_for "the daemon's end" gone "$pid" || return 1
    wait "$pid"
}

# api METHOD PATH [FILE]: prints the body; succeeds on 2xx.
api() {
    local -a body=()
    [ $# -lt 3 ] || body=(-d "@$3")
    curl -s -S --fail-with-body --max-time 20 --unix-socket "$SOCKET" -X "$1" "${body[@]}" "http://localhost$2"
}

# api_status METHOD PATH [FILE]: prints the status alone.
api_status() {
    local -a body=()
    [ $# -lt 3 ] || body=(-d "@$3")
    curl -s -o /dev/null -w '%{http_code}' --max-time 20 --unix-socket "$SOCKET" -X "$1" "${body[@]}" \
        "http://localhost$2"
}

# counter NAME: the daemon's count.
counter() {
    api GET /api/sluice/v1/stat >/tmp/stat.json && python3 -c "
import json
print(json.load(open('/tmp/stat.json'))['counters']['$1'])"
}

# --- images

# entry ID DOMAIN BOOTSTRAP HOST REPO: an image as the API wants it.
entry() {
    cat <<TXT
{"type":"bootstrap","id":"$1","domain_id":"$2","config":{"id":"factory1","backend_type":"registry","backend_config":
{"scheme":"http","host":"$4","repo":"$5"},"cache_type":"fscache","cache_config":{"work_dir":"/tmp"},
"metadata_path":"$3"}}
TXT
}

# register ID DOMAIN BOOTSTRAP HOST REPO: the guide's PUT.
register() {
    entry "$@" >/tmp/image.json
    api PUT /api/v2/blobs /tmp/image.json
}

unregister() {
    api DELETE "/api/v2/blobs?domain_id=$1"
}

# mount_image ID DOMAIN BLOB PLACE: the guide's mount.
mount_image() {
    mkdir -p "$4"
    timeout "$PATIENCE_S" mount -t erofs -o "fsid=$1,domain_id=$2,device=$3" none "$4"
}

# bring ID BOOTSTRAP BLOB HOST REPO PLACE: both in one, the guide's way where there is one, else the daemon's.
bring() {
    if [ "$DOOR" = cachefiles ]; then
        register "$1" "$1" "$2" "$4" "$5" && mount_image "$1" "$1" "$3" "$6"
        return
    fi
    mkdir -p "$6"
    echo "{\"entry\":$(entry "$1" "$1" "$2" "$4" "$5"),\"mountpoint\":\"$6\"}" >"/tmp/wish-$1.json"
    api PUT /api/sluice/v1/mounts "/tmp/wish-$1.json"
}

take_away() { # ID PLACE
    if [ "$DOOR" = cachefiles ]; then
        umount "$2" && unregister "$1"
    else
        api DELETE "/api/sluice/v1/mounts?mountpoint=$2"
    fi
}

forget_pages() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# The blob id of an image folder: its one data blob, or for zran the layer that it refers to.
blob_of() {
    case "$1" in
        */zran) sha256sum <"${1%/zran}/source.tar.gz" | cut -d ' ' -f 1 ;;
        *) basename "$(ls -d "$1"/????????????????????????????????????????????????????????????????)" ;;
    esac
}

# Every path with everything a faithful image preserves. The root's mtime is the one thing images do not keep.
same_tree() { # PLACE TREE_TXT
    local without_mtime="s/^('\\.' 0o[0-7]+ [0-9]+:[0-9]+) [0-9]+/\\1/"
    python3 /fixtures/small/list.py "$1" >/tmp/listed || return 1
    diff <(sed -E "$without_mtime" /tmp/listed | LC_ALL=C sort) <(sed -E "$without_mtime" "$2" | LC_ALL=C sort) |
        head -n 10
    return "${PIPESTATUS[0]}"
}

# --- registries

# Debian's docker-registry, filled the way any client fills it. Its access log is the count of requests.
docker_registry_start() {
    cat >/tmp/registry.yml <<TXT
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /cache/registry}}
http: {addr: 127.0.0.1:5000}
TXT
    docker-registry serve /tmp/registry.yml >/tmp/registry.log 2>&1 &
    registry_pid=$!
    wait_for "docker-registry" curl -sf http://127.0.0.1:5000/v2/
}

# Those for a single byte are left out: they dial ahead, whenever they come.
requests_logged() {
    grep '"GET /v2/' /tmp/registry.log | grep -v '" 206 1 "'
}

# The log is written after the answer was sent: wait until it has stood still.
requests_seen() {
    local before=-1 now
    now=$(requests_logged | wc -l)
    until [ "$now" = "$before" ]; do
        sleep 0.3
        before=$now
        now=$(requests_logged | wc -l)
    done
    echo "$now"
}

# asked_nothing_since COUNT: prints the requests that came all the same.
asked_nothing_since() {
    [ "$(requests_seen)" = "$1" ] || { requests_logged | tail -n "+$(($1 + 1))"; return 1; }
}

push() { # HOST REPO TAG IMAGE_DIR [EXTRA_BLOB]
    python3 "$PARTS/push.py" "$@"
}

# registryd_start ROOT: sets `registry` (HOST:PORT) and `control`.
registryd_start() {
    registryd --root "$1" >/tmp/registryd.json 2>/tmp/registryd.log &
    registry_pid=$!
    wait_for "registryd" grep -q control /tmp/registryd.json || return 1
    registry=$(python3 -c 'import json; print(json.load(open("/tmp/registryd.json"))["address"])')
    control=$(python3 -c 'import json; print(json.load(open("/tmp/registryd.json"))["control"])')
}

break_registry() { # RULES
    curl -s -S -f -X PUT -d "$1" "http://$control/_registryd/faults"
}

heal_registry() {
    curl -s -S -f -X DELETE "http://$control/_registryd/faults"
}

# --- the end

nothing_left() {
    local left
    left=$({ grep ' erofs ' /proc/mounts; pgrep -a '^sluice'; ls "$SOCKET"; } 2>/dev/null)
    [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

# Where each thread of the daemon that does the work is: its name, its state, what it waits for in the kernel.
daemon_threads() {
    local task
    for task in "/proc/$daemon_pid/task"/*; do
        [[ "$(cat "$task/comm")" =~ ^(api-|helper-|log) ]] || echo "$(cat "$task/comm"): $(sed -n 's/^State:.//p' "$task/status") $(cat "$task/wchan") $(cat "$task/syscall")"
    done 2>/dev/null
}

finish() {
    local place
    check "nothing is left behind" nothing_left
    if [ "$failed" != 0 ]; then
        if [ -n "$daemon_pid" ] && ! gone "$daemon_pid"; then
            echo "--- the daemon is still there; its threads"
            daemon_threads
        fi
        echo "--- the end of the daemon's log"
        tail -n 40 "$DAEMON_LOG"
        echo "--- the end of the kernel's log"
        dmesg | tail -n 15
    fi
    for place in $(awk '$3 == "erofs" { print $2 }' /proc/mounts); do
        umount -l "$place"
    done
    for place in $daemon_pid $registry_pid; do
        { kill -KILL "$place"; wait "$place"; } 2>/dev/null
    done
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit
}
