#!/bin/bash
# Images made by somebody else's tool, read file by file from Debian's real registry: every byte and attribute, once
# over the network and never again, the guide's way and in one step.
# doors: cachefiles fanotify fanotify:xfs fanotify:btrfs
. /guest/suite/parts/harness.sh

HOST=127.0.0.1:5000
BOOTSTRAP_UPCALLS_MAX=4

# Whatever the image already brought, neither a pass without page cache nor one after a restart may ask the registry.
image_is_faithful() { # SIZE KIND
    local size=$1 kind=$2 folder=/fixtures/$1/$2 id="$1-$2" blob place="/mnt/$1-$2" before reads
    blob=$(blob_of "$folder")
    reads=$(counter bootstrap_reads)
    check "$id: the guide's PUT and mount" bring "$id" "$folder/image.boot" "$blob" "$HOST" "fixtures/$kind" "$place"
    check "$id: every file is as it was" same_tree "$place" "/fixtures/$size/tree.txt"
    reads=$(($(counter bootstrap_reads) - reads))
    check "$id: the walk cost $reads bootstrap upcalls" test "$reads" -le "$BOOTSTRAP_UPCALLS_MAX"
    before=$(requests_seen)
    check "$id: the registry was asked" test "$before" -gt 0
    reads=$(counter upcalls_read)
    forget_pages
    check "$id: the second pass is right" same_tree "$place" "/fixtures/$size/tree.txt"
    check "$id: the second pass asked for nothing" asked_nothing_since "$before"
    check "$id: the second pass made no upcall" test "$(counter upcalls_read)" = "$reads"
    check "$id: unmount and unregister" take_away "$id" "$place"
}

image_survives_restart() { # SIZE KIND
    local size=$1 kind=$2 folder=/fixtures/$1/$2 id="$1-$2" blob place="/mnt/$1-$2" before
    blob=$(blob_of "$folder")
    forget_pages
    check "$id: mount after a restart" bring "$id" "$folder/image.boot" "$blob" "$HOST" "fixtures/$kind" "$place"
    before=$(requests_seen)
    check "$id: right after a restart" same_tree "$place" "/fixtures/$size/tree.txt"
    check "$id: after a restart nothing was asked for" asked_nothing_since "$before"
    check "$id: unmount after a restart" take_away "$id" "$place"
}

# The guide's mount line has no domain_id.
guide_without_domain() {
    local folder=/fixtures/small/lz4-1m
    register demo demo "$folder/image.boot" "$HOST" fixtures/lz4-1m || return 1
    mkdir -p /mnt/demo
    mount -t erofs -o "fsid=demo,device=$(blob_of $folder)" none /mnt/demo || return 1
    same_tree /mnt/demo /fixtures/small/tree.txt && take_away demo /mnt/demo
}

one_step_bootstrap() {
    mkdir -p /mnt/one
    sluice mount --apisock "$SOCKET" --bootstrap /fixtures/small/zstd-64k/image.boot --registry "http://$HOST" \
        --repo fixtures/zstd-64k --state-dir /cache/state /mnt/one &&
        same_tree /mnt/one /fixtures/small/tree.txt
}

one_step_reference() {
    mkdir -p /mnt/two
    sluice mount --apisock "$SOCKET" --plain-http --state-dir /cache/state "$HOST/fixtures/lz4-1m:small" /mnt/two &&
        same_tree /mnt/two /fixtures/small/tree.txt
}

# What a start reads, in an order of its own, whatever the node has of the image already.
STARTS_WITH=(big/text-7m sizes/1048577 big/random-5m)

start_in() { # PLACE
    local file
    for file in "${STARTS_WITH[@]}"; do
        cat "$1/$file" >/dev/null || return 1
    done
}

traced_start() {
    mkdir -p /mnt/traced
    sluice mount --apisock "$SOCKET" --plain-http --state-dir /cache/state --trace /tmp/start.jsonl \
        "$HOST/fixtures/zstd-64k:small" /mnt/traced && start_in /mnt/traced && umount_forgets /mnt/traced || return 1
    paths_of /tmp/start.jsonl | diff - <(printf '/%s\n' "${STARTS_WITH[@]}")
}

