#!/bin/bash
# Daemons die, are stopped, and are replaced, while readers compare every byte. With a keeper nobody notices: right bytes,
# no EIO, nothing registered again. Without one EIO is allowed, a wrong byte never.
# Usage: succession.sh [KILLS [PATTERN]]: how many times the daemon is killed at a random moment (12); only the scenes whose
# name matches the regular expression.
. /guest/suite/parts/harness.sh

KILLS=${1:-12}
PATTERN=${2:-.}
ROOT=/cache/registry
KIND=zstd-64k
FOLDER=/fixtures/small/$KIND
BLOB=$(blob_of $FOLDER)
TREE=/fixtures/small/tree.txt
SUPERVISOR=/run/supervisor.sock
readers=""

scene() { # NAME FUNCTION
    [[ ! "$1" =~ $PATTERN ]] || check "$@"
}

# --- readers

# readers_start PLACE [OPTIONS]: eight that compare, in the background; what they found is in /tmp/readers.
readers_start() {
    local place=$1
    shift
    python3 "$PARTS/readers.py" "$place" /reference --readers 8 --reads 60 --mode mixed --seed "$RANDOM" --limit-s 60 \
        "$@" >/tmp/readers 2>&1 &
    readers=$!
}

readers_go_on() {
    ! gone "$readers"
}

