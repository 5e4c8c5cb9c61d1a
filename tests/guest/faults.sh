#!/bin/bash
# Everything that can go wrong below a reader: the reader gets the right bytes or EIO, in time, and once the cause is
# gone the same mount reads on, without a remount or a restart. Nothing ends the daemon.
# Usage: faults.sh [PATTERN]: only the scenes whose name matches the regular expression.
# doors: cachefiles fanotify
. /guest/suite/parts/harness.sh

DEADLINE_S=4
# One read(2) is up to two requests of the kernel, one after the other: when read-ahead got nothing it asks once more
# for the page itself. Emulation makes everything slow but waiting, so the reader may be this much later still.
SLACK_S=4
LIMIT_S=$((2 * DEADLINE_S + SLACK_S))
PATTERN=${1:-.}
SMALL=/fixtures/small/lz4-1m
BLOB=$(blob_of $SMALL)
TREE=/fixtures/small/tree.txt

# Nothing outlives this daemon: what happens then is the subject of succession.sh.
start() {
    daemon_start --deadline-ms $((DEADLINE_S * 1000)) --keep 0
}

# read_some PLACE [OPTIONS]: a few cold random pages, right or EIO, each within the deadline.
read_some() {
    local place=$1
    shift
    python3 "$PARTS/readers.py" "$place" /reference --limit-s $LIMIT_S --readers 4 --reads 1 \
        --smallest 100000 --seed "$RANDOM" "$@"
}

# What was refused while the registry was broken must come once it is healed, soon and on the same mount.
heals() { # PLACE
    local deadline=$((SECONDS + 20))
    until same_tree "$1" "$TREE" >/tmp/heals 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { tail -n 5 /tmp/heals; return 1; }
        sleep 0.5
    done
}

# scene NAME FUNCTION: one check of many steps; what a failed one left standing is cleared for the next.
scene() {
    [[ "$1" =~ $PATTERN ]] || return 0
    heal_registry
    check "$@" || sweep
}

sweep() {
    local place
    heal_registry
    for place in $(awk '$3 == "erofs" { print $2 }' /proc/mounts); do
        take_away "${place##*/}" "$place" || umount -l "$place"
    done >/dev/null 2>&1
    if gone "$daemon_pid"; then
        must "another daemon starts" start
    fi
}

# fault NAME EFFECT [ONCE]: at first once, which nobody may notice (unless ONCE is ""), then always, then healed.
fault() {
    local name=$1 effect=$2 once=${3---all-right} place=/mnt/fault
    [[ "$1" =~ $PATTERN ]] || return 0
    heal_registry
    check "$name: mount" bring "fault-$name" "$SMALL/image.boot" "$BLOB" "$registry" app "$place"
    break_registry "[{\"blob\":\"\",\"method\":\"GET\",\"count\":1,\"effect\":$effect}]"
    # shellcheck disable=SC2086
    check "$name: once is not noticed" read_some "$place" $once
    take_away "fault-$name" "$place"
    check "$name: mount again" bring "fault-$name-2" "$SMALL/image.boot" "$BLOB" "$registry" app "$place"
    break_registry "[{\"blob\":\"\",\"method\":\"GET\",\"effect\":$effect}]"
    check "$name: always gives right bytes or EIO in time" read_some "$place"
    heal_registry
    check "$name: the same mount heals" heals "$place"
    check "$name: unmount" take_away "fault-$name-2" "$place"
}

registry_faults() {
    fault latency '{"latency_ms":300}'
    fault late '{"latency_ms":20000}' ""
    fault bandwidth '{"bandwidth_bytes_per_second":2000000}'
    fault drip '{"slow_drip":200}' ""
    fault unauthorized '{"unauthorized":true}' ""
    fault forbidden '{"forbidden":true}' ""
    fault redirect '{"redirect":true}'
    fault too-many '{"too_many":1}'
    fault unavailable '{"status":503}'
    fault not-found '{"status":404}' ""
    fault reset-early '{"reset":0}'
    fault reset-midway '{"reset":3000}'
    fault truncate '{"truncate":100}'
    fault overlong '{"overlong":10}'
    fault stray-bytes '{"stray_bytes":10}'
    fault wrong-range '{"wrong_content_range":true}'
    fault full-200 '{"full_200_for_range":true}'
    fault hang '{"hang":true}' ""
    fault close-before '{"close_before_response":true}'
    fault close-after '{"close_after_response":true}'
    fault garbage '{"garbage_head":true}'
    fault huge-head '{"huge_head":1000000}'
}

dead_registry_slows_nobody_else() {
    local slowest
    bring dead "$SMALL/image.boot" "$BLOB" "$registry" dead /mnt/dead || return 1
    bring living /fixtures/small/zstd-64k/image.boot "$(blob_of /fixtures/small/zstd-64k)" "$registry" app \
        /mnt/living || return 1
    break_registry '[{"repo":"dead","blob":"","effect":{"hang":true}}]'
    read_some /mnt/dead --readers 24 --reads 1 >/tmp/dead-readers 2>&1 &
    local dead_readers=$!
    sleep 1
    read_some /mnt/living --readers 4 --reads 10 --all-right >/tmp/living || { cat /tmp/living; return 1; }
    slowest=$(python3 -c 'import json; print(int(json.load(open("/tmp/living"))["slowest_ms"]))')
    wait "$dead_readers" || { echo "readers of the dead registry: $(cat /tmp/dead-readers)"; return 1; }
    [ "$slowest" -lt 2000 ] || { echo "slowest read $slowest ms"; return 1; }
    heal_registry
    heals /mnt/dead
    take_away dead /mnt/dead && take_away living /mnt/living
}

