#!/usr/bin/env bash
# What fails at an image's start and while containers run: the registry, the daemon, the snapshotter, containerd.
# Containers go on, new ones start when the trouble is over, and at the end nothing is left.
. "$(dirname "${BASH_SOURCE[0]}")/parts/harness.sh"

ZSTD=4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d
ZSTD_BYTES=$(stat -c %s "$FIXTURES/zstd-64k/$ZSTD")
RANDOM_SHA=$(sed -n "s/^'big\/random-5m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")
TEXT_SHA=$(sed -n "s/^'big\/text-7m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")
DEAD='[{"blob": "", "method": "GET", "effect": {"status": 503}}]'
# How often the snapshotter is killed during a pull.
KILLS=8

pull() { "$SLUICE" pull --address "$CONTAINERD" --namespace test "$@"; }

# start ID: a container that stays, in the background of containerd, not of us.
start() {
    ctr -n test run -d --net-host --snapshotter nydus --cgroup "$CGROUP/$1" \
        --mount type=bind,src=/bin/busybox,dst=/busybox,options=rbind:ro "$registry/zstd:1" "$1" /busybox sleep 1000
}

inside() { # ID COMMAND...
    ctr -n test task exec --exec-id "e$RANDOM" "$@"
}

# ctr may lose what a short command prints: it cancels the pipes when the command has ended (process.go, Delete).
sum_in() { # ID FILE
    local sum="" tries
    for tries in 1 2 3; do
        sum=$(inside "$1" /busybox sha256sum "$2" | cut -d ' ' -f 1)
        [ -z "$sum" ] || break
        echo "nothing was printed, try $tries" >&2
    done
    echo "$sum"
}

end() { # ID
    ctr -n test task kill --signal KILL "$1" && wait_for "the end of $1" ctr -n test containers rm "$1"
}

end_last() { # ID: the last one that used the image
    end "$1" && collected "the unmounting" mounted 0
}

# How the image started, as its layer says.
start_label() {
    local name
    name=$(ctr -n test snapshots --snapshotter nydus ls | awk '$3 == "Committed" && $2 ~ /^sha256/ { print $1 }')
    ctr -n test snapshots --snapshotter nydus info "$name" | sed -n 's/.*sluice.start": "\(.*\)".*/\1/p'
}

# How many images started like that, says the daemon.
starts() { # OUTCOME
    "$SLUICE" stat --apisock "$SOCKET" --json | python3 -c "import json, sys; print(json.load(sys.stdin)['counters']['starts_$1'])"
}

fresh_cache() {
    daemon_stop && rm -rf "$WORK/cache" && daemon_start
}

restart_snapshotter() { # OPTIONS
    snapshotter_stop && snapshotter_start "$@" && wait_for "containerd's connection" snapshots_answer
}

# containerd connects again after up to three seconds.
snapshots_answer() { ctr -n test snapshots --snapshotter nydus ls; }

must "the registry starts" registry_start
must "a lazily loadable image is pushed" push zstd 1 nydus "$FIXTURES/zstd-64k"
must "the daemon starts" daemon_start
must "the snapshotter starts, ready to wait" snapshotter_start --wait-ms 30000
must "containerd starts" containerd_start
must "the image is there" pull "$registry/zstd:1"

# --- the registry is dead when a container starts

break_registry "$DEAD"
start waits >"$WORK/waits" 2>&1 &
waiting=$!
waited() { [ "$(grep -c "is waited for" "$WORK/snapshotter.log")" = "$1" ]; }
check "a container waits for its registry" wait_for "a word of it" waited 1
heal_registry
check "and starts when it is back" wait "$waiting"
check "the layer says so" grep -q "lazy, after waiting" <(start_label)
equal "and the statistics" 1 starts waited
equal "it reads right" "$RANDOM_SHA" sum_in waits /big/random-5m
check "it ends, and with it the mount" end_last waits

must "a snapshotter that does not wait" restart_snapshotter --on-failure wait --image-policy "*/zstd:*=fail"
must "an empty cache" fresh_cache
break_registry "$DEAD"
refuse "the container is refused, with the reason" "cannot be mounted.*registry does not answer" start refused
check "the layer says so" grep -q "failed: .*zstd:1 cannot be mounted" <(start_label)
check "and the statistics" test "$(starts failed)" -gt 0
check "nothing stays mounted" collected "the unmounting" mounted 0
heal_registry
ctr -n test containers rm refused >/dev/null 2>&1
check "a failure is not for ever" wait_for "a start" start refused
check "it ends, and with it the mount" end_last refused

