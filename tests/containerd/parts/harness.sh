# What the containerd suites stand on: a machine of their own (mounts, network, processes), Debian's containerd, our
# snapshotter and daemon, a registry that keeps a log, checks, and an end at which nothing may be left.
# Needs root, containerd, runc, python3, curl and busybox-static. A suite sources it first of all and ends with `finish`.

# shellcheck shell=bash

# A network with nothing but loopback, and processes and mounts that end with us whatever happens.
if [ -z "${CONTAINERD_SUITE_ISOLATED:-}" ]; then
    export CONTAINERD_SUITE_ISOLATED=1
    exec unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private bash "$0" "$@"
fi
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(cd "$HERE/../../.." && pwd)
BUILT=${BUILT:-$TOP/target/release}
SLUICE=$BUILT/sluice
DEPLOY=$TOP/tools/deploy
LOG_LEVEL=${LOG_LEVEL:-debug}
FIXTURES=$TOP/tests/fixtures
# Nothing here waits this long unless something is wrong.
PATIENCE_S=60

daemon_pid="" snapshotter_pid="" containerd_pid="" registry_pid="" registry="" control=""

# Below the temporary directory, which is on a disk: overlay and the daemon's cache want one.
WORK=$(mktemp -d "${TMPDIR:-/tmp}/containerd.XXXXXX")
mount -t tmpfs tmpfs /run
ip link set lo up
SOCKET=/run/sluice.sock
CONTAINERD=/run/containerd/containerd.sock
ROOT=$WORK/snapshots
# What the unit and the manifest of tools/deploy say is run here with other directories.
export HOME=$WORK/home
mkdir -p "$HOME"

. "$TOP/tests/parts/checks.sh"

# --- ours

daemon_start() {
    "$SLUICE" daemon --cache "$WORK/cache" --state-dir "$WORK/state" --apisock "$SOCKET" \
        --log-level "$LOG_LEVEL" "$@" >>"$WORK/daemon.log" 2>&1 &
    daemon_pid=$!
    disown
    wait_for "the daemon's API" "$SLUICE" images --apisock "$SOCKET"
}

daemon_stop() {
    stop "$daemon_pid" "$@"
    daemon_pid=""
}

snapshotter_start() {
    "$SLUICE" snapshotter --root "$ROOT" --log-level "$LOG_LEVEL" "$@" >>"$WORK/snapshotter.log" 2>&1 &
    snapshotter_pid=$!
    disown
    wait_for "the snapshotter's socket" listens /run/sluice-snapshotter/nydus.sock
}

# A dead snapshotter's socket is still there.
listens() {
    python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])' "$1"
}

snapshotter_stop() {
    stop "$snapshotter_pid" "$@"
    snapshotter_pid=""
}

# Everything mounted below our root.
our_mounts() {
    awk -v root="$ROOT/" 'index($5, root) == 1 { print $5 }' /proc/self/mountinfo
}

# mounted COUNT: so many lazily loaded images are.
mounted() {
    [ "$(our_mounts | wc -l)" = "$1" ] || { our_mounts; return 1; }
}

# --- containerd, from the snippet that we ship. Debian's unless another one comes first in the PATH.

containerd_major() {
    containerd --version | sed -E 's/.* v?([0-9]+)\.[^ ]* .*/\1/'
}

containerd_config() {
    cat <<TXT
version = $1
root = "$WORK/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri"]
[grpc]
  address = "$CONTAINERD"
[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "0s"
  startup_delay = "0s"
TXT
}

# Where root may not raise a process's importance, CRI must not try.
containerd_start() {
    if [ "$(containerd_major)" = 1 ]; then
        containerd_config 2
        cat <<TXT "$DEPLOY/containerd-1.6.toml" -
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "$registry/pause:1"
TXT
    else
        containerd_config 3
        cat <<TXT "$DEPLOY/containerd-2.toml" -
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$registry/pause:1"
TXT
    fi >"$WORK/containerd.toml"
    # Not in a row with others: its shims outlive it.
    setsid containerd --config "$WORK/containerd.toml" >>"$WORK/containerd.log" 2>&1 &
    containerd_pid=$!
    disown
    wait_for "containerd" ctr version
}