readers_end() {
    local deadline=$((SECONDS + 150))
    until gone "$readers"; do
        [ "$SECONDS" -lt "$deadline" ] || { echo "readers hang"; cat /proc/"$readers"/task/*/stack; return 1; }
        sleep 0.1
    done
    wait "$readers"
    local status=$?
    cat /tmp/readers
    return "$status"
}

slowest() {
    python3 -c 'import json; print(int(json.load(open("/tmp/readers"))["slowest_ms"]))'
}

# --- daemons and keepers

daemon_kill() {
    kill -KILL "$daemon_pid"
    wait "$daemon_pid" 2>/dev/null
    return 0
}

keeper_pid() {
    pgrep -x sluice-keeper
}

keeper_gone() {
    ! keeper_pid >/dev/null
}

pause_a_little() {
    sleep "0.$((RANDOM % 9 + 1))"
}

# A fresh name for each scene: what it reads has never been read.
fresh() { # NAME
    bring "$1" "$FOLDER/image.boot" "$BLOB" "$registry" app "/mnt/$1"
}

restored() {
    api GET /api/sluice/v1/stat | python3 -c '
import json, sys
daemon = json.load(sys.stdin)["daemon"]
print(daemon)
sys.exit(daemon["restored"]["images"] != int(sys.argv[1]))' "$1"
}

# --- scenes

killed_at_random_moments() {
    local kills=0 round=0 worst=0 keeper stall
    keeper=$(keeper_pid) || { echo "no keeper"; return 1; }
    while [ "$kills" -lt "$KILLS" ]; do
        round=$((round + 1))
        fresh "round$round" || return 1
        readers_start "/mnt/round$round" --all-right
        while readers_go_on && [ "$kills" -lt "$KILLS" ]; do
            pause_a_little
            readers_go_on || break
            daemon_kill
            kills=$((kills + 1))
            [ $((kills % 3)) = 0 ] && pause_a_little
            daemon_start || return 1
        done
        readers_end || return 1
        stall=$(slowest)
        [ "$stall" -le "$worst" ] || worst=$stall
        same_tree "/mnt/round$round" $TREE || return 1
        take_away "round$round" "/mnt/round$round" || return 1
    done
    [ "$(keeper_pid)" = "$keeper" ] || { echo "the keeper is another"; return 1; }
    echo "note: $kills kills, $round images, the longest stall of a reader $worst ms" >/tmp/note
}

upgraded_under_load() {
    fresh upgrade || return 1
    readers_start /mnt/upgrade --all-right
    local round
    for round in 1 2 3; do
        sleep 1
        daemon_stop || { echo "the daemon's status is $?"; return 1; }
        daemon_start || return 1
    done
    readers_end || return 1
    echo "note: upgrades in order, the longest stall of a reader $(slowest) ms" >>/tmp/note
    restored 1 && same_tree /mnt/upgrade $TREE && take_away upgrade /mnt/upgrade
}

stopped_for_good_is_eio_at_once() {
    fresh stopped || return 1
    readers_start /mnt/stopped --without-daemon
    sleep 1
    kill -INT "$daemon_pid"
    wait_for "the daemon's end" gone "$daemon_pid" && readers_end && wait_for "the keeper's end" keeper_gone || return 1
    umount /mnt/stopped
    daemon_start && restored 1 && unregister stopped
}

patience_ends_with_eio() {
    daemon_stop && daemon_start --keep 4 || return 1
    fresh patience || return 1
    readers_start /mnt/patience --without-daemon
    sleep 1
    daemon_kill
    local since=$SECONDS
    readers_end && wait_for "the keeper's end" keeper_gone || return 1
    [ $((SECONDS - since)) -ge 3 ] || { echo "they did not wait"; return 1; }
    umount /mnt/patience
    daemon_start && unregister patience
}

both_killed_is_eio_and_nothing_is_registered_again() {
    local round
    for round in 1 2 3; do
        fresh "both$round" || return 1
        readers_start "/mnt/both$round" --without-daemon
        pause_a_little
        kill -KILL "$daemon_pid" "$(keeper_pid)"
        wait "$daemon_pid" 2>/dev/null
        daemon_start || return 1
        readers_end || return 1
        # The kernel has forgotten its mounts' cache; a new mount finds the image registered.
        umount "/mnt/both$round" || return 1
        mount_image "both$round" "both$round" "$BLOB" "/mnt/both$round" && same_tree "/mnt/both$round" $TREE || return 1
        take_away "both$round" "/mnt/both$round" || return 1
    done
}

lost_registration_is_eio_and_heals() {
    fresh lost || return 1
    ls -lR /mnt/lost >/dev/null
    unregister lost || return 1
    daemon_kill
    daemon_start || return 1
    timeout 60 python3 "$PARTS/readers.py" /mnt/lost /reference --readers 4 --reads 3 --limit-s 30 --smallest 100000 ||
        return 1
    daemon_alive >/dev/null || return 1
    register lost lost "$FOLDER/image.boot" "$registry" app || return 1
    wait_for "healing" same_tree /mnt/lost $TREE && take_away lost /mnt/lost
}

keeper_killed_is_replaced() {
    fresh replaced || return 1
    local first
    first=$(keeper_pid)
    kill -KILL "$first"
    another() { [ -n "$(keeper_pid)" ] && [ "$(keeper_pid)" != "$first" ]; }
    wait_for "another keeper" another || return 1
    sleep 1
    readers_start /mnt/replaced --all-right
    sleep 1
    daemon_kill
    daemon_start && readers_end && same_tree /mnt/replaced $TREE && take_away replaced /mnt/replaced
}

# --- the supervisor's way

supervisor_start() {
    coproc SUPERVISED { python3 "$PARTS/supervisor.py" $SUPERVISOR 2>&1; }
    supervised_in=${SUPERVISED[1]} supervised_out=${SUPERVISED[0]}
    heard listening
}

heard() { # WORD
    local line
    read -r -t 30 line <&"$supervised_out" || { echo "the supervisor says nothing"; return 1; }
    echo "supervisor: $line"
    [[ "$line" = "$1"* ]]
}

# supervised_start SOCKET [OPTIONS]: a daemon as a manager starts it; sets SOCKET and daemon_pid.
supervised_start() {
    SOCKET=$1
    shift
    sluice singleton --fscache "$CACHE" --apisock "$SOCKET" --rlimit-nofile 0 --id demo --supervisor $SUPERVISOR "$@" \
        >>"$DAEMON_LOG" 2>&1 &
    daemon_pid=$!
    wait_for "the daemon's API" api GET /api/v1/daemon
}

in_state() {
    api GET /api/v1/daemon | grep -q "\"state\":\"$1\""
}

saves() {
    echo fetch >&"$supervised_in"
    api PUT /api/v1/daemon/fuse/sendfd && heard fetched
}

takes_over() {
    echo send >&"$supervised_in"
    in_state INIT && api PUT /api/v1/daemon/fuse/takeover && heard sent && in_state READY
}

supervised_upgrade_under_load() {
    local old_socket old_pid
    supervised_start /run/first.sock && in_state RUNNING && fresh supervised || return 1
    readers_start /mnt/supervised --all-right
    sleep 1
    saves || return 1
    old_socket=$SOCKET old_pid=$daemon_pid
    supervised_start /run/second.sock --upgrade && takes_over || return 1
    SOCKET=$old_socket api PUT /api/v1/daemon/exit || return 1
    wait_for "the first daemon's end" gone "$old_pid" && wait "$old_pid" || return 1
    api PUT /api/v1/daemon/start && in_state RUNNING && readers_end || return 1
    echo "note: an upgrade by a supervisor, the longest stall of a reader $(slowest) ms" >>/tmp/note
    same_tree /mnt/supervised $TREE && take_away supervised /mnt/supervised
}

supervised_crash_under_load() {
    fresh crashed && saves || return 1
    # Saved first, registered later: it is on disk all the same.
    fresh later || return 1
    readers_start /mnt/crashed --all-right
    sleep 1
    daemon_kill
    supervised_start /run/second.sock && takes_over && api PUT /api/v1/daemon/start && in_state RUNNING || return 1
    readers_end && same_tree /mnt/crashed $TREE && same_tree /mnt/later $TREE || return 1
    take_away crashed /mnt/crashed && take_away later /mnt/later
}

wrong_states_are_refused() {
    # Nobody has said "send": the supervisor does not answer a takeover of a daemon that runs.
    [ "$(api_status PUT /api/v1/daemon/fuse/takeover)" = 400 ] && [ "$(api_status PUT /api/v1/daemon/start)" = 400 ]
}

mkdir -p /reference "$ROOT/blobs/sha256"
busybox tar -xzf /fixtures/small/source.tar.gz -C /reference
cp "$FOLDER/$BLOB" "$ROOT/blobs/sha256/"
must "the registry starts" registryd_start "$ROOT"
# Slow enough that readers wait whenever a daemon dies.
must "the registry is slow" break_registry '[{"blob":"","effect":{"latency_ms":30}}]'
must "the daemon starts" daemon_start
scene "killed at $KILLS random moments, nobody notices" killed_at_random_moments
scene "upgraded under load, nobody notices" upgraded_under_load
scene "a killed keeper is replaced and holds the device" keeper_killed_is_replaced
scene "an image without registration is EIO and heals" lost_registration_is_eio_and_heals
scene "daemon and keeper killed: EIO, and nothing is registered again" both_killed_is_eio_and_nothing_is_registered_again
scene "SIGINT is the end at once" stopped_for_good_is_eio_at_once
scene "patience ends with EIO" patience_ends_with_eio
check "the daemon stops" daemon_stop
check "no keeper is left" wait_for "the keeper's end" keeper_gone
must "the supervisor starts" supervisor_start
scene "upgraded by a supervisor, nobody notices" supervised_upgrade_under_load
scene "killed under a supervisor, nobody notices" supervised_crash_under_load
scene "what makes no sense is refused" wrong_states_are_refused
check "the supervised daemon stops" daemon_stop
exec {supervised_in}>&-
cat /tmp/note 2>/dev/null
finish