must "a snapshotter that wants all after a failure" restart_snapshotter --on-failure full --wait-ms 30000
must "an empty cache" fresh_cache
break_registry "$DEAD"
forget_requests
start full >"$WORK/full" 2>&1 &
waiting=$!
check "a container waits for its registry" wait_for "a word of it" waited 2
heal_registry
check "and starts when it is back" wait "$waiting"
check "all of the image is here then" test "$(fetched "$ZSTD")" -ge $((ZSTD_BYTES * 9 / 10))
check "the layer says so" grep -q "full: " <(start_label)
equal "and the statistics" 1 starts full
break_registry "$DEAD"
equal "the registry is needed no more" "$TEXT_SHA" sum_in full /big/text-7m
heal_registry
check "it ends, and with it the mount" end_last full

# --- the daemon dies

must "the snapshotter waits again" restart_snapshotter --wait-ms 30000
must "an empty cache" fresh_cache
check "a container runs" start one
equal "and reads" "$RANDOM_SHA" sum_in one /big/random-5m
daemon_stop KILL
equal "without a daemon it reads what it has read" "$RANDOM_SHA" sum_in one /big/random-5m
start two >"$WORK/two" 2>&1 &
waiting=$!
check "the daemon comes back" daemon_start
check "a container that was started meanwhile runs" wait "$waiting"
equal "the old one reads what nobody has read" "$TEXT_SHA" sum_in one /big/text-7m
equal "the new one, too" "$TEXT_SHA" sum_in two /big/text-7m
check "they share a mount" mounted 1

# --- the snapshotter dies

snapshotter_stop KILL
equal "containers go on without it" "$RANDOM_SHA" sum_in two /big/random-5m
refuse "new ones cannot start" "unavailable|connection|refused" start three
ctr -n test containers rm three >/dev/null 2>&1
before=$(find "$ROOT" -path '*/records/*.json' | sort)
must "it comes back" snapshotter_start
check "with all its records" test "$(find "$ROOT" -path '*/records/*.json' | sort)" = "$before"
check "and new containers start" wait_for "a start" start three
check "the first ends" end one
check "the second ends" end two
check "the third keeps a mount" test "$(our_mounts | wc -l)" -gt 0
check "the third ends, and with it the mount" end_last three

# --- the snapshotter dies while it is being used

check "the image goes" ctr -n test images rm --sync "$registry/zstd:1"
survived=0
for turn in $(seq "$KILLS"); do
    pull "$registry/zstd:1" >/dev/null 2>&1 &
    busy=$!
    python3 -c "import time; time.sleep($turn * 0.012)"
    snapshotter_stop KILL
    snapshotter_start || break
    wait "$busy"
    ctr -n test images rm --sync "$registry/zstd:1" >/dev/null 2>&1
    survived=$((survived + 1))
done
check "it is killed $KILLS times during a pull and comes back" test "$survived" = "$KILLS"
check "the image is pulled after all that" wait_for "a pull" pull "$registry/zstd:1"
equal "and right" "$TEXT_SHA  /big/text-7m" run test "$registry/zstd:1" last /busybox sha256sum /big/text-7m

# --- containerd dies

check "a container runs" start one
containerd_stop KILL
check "containerd comes back" containerd_start
equal "the container goes on" "$RANDOM_SHA" sum_in one /big/random-5m
check "it ends, and with it the mount" end_last one
check "the image goes" ctr -n test images rm --sync "$registry/zstd:1"
# What broken pulls left is held by their leases.
ctr -n test leases ls -q | while read -r lease; do ctr -n test leases rm --sync "$lease"; done >/dev/null
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept
check "nothing is mounted" mounted 0
check "the daemon serves nothing" test "$("$SLUICE" images --apisock "$SOCKET" --json)" = "[]"
check "the snapshotter stops when told" snapshotter_stop
check "the daemon stops when told" daemon_stop
finish