containerd_stop() {
    stop "$containerd_pid" "$@"
    containerd_pid=""
}

# Without input: `ctr run` waits for it.
ctr() {
    timeout "$PATIENCE_S" ctr --address "$CONTAINERD" "$@" </dev/null
}

cri() {
    timeout "$PATIENCE_S" "$BUILT/examples/cri" --address "$CONTAINERD" "$@" </dev/null
}

# run NAMESPACE IMAGE ID COMMAND...: a container that has our busybox and sees the host's network.
run() {
    local namespace=$1 image=$2 id=$3
    shift 3
    ctr -n "$namespace" run --rm --net-host --snapshotter nydus --cgroup "$CGROUP/$id" \
        --mount type=bind,src=/bin/busybox,dst=/busybox,options=rbind:ro "$image" "$id" "$@"
}

# snapshots NAMESPACE: how many there are.
snapshots() {
    ctr -n "$1" snapshots --snapshotter nydus ls | tail -n +2 | wc -l
}

# collected WHAT COMMAND...: as wait_for, while containerd collects garbage. Left alone it does so when it likes: after a
# slow collection it rests fifty times as long, and a removal during one may not start another.
collected() {
    local what=$1
    shift
    wait_for "$what" after_collection "$@"
}

after_collection() {
    # Who deletes a lease like that has to wait for a collection.
    ctr -n test leases create --id collect && ctr -n test leases rm --sync collect
    "$@"
}

# nothing_kept: no snapshot directory is left in any root.
nothing_kept() {
    local left
    left=$(find "$ROOT" -mindepth 3 -maxdepth 3 \( -path '*/snapshots/*' -o -path '*/records/*' \))
    [ -z "$left" ] || { echo "$left"; return 1; }
}

# --- the registry

registry_start() { # [OPTIONS]
    "$BUILT/examples/registryd" --root "$WORK/registry" "$@" >"$WORK/registryd.json" 2>"$WORK/registryd.log" &
    registry_pid=$!
    disown
    wait_for "registryd" grep -q control "$WORK/registryd.json" || return 1
    registry=$(python3 -c "import json; print(json.load(open('$WORK/registryd.json'))['address'])")
    control=$(python3 -c "import json; print(json.load(open('$WORK/registryd.json'))['control'])")
    # A registry that asks for a password was filled before.
    [ $# -gt 0 ] || push pause 1 pause
}

push() { # REPO TAG SHAPE...
    python3 "$HERE/image.py" "$registry" "$@"
}

break_registry() { # RULES
    curl -s -S -f -X PUT -d "$1" "http://$control/_registryd/faults"
}

heal_registry() {
    curl -s -S -f -X DELETE "http://$control/_registryd/faults"
}

forget_requests() {
    curl -s -S -f -X DELETE "http://$control/_registryd/log"
}

# fetched BLOB: bytes of this blob that were sent since the log was emptied.
fetched() {
    curl -s -S -f "http://$control/_registryd/log" | python3 -c "
import json, sys
requests = json.load(sys.stdin)['requests']
print(sum(it['bytes'] for it in requests if it['method'] == 'GET' and '/blobs/sha256:$1' in it['path']))"
}

# --- the end

CGROUP=/sluice-$(basename "$WORK")

remove_cgroups() {
    local name
    for name in "${CGROUP#/}" k8s.io; do
        find /sys/fs/cgroup -maxdepth 2 -type d -name "$name" | while read -r folder; do
            find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null
        done
    done
}

finish() {
    local name pid
    if [ "$failed" != 0 ]; then
        for name in snapshotter daemon containerd; do
            [ -f "$WORK/$name.log" ] && echo "--- the end of $name's log" && tail -n "${SHOWN_LINES:-15}" "$WORK/$name.log"
        done
    fi
    for pid in $containerd_pid $snapshotter_pid $daemon_pid $registry_pid; do
        stop "$pid" KILL
    done
    awk -v work="$WORK/" 'index($5, work) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r place; do
        umount -l "$place"
    done
    remove_cgroups
    rm -rf "$WORK"
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit
}
trap 'bad "the suite" "was interrupted"; finish' INT TERM HUP