# The lowest bit of one byte in the middle of the blob is wrong, whoever asks and however often.
flipped_bit_is_one_chunk() {
    local before total refused lines
    before=$(($(counter digest_failures) + $(counter bad_chunks)))
    bring flip /tmp/flip.boot "$FLIP_BLOB" "$registry" app /mnt/flip || return 1
    break_registry "[{\"blob\":\"$FLIP_BLOB\",\"effect\":{\"flip_bit\":200000}}]"
    python3 "$PARTS/readers.py" /mnt/flip /reference --mode whole --limit-s $LIMIT_S >/tmp/flip ||
        { cat /tmp/flip; return 1; }
    refused=$(python3 -c 'import json; print(json.load(open("/tmp/flip"))["refused"])')
    total=$(python3 -c 'import json; print(json.load(open("/tmp/flip"))["reads"])')
    [ "$refused" -ge 1 ] && [ "$refused" -le $((total / 4)) ] || { cat /tmp/flip; return 1; }
    [ $(($(counter digest_failures) + $(counter bad_chunks))) -gt "$before" ] || { echo "no counter moved"; return 1; }
    lines=$(grep -c " error .*flip.*${FLIP_BLOB:0:8}.*chunk" "$DAEMON_LOG")
    [ "$lines" = 1 ] || { echo "$lines log lines name the image, the blob and the chunk:"
        grep " error .*flip.*${FLIP_BLOB:0:8}.*chunk" "$DAEMON_LOG" | head -n 4; return 1; }
    heal_registry
    heals /mnt/flip && take_away flip /mnt/flip
}

full_disk_is_eio_and_heals() {
    bring full "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/full || return 1
    dd if=/dev/zero of="$CACHE/ballast" bs=1M 2>/dev/null
    read_some /mnt/full || return 1
    daemon_alive >/dev/null || return 1
    rm "$CACHE/ballast"
    sync
    heals /mnt/full && take_away full /mnt/full
}

# Runs the daemon on a small disk of its own, for the time of one check.
with_small_disk() {
    local CACHE=/cache/small-disk status loop
    truncate -s 48M /cache/small.img
    mkfs.ext4 -q -F /cache/small.img
    mkdir -p "$CACHE"
    # In two steps: mount -o loop holds the device open for writing, and this kernel refuses to mount such devices.
    loop=$(losetup --find --show /cache/small.img) && mount "$loop" "$CACHE" || return 1
    start && full_disk_is_eio_and_heals
    status=$?
    daemon_stop
    umount "$CACHE" || { fuser -vm "$CACHE"; return 1; }
    losetup -d "$loop"
    rm /cache/small.img
    return "$status"
}