paths_of() { # TRACE
    python3 -c 'import json, sys; print(*dict.fromkeys(json.loads(line)["path"] for line in open(sys.argv[1])), sep="\n")' "$1"
}

# The image that is made of it has the start in a blob of its own, which comes by itself.
optimised_start() {
    local image=$HOST/fixtures/zstd-64k blob all before
    sluice optimize --json --plain-http --trace /tmp/start.jsonl --tag fast "$image:small" >/tmp/optimised.json || return 1
    blob=$(python3 -c 'import json; print(json.load(open("/tmp/optimised.json"))["blob"])')
    all=$(sluice inspect --json --plain-http "$image:fast" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["chunks"]["count"])')
    all=$((all + $(counter chunks_filled)))
    mkdir -p /mnt/fast
    sluice mount --apisock "$SOCKET" --plain-http --state-dir /cache/state --prefetch "$image:fast" /mnt/fast || return 1
    wait_for "the start's blob" is_fetched "$all" || return 1
    before=$(requests_for "$blob")
    [ "$before" -gt 0 ] && start_in /mnt/fast && [ "$(requests_for "$blob")" = "$before" ] &&
        same_tree /mnt/fast /fixtures/small/tree.txt && umount_forgets /mnt/fast
}

requests_for() { # BLOB
    requests_seen >/dev/null
    requests_logged | grep -c "$1"
}

# Images share what the fanotify door keeps, and nothing behind cachefiles, where all of it is filled anew.
is_fetched() { # CHUNKS
    if [ "$DOOR" = cachefiles ]; then
        [ "$(counter chunks_filled)" -ge "$1" ]
        return
    fi
    sluice images --apisock "$SOCKET" --json | python3 -c '
import json, sys
first = next(image for image in json.load(sys.stdin) if "/mnt/fast" in image["mountpoints"])["blobs"][0]
sys.exit(first.get("fetched", 0) < first["size"])'
}

images_show_mounts() {
    sluice images --apisock "$SOCKET" | tee /tmp/images
    grep -q /mnt/one /tmp/images && grep -q /mnt/two /tmp/images
}

umount_forgets() {
    sluice umount --apisock "$SOCKET" "$1" && ! findmnt "$1"
}

sizes=(small)
[ ! -d /fixtures/large ] || sizes+=(large)
docker_registry_start
for size in "${sizes[@]}"; do
    for kind in lz4-1m zstd-64k zran; do
        check "$size $kind: pushed to docker-registry" \
            push "$HOST" "fixtures/$kind" "$size" "/fixtures/$size/$kind" "/fixtures/$size/source.tar.gz"
    done
done
must "the daemon starts" daemon_start
for size in "${sizes[@]}"; do
    for kind in lz4-1m zstd-64k zran; do
        image_is_faithful "$size" "$kind"
    done
done
check "the daemon stops when told" daemon_stop
check "the daemon starts again" daemon_start
for size in "${sizes[@]}"; do
    for kind in lz4-1m zstd-64k zran; do
        image_survives_restart "$size" "$kind"
    done
done
[ "$DOOR" != cachefiles ] || check "the guide's mount without a domain" guide_without_domain
check "sluice mount --bootstrap" one_step_bootstrap
check "sluice mount REFERENCE" one_step_reference
check "sluice images names both mounts" images_show_mounts
check "sluice stat" sluice stat --apisock "$SOCKET"
check "sluice inspect" sluice inspect /fixtures/small/lz4-1m/image.boot
check "sluice check --registry" sluice check /fixtures/small/zstd-64k/image.boot --registry "http://$HOST" \
    --repo fixtures/zstd-64k
check "sluice umount of the first" umount_forgets /mnt/one
check "sluice umount of the second" umount_forgets /mnt/two
fails "sluice umount of what is not mounted" sluice umount --apisock "$SOCKET" /mnt/two
check "a start is recorded" traced_start
check "the image optimised for it is prefetched" optimised_start
check "the socket is the owner's alone" test "$(stat -c %a "$SOCKET")" = 600
check "the daemon stops at the end" daemon_stop
if [ "$DOOR" = cachefiles ]; then option=--fscache; else option=--cache; fi
check "sluice doctor finds this kernel good" sluice doctor "$option" "$CACHE"
finish
