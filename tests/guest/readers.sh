#!/bin/bash
# Many readers at once, random and sequential, every byte compared, while another image comes and goes and the API is
# called without pause.
# doors: cachefiles fanotify
. /guest/suite/parts/harness.sh

READERS=64
READS=12
REMOUNTS=50
FOLDER=/fixtures/small/lz4-1m

remount_other() {
    local round blob
    blob=$(blob_of /fixtures/small/zstd-64k)
    for round in $(seq "$REMOUNTS"); do
        bring other /fixtures/small/zstd-64k/image.boot "$blob" 127.0.0.1:5000 images /mnt/other ||
            { echo "round $round: mount"; return 1; }
        cmp "/mnt/other/$PROBE" "/reference/$PROBE" || { echo "round $round: bytes"; return 1; }
        take_away other /mnt/other || { echo "round $round: unmount"; return 1; }
    done
}

# Until told to stop; a call that fails is a finding.
call_without_pause() {
    local path calls=0
    while [ ! -e /tmp/stop-calling ]; do
        for path in /api/v1/daemon /api/v2/daemon /api/v1/daemon/events /api/sluice/v1/stat /api/sluice/v1/images; do
            api GET "$path" >/dev/null || { echo "GET $path failed after $calls calls"; return 1; }
            calls=$((calls + 1))
        done
    done
    echo "$calls calls"
}

mkdir -p /reference
busybox tar -xzf /fixtures/small/source.tar.gz -C /reference
PROBE=$(cd /reference && find . -type f -size +8k | LC_ALL=C sort | head -n 1)
docker_registry_start
for kind in lz4-1m zstd-64k; do
    check "$kind: pushed" push 127.0.0.1:5000 images "$kind" "/fixtures/small/$kind"
done
must "the daemon starts" daemon_start
check "the image is mounted" bring main "$FOLDER/image.boot" "$(blob_of $FOLDER)" 127.0.0.1:5000 images /mnt/main

call_without_pause >/tmp/calls 2>&1 &
caller=$!
remount_other >/tmp/remounts 2>&1 &
remounter=$!
for mode in mixed random sequential; do
    check "$READERS readers, $mode" python3 "$PARTS/readers.py" /mnt/main /reference \
        --readers "$READERS" --reads "$READS" --mode "$mode" --all-right --limit-s 60
    forget_pages
done
if wait "$remounter"; then
    ok "another image came and went $REMOUNTS times"
else
    bad "another image came and went $REMOUNTS times" "$(tail -n 3 /tmp/remounts)"
fi
touch /tmp/stop-calling
if wait "$caller"; then ok "the API answered: $(cat /tmp/calls)"; else bad "the API answered" "$(cat /tmp/calls)"; fi
check "the whole tree is right" same_tree /mnt/main /fixtures/small/tree.txt
check "no read failed" test "$(counter reads_failed)" = 0
check "unmount" take_away main /mnt/main
check "the daemon stops" daemon_stop
finish
