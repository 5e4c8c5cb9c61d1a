#!/bin/bash
# One life of a machine whose power may go at any moment: looks at what the last life left on the disk, then fills again
# and waits for the end. tools/powerloss runs it, life after life, on the same disk.
# Usage: powerloss.sh FILLS LIFE LAST; what FILLS may be says tools/powerloss --help.
. /guest/suite/parts/harness.sh

FILLS=$1 LIFE=$2 LAST=$3
# The registry lies in memory: its power does not go.
ROOT=/tmp/registry

# --- the stand-in

look_at_fills() {
    python3 "$PARTS/filler.py" look /cache/fills | tee /tmp/look
    python3 -c 'import json; exit(bool(json.load(open("/tmp/look"))["wrong"]))'
}

# --- the daemon

many() { # WHAT
    MANY_DOOR=$DOOR MANY_SOCKET=$SOCKET python3 "$PARTS/many.py" "$@"
}

# What the last life left is right, or is fetched again.
every_byte_is_right() {
    local before
    before=$(counter fetched_bytes)
    many mount "$registry" && many compare || return 1
    echo "$(($(counter fetched_bytes) - before)) bytes were fetched again"
}

start_afresh() {
    many unmount && daemon_stop || return 1
    rm -rf "$CACHE" /cache/state
    sync
}

# tools/powerloss waits for the word "filling" that the fillers say, and cuts.
wait_for_the_end() {
    wait "$1"
    bad "life $LIFE: fills until the power goes" "they ended by themselves"
}

life_of_a_filler() {
    [ "$LIFE" = 1 ] || check "life $LIFE: what is recorded as complete is right" look_at_fills
    cat /tmp/look 2>/dev/null
    [ "$LIFE" -lt "$LAST" ] || return
    rm -rf /cache/fills
    sync
    python3 "$PARTS/filler.py" fill /cache/fills "$FILLS" 2>/dev/null &
    wait_for_the_end "$!"
}

life_of_a_daemon() {
    check "life $LIFE: the images are made" many make
    must "life $LIFE: the registry starts" registryd_start "$ROOT"
    must "life $LIFE: the daemon starts" daemon_start
    # Every third life goes on where the last one was cut off, so that cuts also follow each other.
    if [ "$LIFE" -gt 1 ] && { [ $((LIFE % 3)) != 0 ] || [ "$LIFE" = "$LAST" ]; }; then
        check "life $LIFE: every byte is right or fetched again" every_byte_is_right
        cat /tmp/check-output
        if [ "$LIFE" = "$LAST" ]; then
            check "life $LIFE: the images go" many unmount
            check "life $LIFE: the daemon stops" daemon_stop
            return
        fi
        must "life $LIFE: an empty cache" start_afresh
        must "life $LIFE: the daemon starts again" daemon_start
    fi
    must "life $LIFE: the images are mounted" many mount "$registry"
    many read "$registry" 2>/tmp/read.log &
    wait_for_the_end "$!"
}

# What the controls take away from the daemon: syncs, or the knowledge that this is another boot.
weaken() {
    local boot_id=/proc/sys/kernel/random/boot_id
    case "$FILLS" in
        unsynced) export LD_PRELOAD=/guest/unsynced.so ;;
        believing)
            [ -f /cache/boot_id ] || cat "$boot_id" >/cache/boot_id
            sync
            cp /cache/boot_id /tmp/boot_id
            mount --bind /tmp/boot_id "$boot_id"
            ;;
    esac
}

# The kernel writes back soon, and the journal commits soon: more is under way when the power goes. And ext4 does not hold
# sizes back until the bytes below them are written, as it does unless told otherwise and as nobody may rely on.
hurry() {
    echo 50 >/proc/sys/vm/dirty_writeback_centisecs
    echo 100 >/proc/sys/vm/dirty_expire_centisecs
    [ "$(stat -f -c %T /cache)" != ext2/ext3 ] || {
        umount /cache && mount -o commit=1,data=writeback,nodelalloc /dev/vdc /cache
    }
}

must "life $LIFE: the cache disk is mounted" mountpoint -q /cache
must "life $LIFE: it is in a hurry" hurry
weaken
if [[ "$FILLS" = @(synced|trusting) ]]; then
    life_of_a_filler
else
    life_of_a_daemon
fi
finish
