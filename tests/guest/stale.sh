#!/bin/bash
# The kernel's cache outlives registrations and restarts, and what is in it is never verified again. Whatever it still
# holds under a name, from another image or from a daemon that verified nothing, a reader gets the image registered now.
# doors: cachefiles
. /guest/suite/parts/harness.sh

HOST=127.0.0.1:5000
FIRST=/fixtures/small/lz4-1m
OTHER=/fixtures/small/zstd-64k
TREE=/fixtures/small/tree.txt
BLOB=$(blob_of "$FIRST")

# The first image with another target of one link: a bootstrap of the same size, so that its size gives nothing away.
make_twin() {
    mkdir -p /tmp/twin
    sed 's,/absolute/nowhere,/absolute/no-here,' "$FIRST/image.boot" >/tmp/twin/image.boot
    sed 's,/absolute/nowhere,/absolute/no-here,' "$TREE" >/tmp/twin/tree.txt
    ! cmp "$FIRST/image.boot" /tmp/twin/image.boot && [ "$(wc -c <"$FIRST/image.boot")" = "$(wc -c </tmp/twin/image.boot)" ]
}

register_demo() { # BOOTSTRAP REPO [DOMAIN]
    register demo "${3:-demo}" "$1" "$HOST" "fixtures/$2"
}

# Registers as demo/demo, mounts, reads everything, and takes it away again. Sets `before`: the requests that had come
# when it was registered.
shows() { # BOOTSTRAP REPO BLOB TREE
    register_demo "$1" "$2" || return 1
    before=$(requests_seen)
    mount_image demo demo "$3" /mnt/demo && same_tree /mnt/demo "$4" && take_away demo /mnt/demo
}

restart() {
    daemon_stop && daemon_start
}

refused_as_mounted() { # BOOTSTRAP REPO [DOMAIN]
    ! register_demo "$@" >/tmp/refusal || return 1
    cat /tmp/refusal
    grep -q "${3:-demo}/demo .*in use.*unmount" /tmp/refusal
}

registered_nowhere() { # DOMAIN
    [ "$(api GET "/api/v2/blobs?domain_id=$1")" = "[]" ]
}

mounted_shows() { # PLACE TREE
    forget_pages
    same_tree "$1" "$2"
}

# Overwrites what the cache holds of a cookie with bytes that nobody verified.
spoil() { # COOKIE
    local file
    file=$(ls "$CACHE/cache/Ierofs,demo"/@*/"D$1") || return 1
    tr '\0-\377' 'X' <"$file" | dd of="$file" conv=notrunc,fsync bs=1M status=none
    forget_pages
}

docker_registry_start
for kind in lz4-1m zstd-64k; do
    must "$kind: pushed" push "$HOST" "fixtures/$kind" small "/fixtures/small/$kind"
done
must "two bootstraps of one size" make_twin
must "the daemon starts" daemon_start

check "demo is the first image" shows "$FIRST/image.boot" lz4-1m "$BLOB" "$TREE"
check "demo is the first image again" shows "$FIRST/image.boot" lz4-1m "$BLOB" "$TREE"
check "the same image keeps its cache" asked_nothing_since "$before"
check "demo is its twin at once" shows /tmp/twin/image.boot lz4-1m "$BLOB" /tmp/twin/tree.txt
check "the twin shares the data" asked_nothing_since "$before"
check "demo is an image of other blobs" shows "$OTHER/image.boot" zstd-64k "$(blob_of "$OTHER")" "$TREE"
check "other blobs were asked for" test "$(requests_seen)" -gt "$before"

check "a restart" restart
check "demo is the first image after a restart" shows "$FIRST/image.boot" lz4-1m "$BLOB" "$TREE"
check "another restart" restart
check "demo is its twin after a restart" shows /tmp/twin/image.boot lz4-1m "$BLOB" /tmp/twin/tree.txt

# Mounted, with a cache file that has a name, and with one that has none yet.
for domain in demo fresh; do
    check "$domain: the twin" register_demo /tmp/twin/image.boot lz4-1m "$domain"
    check "$domain: mounted" mount_image demo "$domain" "$BLOB" "/mnt/$domain"
    check "$domain: read" same_tree "/mnt/$domain" /tmp/twin/tree.txt
    check "$domain: unregistered while mounted" unregister "$domain"
    check "$domain: another image is refused, with what to do" refused_as_mounted "$FIRST/image.boot" lz4-1m "$domain"
    check "$domain: nothing was registered" registered_nowhere "$domain"
    check "$domain: the same image is not refused" register_demo /tmp/twin/image.boot lz4-1m "$domain"
    check "$domain: what is mounted is still right" mounted_shows "/mnt/$domain" /tmp/twin/tree.txt
    check "$domain: unmounted" take_away "$domain" "/mnt/$domain"
    check "$domain: the other image at once" register_demo "$FIRST/image.boot" lz4-1m "$domain"
    check "$domain: mounted after all" mount_image demo "$domain" "$BLOB" "/mnt/$domain"
    check "$domain: read after all" same_tree "/mnt/$domain" "$TREE"
    check "$domain: unmounted again" take_away "$domain" "/mnt/$domain"
done

check "the daemon stops" daemon_stop
check "the blob's cache is spoilt" spoil "$BLOB"
check "the bootstrap's cache is spoilt" spoil demo
check "the records are another cache's" rm "$CACHE/sluice-ledger"
check "the daemon starts on a cache it does not know" daemon_start
check "unknown bytes are not shown" shows "$FIRST/image.boot" lz4-1m "$BLOB" "$TREE"
check "the daemon stops again" daemon_stop
check "the blob's cache is spoilt once more" spoil "$BLOB"
check "the blob's record is damaged" truncate -s 100 "/cache/state/filled/Idemo/D$BLOB"
check "the daemon starts with a damaged record" daemon_start
check "unrecorded bytes are not shown" shows "$FIRST/image.boot" lz4-1m "$BLOB" "$TREE"
check "the daemon stops at the end" daemon_stop
finish
