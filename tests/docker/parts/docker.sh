# What the Docker suites stand on: a machine of their own (mounts, network), Debian's dockerd and docker-registry, our
# plugin and daemon, checks, and an end that cleans up. A suite sources it first of all and ends with `finish`.
# Needs root, docker.io, docker-registry, skopeo, python3, busybox-static, and sluice (SLUICE names it).

# shellcheck shell=bash

# A private view of mounts, processes and network, which all go with the suite, however it ends: the machine is left
# alone. Only the directory has to be removed out here.
if [ -z "${DOCKER_SUITE_WORK:-}" ]; then
    # In the guest the ext4 disk is at /cache; on a machine the temporary directory is on a disk.
    DOCKER_SUITE_WORK=$(mktemp -d "$([ -d /cache/lost+found ] && echo /cache || echo "${TMPDIR:-/tmp}")/docker.XXXXXX")
    export DOCKER_SUITE_WORK
    # With the namespaces' first process everything in them ends, and unshare after that; it ignores what would end us.
    trap 'kill -KILL $(cat /proc/$!/task/$!/children 2>/dev/null) 2>/dev/null; wait; [ -n "${KEEP:-}" ] || rm -rf "$DOCKER_SUITE_WORK"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    unshare --mount --net --pid --fork --kill-child --mount-proc bash "$0" "$@" &
    wait $!
    exit
fi
set -u
PATH=/usr/sbin:/usr/bin:/sbin:/bin
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(cd "$HERE/../../.." && pwd)
SLUICE=${SLUICE:-$(command -v sluice || echo "$TOP/target/release/sluice")}
NAME=hsiangkao/nydus-erofs-graphdriver:0.3.0
REGISTRY=127.0.0.1:5000
# Nothing here waits this long unless something is wrong.
PATIENCE_S=${PATIENCE_S:-60}

plugin_pid="" docker_pid="" registry_pid="" daemon_pid=""

WORK=$DOCKER_SUITE_WORK
SOCKET=/run/sluice.sock
HOME_DIR=$WORK/docker/$NAME
export DOCKER_CONFIG=$WORK/cli DOCKER_HOST=unix:///run/docker.sock DOCKER_BUILDKIT=0
DEPLOY=$TOP/tools/deploy
mkdir -p "$DOCKER_CONFIG" "$WORK"/{state,bin,etc,etc-work}
# What the units in tools/deploy say is run as they say it; what it writes outside its own directories stays in here.
cp "$SLUICE" "$WORK/bin/sluice"
mount --bind "$WORK/bin" /usr/local/bin
mount -t overlay -o "lowerdir=/etc,upperdir=$WORK/etc,workdir=$WORK/etc-work" overlay /etc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mkdir -p /etc/docker /etc/sluice /var/lib/sluice /var/lib/docker
mount --bind "$WORK/state" /var/lib/sluice
# Never an operator's credentials.
export HOME=$WORK/home
mkdir -p "$HOME"
ip link set lo up
docker() { timeout "$PATIENCE_S" /usr/bin/docker "$@" </dev/null; }

. "$TOP/tests/parts/checks.sh"

# command_of UNIT: what systemd would run.
command_of() {
    sed -n 's/^ExecStart=//p' "$DEPLOY/$1"
}

systemd_accepts() {
    command -v systemd-analyze >/dev/null || return 0
    # It looks at neighbours, so the units lie alone.
    mkdir -p "$WORK/units" && cp "$DEPLOY"/sluice.service "$DEPLOY"/sluice-docker.service "$WORK/units/" &&
        systemd-analyze verify "$WORK"/units/*.service
}

# --- the daemon and the plugin

daemon_start() {
    # shellcheck disable=SC2046
    setsid $(command_of sluice.service) >>"$WORK/daemon.log" 2>&1 &
    daemon_pid=$!
    wait_for "the daemon's API" curl -sf --unix-socket "$SOCKET" http://localhost/api/v1/daemon
}

daemon_kill() {
    stop "$daemon_pid" KILL
}

plugin_start() {
    # shellcheck disable=SC2046
    $(command_of sluice-docker.service) >>"$WORK/plugin.log" 2>&1 &
    plugin_pid=$!
    wait_for "the plugin's socket" test -S "/run/docker/plugins/$NAME.sock"
}

plugin_kill() {
    stop "$plugin_pid" KILL
    # A dead plugin's socket would pass for a living one below.
    rm -f "/run/docker/plugins/$NAME.sock"
}

# --- Docker

docker_start() {
    cp "${DAEMON_JSON:-$DEPLOY/docker-daemon.json}" /etc/docker/daemon.json
    setsid /usr/sbin/dockerd --data-root "$WORK/docker" --exec-root /run/docker-exec --pidfile /run/docker.pid \
        -H "$DOCKER_HOST" --iptables=false --ip6tables=false --bridge=none --ip-forward=false --ip-masq=false \
        --userland-proxy=false "$@" >>"$WORK/dockerd.log" 2>&1 &
    docker_pid=$!
    wait_for "dockerd" docker_answers
}

docker_answers() {
    gone "$docker_pid" || curl -s -f --max-time 2 --unix-socket /run/docker.sock http://x/_ping
}

# Orderly; what is still mounted below the data root afterwards (20.10 binds it on itself) is not ours.
docker_stop() {
    stop "$docker_pid"
    docker_pid=""
}

# --- the registry

registry_start() {
    cat >"$WORK/registry.yml" <<TXT
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $WORK/registry}, delete: {enabled: true}}
http: {addr: $REGISTRY}
TXT
    docker-registry serve "$WORK/registry.yml" >>"$WORK/registry.log" 2>&1 &
    registry_pid=$!
    wait_for "docker-registry" curl -sf "http://$REGISTRY/v2/"
}

# --- the end

# Everything mounted below the graphdriver's home.
our_mounts() {
    awk -v home="$HOME_DIR/" 'index($5, home) == 1 { print $5 }' /proc/self/mountinfo
}

# layers N: so many layers are on disk, and nothing that is half made or half removed.
layers() {
    [ "$(ls "$HOME_DIR/layers" | wc -l)" = "$1" ] && [ "$(ls "$HOME_DIR/numbers" | wc -l)" = "$1" ] &&
        [ -z "$(ls "$HOME_DIR/scrap")" ] && return
    ls "$HOME_DIR/layers" "$HOME_DIR/numbers" "$HOME_DIR/scrap"
    return 1
}

no_mounts() {
    [ -z "$(our_mounts)" ] || { our_mounts; return 1; }
}

finish() {
    local pid
    if [ "$failed" != 0 ]; then
        for pid in plugin dockerd daemon; do
            [ -f "$WORK/$pid.log" ] && echo "--- the end of $pid's log" && tail -n "${SHOWN_LINES:-15}" "$WORK/$pid.log"
        done
    fi
    # Whatever else there is ends with this shell, which is process 1 here.
    [ -z "$docker_pid" ] || docker ps -q | xargs -r /usr/bin/docker rm -f >/dev/null 2>&1
    docker_stop
    for pid in $plugin_pid $registry_pid $daemon_pid; do
        stop "$pid" TERM
    done
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit
}