# The kernel closes the object while its read is in flight.
close_during_read() {
    bring closing "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/closing || return 1
    break_registry '[{"blob":"","effect":{"hang":true}}]'
    cat /mnt/closing/big/* >/dev/null 2>&1 &
    local reader=$!
    sleep 1
    kill -KILL "$reader"
    wait "$reader" 2>/dev/null
    take_away closing /mnt/closing || return 1
    heal_registry
    bring closing "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/closing && heals /mnt/closing &&
        take_away closing /mnt/closing
}

truncated_blob_is_refused() {
    cp "$ROOT/blobs/sha256/$BLOB" /tmp/blob
    truncate -s 1500000 "$ROOT/blobs/sha256/$BLOB"
    bring short "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/short && read_some /mnt/short || return 1
    cp /tmp/blob "$ROOT/blobs/sha256/$BLOB"
    heals /mnt/short && take_away short /mnt/short
}

unknown_objects_are_refused() {
    bring known "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/known || return 1
    umount /mnt/known || return 1
    ! mount_image nobody nobody "$BLOB" /mnt/nobody || { echo "mounted an unknown image"; return 1; }
    # The kernel opens a blob behind mount's back: what it was told shows when somebody reads.
    if mount_image known known "${BLOB//[0-9]/0}" /mnt/known; then
        ! timeout "$PATIENCE_S" cat /mnt/known/big/* >/dev/null || { echo "read an unknown blob"; return 1; }
        umount /mnt/known || return 1
    fi
    daemon_alive >/dev/null && mount_image known known "$BLOB" /mnt/known && heals /mnt/known && take_away known /mnt/known
}

bad_requests_end_nothing() {
    local status body
    for body in '' '{' '[]' '{"type":"bootstrap"}' '{"type":"bootstrap","id":"a/b","config":1}' "$(head -c 60000 /dev/zero | tr '\0' x)"; do
        echo "$body" >/tmp/body
        status=$(api_status PUT /api/v2/blobs /tmp/body)
        [[ "$status" = [45]?? ]] || { echo "status $status for ${body:0:40}"; return 1; }
    done
    [[ "$(api_status GET /nothing)" = 404 ]] && [[ "$(api_status GET '/api/v2/blobs?domain_id=none')" = 200 ]] || return 1
    [[ "$(api_status DELETE '/api/v2/blobs?domain_id=none&blob_id=none')" = [45]?? ]] || return 1
    daemon_alive >/dev/null
}

# Cut short anywhere, or with bits flipped at random: an error, or an image that reads right bytes or EIO.
damaged_bootstraps_end_nothing() {
    local round
    for round in $(seq 40); do
        python3 - "$round" <<'TXT'
import random, sys
dice = random.Random(int(sys.argv[1]))
data = bytearray(open('/fixtures/small/lz4-1m/image.boot', 'rb').read())
if dice.random() < 0.4:
    del data[dice.randrange(len(data)):]
for _ in range(dice.randrange(1, 20)):
    if data:
        data[dice.randrange(min(len(data), 8192 if dice.random() < 0.5 else len(data)))] ^= 1 << dice.randrange(8)
open('/tmp/damaged.boot', 'wb').write(data)
TXT
        if bring "damaged-$round" /tmp/damaged.boot "$BLOB" "$registry" app /mnt/damaged >/dev/null 2>&1; then
            timeout 20 python3 "$PARTS/readers.py" /mnt/damaged /mnt/damaged --reads 3 >/dev/null 2>&1
        fi
        # It may be registered and not mounted.
        { take_away "damaged-$round" /mnt/damaged || unregister "damaged-$round"; } >/dev/null 2>&1
        ! mountpoint -q /mnt/damaged || return 1
        daemon_alive >/dev/null || { echo "round $round ended the daemon"; return 1; }
    done
}

# No reader hangs when the daemon dies, and a successor serves the same images again.
killed_daemon_hangs_nobody() {
    bring killed "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/killed || return 1
    break_registry '[{"blob":"","effect":{"latency_ms":2000}}]'
    read_some /mnt/killed --readers 8 --reads 2 --without-daemon >/tmp/killed-readers 2>&1 &
    local readers=$!
    sleep 1
    kill -KILL "$daemon_pid"
    wait "$daemon_pid" 2>/dev/null
    wait_for "the end of the readers" gone "$readers" || return 1
    wait "$readers" || { cat /tmp/killed-readers; return 1; }
    umount /mnt/killed || return 1
    heal_registry
    start || return 1
    bring killed "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/killed && heals /mnt/killed &&
        take_away killed /mnt/killed
}

shutdown_under_load_leaves_nothing() {
    bring load "$SMALL/image.boot" "$BLOB" "$registry" app /mnt/load || return 1
    break_registry '[{"blob":"","effect":{"hang":true}}]'
    read_some /mnt/load --readers 16 --reads 2 --without-daemon >/tmp/load-readers 2>&1 &
    local readers=$!
    sleep 1
    daemon_stop || { echo "the daemon's status is $?"; return 1; }
    wait_for "the end of the readers" gone "$readers" || return 1
    wait "$readers" || { cat /tmp/load-readers; return 1; }
    umount /mnt/load && [ ! -e "$SOCKET" ]
}

ROOT=/cache/registry
ZSTD_BLOB=$(blob_of /fixtures/small/zstd-64k)
# The same image under another name: nothing of it is there, also where images share what their blobs have.
FLIP_BLOB="f11bf11b${ZSTD_BLOB:8}"
mkdir -p /reference "$ROOT/blobs/sha256"
sed "s/$ZSTD_BLOB/$FLIP_BLOB/g" /fixtures/small/zstd-64k/image.boot >/tmp/flip.boot
busybox tar -xzf /fixtures/small/source.tar.gz -C /reference
cp "$SMALL/$BLOB" "/fixtures/small/zstd-64k/$ZSTD_BLOB" "$ROOT/blobs/sha256/"
cp "/fixtures/small/zstd-64k/$ZSTD_BLOB" "$ROOT/blobs/sha256/$FLIP_BLOB"
must "the registry starts" registryd_start "$ROOT"
must "the daemon starts" start
registry_faults
scene "a dead registry slows no other image" dead_registry_slows_nobody_else
scene "a flipped bit is one chunk, one count, one line" flipped_bit_is_one_chunk
scene "a blob cut short is EIO until it is whole" truncated_blob_is_refused
scene "a close during a read" close_during_read
[ "$DOOR" != cachefiles ] || scene "what nobody registered is refused" unknown_objects_are_refused
scene "bad requests end nothing" bad_requests_end_nothing
scene "damaged bootstraps end nothing" damaged_bootstraps_end_nothing
check "the daemon is still there" daemon_alive
scene "a killed daemon hangs nobody" killed_daemon_hangs_nobody
scene "shutdown under load" shutdown_under_load_leaves_nothing
gone "$daemon_pid" || check "the daemon stops" daemon_stop
scene "a full cache disk is EIO and heals" with_small_disk
finish
