#!/usr/bin/env bash
# Lazily loaded images on Debian's containerd: through CRI as Kubernetes does it, and by `sluice pull` for plain ctr.
# What the registry sent is counted; at the end nothing is mounted and no directory is left.
. "$(dirname "${BASH_SOURCE[0]}")/parts/harness.sh"

ZSTD=4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d
ZSTD_BYTES=$(stat -c %s "$FIXTURES/zstd-64k/$ZSTD")
LZ4=87e1f1ab466391410c6662b5a67d7ff6f1197a91e65e6bc184001eb2dde6bd0a
# What the fixtures' makers say is in them.
RANDOM_SHA=$(sed -n "s/^'big\/random-5m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")

sum_of() { # FILE: prints the digest of a file in a container of the pod
    cri exec "$container" -- /busybox sha256sum "$1" | cut -d ' ' -f 1
}

must "the registry starts" registry_start
must "a lazily loadable image is pushed" push zstd 1 nydus "$FIXTURES/zstd-64k"
must "and another" push lz4 1 nydus "$FIXTURES/lz4-1m"
must "the daemon starts" daemon_start
must "the snapshotter starts" snapshotter_start
must "containerd starts" containerd_start

# --- CRI

forget_requests
must "CRI pulls" cri pull "$registry/zstd:1"
equal "nothing of the blob was fetched" 0 fetched "$ZSTD"
check "a pull mounts nothing" mounted 0
pod=$(cri run-pod pod)
container=$(cri create "$pod" main "$registry/zstd:1" --mount /bin/busybox:/busybox -- /busybox sleep 1000)
must "a container is made" test -n "$container"
check "and started" cri start "$container"
check "the image is mounted, once" mounted 1
first=$(fetched "$ZSTD")
check "of $ZSTD_BYTES bytes $first are here when the container runs" test "$first" -lt $((ZSTD_BYTES / 2))
equal "what it reads is right" "$RANDOM_SHA" sum_of /big/random-5m
check "only what it read was fetched" test "$(fetched "$ZSTD")" -lt "$ZSTD_BYTES"
second=$(cri create "$pod" second "$registry/zstd:1" --mount /bin/busybox:/busybox -- /busybox sleep 1000)
check "a second container starts" cri start "$second"
check "on the same mount" mounted 1
check "the first container goes" cri remove "$container"
check "the mount stays for the second" mounted 1
check "the second goes" cri remove "$second"
check "and with it the mount" collected "the unmounting" mounted 0
check "the daemon has forgotten the image" test "$("$SLUICE" images --apisock "$SOCKET" --json)" = "[]"
check "the pod goes" cri remove-pod "$pod"
check "the image goes" cri remove-image "$registry/zstd:1"
check "the pod's image goes" cri remove-image "$registry/pause:1"
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept

# --- sluice pull, for clients that pass no labels

forget_requests
if [ "$(containerd_major)" = 1 ]; then
    refuse "plain ctr cannot pull it" "mount|unpack|archive|extract|magic|header" \
        ctr -n test images pull --plain-http --snapshotter nydus "$registry/lz4:1"
else
    # The transfer service passes labels to snapshotters that ask for them, as the snippet does.
    check "ctr pulls it without its blob" ctr -n test images pull --plain-http --snapshotter nydus "$registry/lz4:1"
    equal "nothing of the blob was fetched" 0 fetched "$LZ4"
    equal "it runs" "$RANDOM_SHA  /big/random-5m" run test "$registry/lz4:1" zero /busybox sha256sum /big/random-5m
fi
check "what it left goes" ctr -n test images rm --sync "$registry/lz4:1"
forget_requests
pull() { "$SLUICE" pull --address "$CONTAINERD" --namespace test "$@"; }
must "sluice pull" pull "$registry/lz4:1"
equal "nothing of the blob was fetched" 0 fetched "$LZ4"
check "again is no harm" pull "$registry/lz4:1"
equal "each layer is a snapshot" 2 snapshots test
equal "it runs" "$RANDOM_SHA  /big/random-5m" run test "$registry/lz4:1" one /busybox sha256sum /big/random-5m
check "of $(stat -c %s "$FIXTURES/lz4-1m/$LZ4") bytes $(fetched "$LZ4") were fetched" test "$(fetched "$LZ4")" -gt 0
check "the mount went with the container" collected "the unmounting" mounted 0
refuse "a snapshotter without blob layers is refused" "overlayfs.*--snapshotter" \
    pull --snapshotter overlayfs "$registry/lz4:1"
refuse "an ordinary image is refused" "not a lazily loadable image" pull "$registry/pause:1"
refuse "containerd must be there" "is --address right" \
    "$SLUICE" pull --address /run/nowhere.sock "$registry/lz4:1"
# Nothing but its name holds it.
no_lease() { [ "$(ctr -n test leases ls -q | wc -l)" = 0 ]; }
check "no lease is left" no_lease
check "the image goes" ctr -n test images rm --sync "$registry/lz4:1"
check "and all its content" test "$(ctr -n test content ls -q | wc -l)" = 0
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept

# --- a pull into Kubernetes' namespace is seen by CRI

check "sluice pull for Kubernetes" "$SLUICE" pull --address "$CONTAINERD" --namespace k8s.io "$registry/lz4:1"
pod=$(cri run-pod other)
container=$(cri create "$pod" main "$registry/lz4:1" --mount /bin/busybox:/busybox -- /busybox sleep 1000)
check "a container of it starts" cri start "$container"
equal "it reads right" "$RANDOM_SHA" sum_of /big/random-5m
check "the pod goes" cri remove-pod "$pod"
check "the images go" cri remove-image "$registry/lz4:1"
check "all of them" cri remove-image "$registry/pause:1"
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept
check "the daemon serves nothing" test "$("$SLUICE" images --apisock "$SOCKET" --json)" = "[]"
finish
