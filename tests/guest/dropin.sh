#!/bin/bash
# A manager written for nydusd starts us: by that name and as `sluice singleton`, with nydusd's options and its HTTP API.
# doors: cachefiles
. /guest/suite/parts/harness.sh

KIND=lz4-1m
FOLDER=/fixtures/small/$KIND
PLACE=/mnt/dropin

# manager_starts PROGRAM...: nydusd's command line.
manager_starts() {
    mkdir -p "$CACHE"
    "$@" singleton --fscache "$CACHE" --fscache-threads 2 --apisock "$SOCKET" --log-level info --rlimit-nofile 0 \
        >>"$DAEMON_LOG" 2>&1 &
    daemon_pid=$!
    wait_for "the daemon's API" api GET /api/v1/daemon
}

is_running() {
    api GET /api/v1/daemon | python3 -c 'import json, sys; sys.exit(json.load(sys.stdin)["state"] != "RUNNING")'
}

serves() { # NAME
    must "$1: the manager's PUT" register demo demo "$FOLDER/image.boot" "$registry" "$KIND"
    must "$1: the manager's mount" mount_image demo demo "$(blob_of "$FOLDER")" "$PLACE"
    check "$1: every file is as it was" same_tree "$PLACE" /fixtures/small/tree.txt
    check "$1: unmount" umount "$PLACE"
    check "$1: the manager's DELETE" unregister demo
}

exits_by_api() {
    api PUT /api/v1/daemon/exit || return 1
    wait_for "the daemon's end" gone "$daemon_pid" && wait "$daemon_pid"
}

registryd load --root /cache/registry --repo "$KIND" --tag small "$FOLDER" >/dev/null || exit 1
registryd_start /cache/registry || exit 1
ln -sf "$(command -v sluice)" /usr/local/bin/nydusd

must "nydusd starts" manager_starts nydusd
check "nydusd is RUNNING" is_running
serves "nydusd"
check "nydusd exits by the API with status 0" exits_by_api
must "sluice singleton starts" manager_starts sluice
serves "sluice singleton"
check "sluice singleton stops in order" daemon_stop
finish
