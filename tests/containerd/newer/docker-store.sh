#!/usr/bin/env bash
# Docker 26 and later with its containerd image store: lazily loaded images by plain `docker pull` and `docker run`.
# Needs such a dockerd and its docker in the PATH; tools/newer runs it with Debian's.
. "$(dirname "${BASH_SOURCE[0]}")/../parts/harness.sh"

ZSTD=4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d
ZSTD_BYTES=$(stat -c %s "$FIXTURES/zstd-64k/$ZSTD")
RANDOM_SHA=$(sed -n "s/^'big\/random-5m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")
DOCKER_HOST=unix:///run/docker.sock
export DOCKER_HOST DOCKER_CONFIG=$WORK/cli DOCKER_BUILDKIT=0

docker() {
    timeout "$PATIENCE_S" docker "$@" </dev/null
}

docker_start() {
    mkdir -p "$WORK/docker.d" /run/docker
    cat >"$WORK/docker.d/daemon.json" <<TXT
{ "features": {"containerd-snapshotter": true}, "storage-driver": "nydus", "containerd": "$CONTAINERD" }
TXT
    setsid dockerd --config-file "$WORK/docker.d/daemon.json" --data-root "$WORK/docker" --exec-root /run/docker-exec \
        --pidfile /run/docker.pid -H "$DOCKER_HOST" --iptables=false --ip6tables=false --bridge=none --ip-forward=false \
        --ip-masq=false --userland-proxy=false >>"$WORK/dockerd.log" 2>&1 &
    docker_pid=$!
    disown
    wait_for "dockerd" docker version
}

# in_image IMAGE COMMAND...: a container that has our busybox.
in_image() {
    docker run --rm --network host -v /bin/busybox:/busybox:ro "$@"
}

must "the registry starts" registry_start
must "a lazily loadable image is pushed" push zstd 1 nydus "$FIXTURES/zstd-64k"
must "and one with nothing but its bootstrap" push lz4 1 boot "$FIXTURES/lz4-1m"
must "and an ordinary one" push plain 1 plain
must "the daemon starts" daemon_start
must "the snapshotter starts" snapshotter_start
must "containerd starts" containerd_start
must "Docker starts" docker_start
equal "Docker keeps its images in containerd, with us" "io.containerd.snapshotter.v1 nydus" \
    docker info -f '{{range .DriverStatus}}{{index . 1}}{{end}} {{.Driver}}'

check "docker pull of an ordinary image" docker pull -q "$registry/plain:1"
equal "it runs" hello in_image "$registry/plain:1"

forget_requests
must "docker pull of a lazily loadable image" docker pull -q "$registry/zstd:1"
equal "nothing of the blob was fetched" 0 fetched "$ZSTD"
equal "it runs" "$RANDOM_SHA  /big/random-5m" in_image "$registry/zstd:1" /busybox sha256sum /big/random-5m
check "of $ZSTD_BYTES bytes $(fetched "$ZSTD") were fetched" test "$(fetched "$ZSTD")" -lt "$ZSTD_BYTES"
check "the mount went with the container" collected "the unmounting" mounted 0
check "a container that stays" in_image -d --name one "$registry/zstd:1" /busybox sleep 1000
check "docker exec" docker exec one /busybox touch /new
equal "docker diff" "A /new" sh -c "docker diff one | grep new"
check "docker commit" docker commit one "$registry/changed:1"
equal "and it runs, on the lazy image" "/new" in_image "$registry/changed:1" /busybox ls /new
check "two images share one mount" mounted 1
check "it goes" docker rm -f one

check "docker pull of a bootstrap alone" docker pull -q "$registry/lz4:1"
equal "it runs" "$RANDOM_SHA  /big/random-5m" in_image "$registry/lz4:1" /busybox sha256sum /big/random-5m

check "all images go" docker rmi "$registry/changed:1" "$registry/zstd:1" "$registry/lz4:1" "$registry/plain:1"
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept
check "nothing is mounted" mounted 0
check "Docker stops" stop "$docker_pid"
finish
